"""Scores of a trained model on a text: the choice of the text, the conditions, the baselines and the report."""
