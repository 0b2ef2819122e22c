"""QAIRT's use cases and ours: read, converted adapter by adapter, counted, written back."""
