"""Engines that one device of a class built, for the others: see docs/engines.md."""
