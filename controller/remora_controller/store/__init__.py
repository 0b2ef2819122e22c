"""Where the controller's truth is kept: one interface, and SQLite behind it."""
