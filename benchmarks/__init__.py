"""Comparisons with plain baselines, for `scripts/benchmark.py`: each pair in one run, taking turns."""
