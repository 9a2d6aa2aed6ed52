"""Show the bar of a download that fails half way, then that of one which comes to its end."""

from picogpt.cli.bar import DownloadBar
from picogpt.cli.common import notice

try:
    with DownloadBar("text") as bar:
        bar(50, 100)
        notice("half of it")
        raise OSError
except OSError:
    notice("gone")
bar = DownloadBar("text")
with bar:
    bar(50, 100)
    bar(100, 100)
notice("fetched")
