"""What all exported pages share: their files in this package, and data for their scripts."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

__all__ = ["resource", "script_json"]


def resource(name: str) -> str:
    """Return the text of a file of this package."""
    return (files("picogpt.export") / name).read_text("utf-8")


def script_json(content: Any) -> str:
    """Return `content` as JSON for a script element: without "<", no text can contain "</script>" and end it early."""
    return json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")
