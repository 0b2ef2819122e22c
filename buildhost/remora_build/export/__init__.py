"""`remora-build export`: a checkpoint directory becomes a bundle directory."""
