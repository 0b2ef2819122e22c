"""The whole story on one machine: `python -m examples.demo` (see docs/demo.md)."""
