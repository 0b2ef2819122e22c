"""The whole product as separate processes: real commands, real networks, real engines."""
