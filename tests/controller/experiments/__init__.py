"""Experiments in the controller."""
