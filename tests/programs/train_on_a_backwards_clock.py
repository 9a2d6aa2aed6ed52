"""picogpt-train while the wall clock runs backwards, more than a day each time it is read."""

import itertools
import sys
import time

from picogpt.cli.train import main

reads = itertools.count()
time.time = lambda: 1e9 - 1e5 * next(reads)
sys.exit(main())
