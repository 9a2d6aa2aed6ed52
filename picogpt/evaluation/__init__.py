"""Scores of a trained model on a text: which text, under which conditions, beside which baselines, and the report."""
