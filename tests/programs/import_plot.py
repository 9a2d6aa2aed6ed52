"""Import matplotlib by `picogpt.plot`, print the folder it is to keep its files in, and end at once."""

import os

import picogpt.plot  # noqa: F401 (it may change the variable)

print(os.environ.get("MPLCONFIGDIR"), flush=True)
os._exit(0)
