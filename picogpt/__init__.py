"""picogpt: a 6.34M-parameter character GPT with a context roll, trained and run on a laptop's CPU."""

__version__ = "0.2.0"
