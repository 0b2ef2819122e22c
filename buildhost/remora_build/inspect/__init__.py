"""Explains a bundle, an adapter or a repository to people and to scripts."""
