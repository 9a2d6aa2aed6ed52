"""Load the C source that is named, and print what its function `number` returns."""

import sys
from pathlib import Path

from picogpt.kernels.build import load_library

library = load_library(Path(sys.argv[1]), {"NUMBER": 41}, flags=["-O1"], notify=lambda _: None)
print(library.functions.number())
