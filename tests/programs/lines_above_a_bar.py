"""Show a bar to its end while two threads print lines, one of them to stderr and one to stdout."""

import threading
import time

from picogpt.cli.bar import ProgressBar
from picogpt.cli.common import notice
from picogpt.cli.screen import above_bar


def tell() -> None:
    """Print twenty notices."""
    for i in range(20):
        notice(f"notice {i}")
        time.sleep(0.01)


thread = threading.Thread(target=tell)
with ProgressBar(100000, "char") as bar:
    thread.start()
    for i in range(100):
        bar.advance(1000, f"loss {i / 7:.3f}")
        time.sleep(0.004)
        if i % 10 == 0:
            with above_bar():
                print(f"result {i}", flush=True)
    thread.join()
notice("end")
