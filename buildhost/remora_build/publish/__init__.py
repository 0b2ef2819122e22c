"""Bundles and adapters -> content-addressed chunks with a manifest in a repository."""
