"""Programs that `alternate.Worker` drives."""
