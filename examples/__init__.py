"""Runnable examples. Nothing in Remora imports them."""
