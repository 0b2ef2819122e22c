"""Build host: checkpoint -> quantize -> graph -> adapters -> bundle -> publish."""
