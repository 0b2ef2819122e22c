"""Experiments: what devices counted of arms, whether rules hold, and what a promotion makes."""
