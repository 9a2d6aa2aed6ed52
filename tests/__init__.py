"""Tests of picogpt; `pytest` runs them all, without a network."""
