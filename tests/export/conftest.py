"""Browsers for the tests of pages: each test that takes one runs in all of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.browser import Browser
from tests.chromium import CHROMIUM, Chromium
from tests.firefox import FIREFOX, Firefox


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(Chromium, id="Chromium", marks=pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")),
        pytest.param(Firefox, id="Firefox", marks=pytest.mark.skipif(FIREFOX is None, reason="needs Firefox")),
    ],
)
def browser(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser for all tests of a file."""
    with request.param(tmp_path_factory.mktemp("browser")) as started:
        yield started
