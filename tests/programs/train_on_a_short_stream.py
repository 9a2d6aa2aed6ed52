"""picogpt-train with a small pool, little text for validation, and short waits for the network."""

import time

from picogpt.cli.train import command
from picogpt.data import articles, outage, stream

stream.POOL = 64
articles.VALIDATION_CHARS = 2000
articles.READ_AHEAD = 2000
outage.LONGEST_WAIT = 0.2
sleep = time.sleep
time.sleep = lambda seconds: sleep(min(float(seconds), 0.05))
command()
