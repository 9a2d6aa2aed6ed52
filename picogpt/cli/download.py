"""A progress bar for downloads, apart from the training display, which needs torch."""

from __future__ import annotations

from typing import NoReturn

from tqdm import tqdm

__all__ = ["DownloadBar"]


class DownloadBar:
    """A progress bar for bytes, on a terminal, made when the first ones come."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._bar: tqdm[NoReturn] | None = None

    def __call__(self, received: int, total: int) -> None:
        """Show that `received` of `total` bytes have come."""
        if self._bar is None:
            self._bar = tqdm(desc=self._what, total=total, unit="B", unit_scale=True, disable=None)
        self._bar.update(received - self._bar.n)
        if received >= total:
            self._bar.close()
