"""Benchmarks: one file per subject; the last line of each one's stdout is one JSON object."""
