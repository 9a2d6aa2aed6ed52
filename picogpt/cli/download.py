"""A progress bar for downloads, apart from the training display, which needs torch."""

from __future__ import annotations

from picogpt.cli.bar import ProgressBar

__all__ = ["DownloadBar"]


class DownloadBar:
    """A progress bar for bytes, on a terminal, made when the first ones come."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._bar: ProgressBar | None = None
        self._received = 0

    def __enter__(self) -> DownloadBar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, received: int, total: int) -> None:
        """Show that `received` of `total` bytes have come."""
        if self._bar is None:
            self._bar = ProgressBar(total, "B", label=self._what)
        self._bar.advance(received - self._received)
        self._received = received
