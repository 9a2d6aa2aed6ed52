"""The connection to the hub: what its variables must look like, one try a request, and whether an error is worth waiting for."""

from __future__ import annotations

import os
import re
import urllib.parse
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from picogpt.errors import DataError

__all__ = ["check_environment", "disable_retries", "explain", "hint", "is_transient"]

REQUEST_TIMEOUT = 10.0
"""Seconds without a byte after which a request has failed."""

_PROXIES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY")
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_TOKEN = re.compile(r"[!-~]*")
_RETRYABLE = {408, 425, 429}
"""Statuses, beside those from 500 on, with which a server asks to be asked again."""
_NETWORK_ERRORS = {"TransportError", "ConnectionError", "TimeoutError", "gaierror", "SSLError", "HTTPException"}
"""Names of the classes of errors of a network; each HTTP library has classes of its own under the same names."""


class HubError(ConnectionError):
    """A request to the hub that has failed in a way that may pass."""


def check_environment() -> None:
    """Check the variables that say how to reach the hub, before anything is asked of it.

    Raises:
        DataError: one of them is malformed; the message names it.
    """
    for variable in _OFFLINE:
        if os.environ.get(variable, "").upper() in {"1", "ON", "YES", "TRUE"}:
            raise DataError(f"{variable} is set, and a stream needs the hub; unset {variable} to go on, or use --text")
    for name in _PROXIES:
        for variable in (name, name.lower()):
            if value := os.environ.get(variable):
                _check_proxy(variable, value)
    if endpoint := os.environ.get("HF_ENDPOINT"):
        _check_address("HF_ENDPOINT", endpoint, ("http", "https"), "https://huggingface.co, or leave it out")
    for variable in _TOKENS:
        value = os.environ.get(variable, "").strip()
        if not _TOKEN.fullmatch(value):
            odd = next(character for character in value if not _TOKEN.fullmatch(character))
            raise DataError(f"{variable}: {odd!r} cannot be part of a token; copy it anew, without quotes or spaces")


def _check_proxy(variable: str, value: str) -> None:
    schemes = ("http", "https", "socks5", "socks5h")
    # Like curl, the libraries take an address without a scheme for http.
    scheme = _check_address(variable, value if "://" in value else f"http://{value}", schemes, "http://HOST:PORT, or unset it")
    if scheme.startswith("socks") and find_spec("socksio") is None:
        shown = _redact(value)
        raise DataError(f"{variable}: {shown}: SOCKS proxies need one more package; pip install socksio, or unset {variable}")


def _check_address(variable: str, value: str, schemes: tuple[str, ...], example: str) -> str:
    """The scheme of an address; refuses one that is malformed."""
    try:
        parts = urllib.parse.urlsplit(value)
        good = (
            parts.scheme in schemes
            and bool(parts.hostname)
            and parts.port != 0
            and value.isascii()
            and not re.search(r"\s", value)
        )
    except ValueError:  # a port or an IPv6 address that is none
        good = False
    if not good:
        raise DataError(f"{variable}: {_redact(value)!r} is no address; set it to {example}")
    return parts.scheme


def _redact(address: str) -> str:
    """`address` for a screen or a log: a name and a password in it may themselves have slashes and at signs."""
    scheme, separator, rest = address.rpartition("://")
    *hidden, shown = rest.rsplit("@", 1)
    return scheme + separator + ("***@" if hidden else "") + shown


def disable_retries() -> None:
    """Have the hub's library ask each thing once, for `REQUEST_TIMEOUT` seconds, and check that what came is what was asked for.

    By itself the library repeats some requests for minutes without a word, asks others once, and waits for some without an end.
    Here every failure is a `HubError` at once, and the one who asked waits (`picogpt.data.outage`).
    """
    import huggingface_hub
    from huggingface_hub.utils._http import default_client_factory

    token = huggingface_hub.get_token() or ""
    if not _TOKEN.fullmatch(token):
        raise DataError(f"{huggingface_hub.constants.HF_TOKEN_PATH}: it holds no token; log in anew, or delete the file")
    try:
        default_client_factory().close()
    except (OSError, ValueError, ImportError) as error:
        raise DataError(
            f"no connection can be made ({explain(error)}); check NO_PROXY, SSL_CERT_FILE and SSL_CERT_DIR"
        ) from error

    def client() -> Any:
        made: Any = default_client_factory()
        send = made.send

        def send_once(request: Any, **options: Any) -> Any:
            limits = request.extensions.get("timeout", {})
            request.extensions["timeout"] = {
                name: min(limits.get(name) or REQUEST_TIMEOUT, REQUEST_TIMEOUT) for name in ("connect", "read", "write", "pool")
            }
            try:
                response = send(request, **options)
            except Exception as error:
                if is_transient(error):
                    raise HubError(f"{type(error).__name__}: {error}") from error
                raise
            _check_response(request, response)
            return response

        made.send = send_once
        return made

    huggingface_hub.set_client_factory(client)


def _check_response(request: Any, response: Any) -> None:
    """Raise `HubError` for a server that is busy, and for less than the range of bytes that was asked for."""
    status = response.status_code
    if status in _RETRYABLE or status >= 500:
        response.close()
        raise HubError(f"{request.method} {request.url.path}: {status} {response.reason_phrase}")
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
    given = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", response.headers.get("Content-Range", ""))
    if not asked or not given or status != 206 or "Content-Encoding" in response.headers:
        return
    start, end, size = map(int, given.groups())
    length = int(response.headers.get("Content-Length", end - start + 1))
    if start != int(asked[1]) or end < min(int(asked[2] or size), size - 1) or length != end - start + 1:
        response.close()
        raise HubError(f"{request.url.path}: less came than was asked for")


def is_transient(error: BaseException) -> bool:
    """Whether a network or a server that is busy is behind an error, so that waiting may mend it."""
    for cause in _causes(error, hidden=True):
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status is not None and (status in _RETRYABLE or status >= 500):
            return True
        if any(kind.__name__ in _NETWORK_ERRORS for kind in type(cause).__mro__):
            return True
    return False


def hint(error: BaseException) -> str | None:
    """What to do about an error that waiting does not mend; None where it may."""
    if is_transient(error):
        return None
    for cause in _causes(error):
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(cause, OSError) and cause.filename is not None and not isinstance(cause, FileNotFoundError):
            return "set HF_HOME to a folder that can be written and has space"
        if isinstance(cause, PermissionError) or status in {401, 403}:
            return "set HF_TOKEN to one that may read it"
        if isinstance(cause, FileNotFoundError) or status in {404, 410, 416}:
            return "it is there no more, or not at the run's commit; --fresh starts over with the newest"
    return None


def explain(error: BaseException) -> str:
    """What happened, on one line, as the innermost error tells it."""
    *_, innermost = _causes(error)
    if isinstance(innermost, OSError) and innermost.filename is not None:
        return f"{innermost.filename}: {innermost.strerror}"
    if "StopIteration" in repr(innermost):  # so the library says that a file is empty
        return "it holds no row"
    return f"{type(innermost).__name__}: {first_line(innermost)[:200]}"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _causes(error: BaseException, *, hidden: bool = False) -> Iterator[BaseException]:
    """An error, the one it was raised from, and so on; with `hidden` also those that a `from None` has hidden."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or (cause.__context__ if hidden else None)
