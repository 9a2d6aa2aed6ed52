"""picogpt-train with a small pool, little text for validation, and short waits for the network."""

import time

from picogpt.cli.train import command
from picogpt.data import first_articles, outage, read_ahead, stream

stream.POOL = 64
first_articles.VALIDATION_CHARS = 2000
read_ahead.READ_AHEAD = 2000
outage.LONGEST_WAIT = 0.2
sleep = time.sleep
time.sleep = lambda seconds: sleep(min(float(seconds), 0.05))
command()
