"""Benchmarks of optimizer steps: see README.md for the method."""
