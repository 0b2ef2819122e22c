"""The device's half of engine sharing: see docs/engines.md."""
