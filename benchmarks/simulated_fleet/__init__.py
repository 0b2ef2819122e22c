"""Parts of `benchmarks/fleet.py`: a real controller process and a fleet of simulated agents."""
