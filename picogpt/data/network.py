"""Connection to the hub: checks of the environment, one attempt per request, and which errors are worth a retry.

Errors of the HTTP libraries are classified here, once: transient (`is_transient`), or fatal with a `hint` for the user.
"""

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
"""Seconds without a byte after which a request counts as failed."""

_PROXIES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY")
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_TOKEN = re.compile(r"[!-~]*")
_RETRYABLE = {408, 425, 429}
"""HTTP statuses worth a retry: request timeout, too early, too many requests; also all from 500 on."""
_NETWORK_ERRORS = {"TransportError", "ConnectionError", "TimeoutError", "gaierror", "SSLError", "HTTPException"}
"""Class names of network errors. Each HTTP library has its own classes, but under these common names."""


class HubError(ConnectionError):
    """Raised for a failed request to the hub that is worth a retry."""


def check_environment() -> None:
    """Check the environment variables for the hub before the first request.

    Raises:
        DataError: a variable is malformed; the message names it.
    """
    # The same values as in huggingface_hub count as true.
    for variable in _OFFLINE:
        if os.environ.get(variable, "").upper() in {"1", "ON", "YES", "TRUE"}:
            raise DataError(f"{variable} is set, and a stream needs the hub; unset {variable}, or use --text")
    for name in _PROXIES:
        # Upper and lower case are both in use.
        for variable in (name, name.lower()):
            if value := os.environ.get(variable):
                _check_proxy(variable, value)
    if endpoint := os.environ.get("HF_ENDPOINT"):
        _check_address("HF_ENDPOINT", endpoint, ("http", "https"), "https://huggingface.co, or leave it out")
    for variable in _TOKENS:
        value = os.environ.get(variable, "").strip()
        # Typographic quotes from a web page would fail deep in the HTTP library.
        if not _TOKEN.fullmatch(value):
            odd = next(character for character in value if not _TOKEN.fullmatch(character))
            raise DataError(f"{variable}: {odd!r} cannot be part of a token; copy it again, without quotes or spaces")


def _check_proxy(variable: str, value: str) -> None:
    """Reject a malformed proxy address, and a SOCKS proxy without the package for it."""
    schemes = ("http", "https", "socks5", "socks5h")
    # Like curl, the libraries read an address without a scheme as http.
    scheme = _check_address(variable, value if "://" in value else f"http://{value}", schemes, "http://HOST:PORT, or unset it")
    if scheme.startswith("socks") and find_spec("socksio") is None:
        shown = _redact(value)
        raise DataError(f"{variable}: {shown}: SOCKS proxies need one more package; pip install socksio, or unset {variable}")


def _check_address(variable: str, value: str, schemes: tuple[str, ...], example: str) -> str:
    """Return the scheme of an address; reject a malformed address."""
    try:
        parts = urllib.parse.urlsplit(value)
        good = (
            parts.scheme in schemes
            and bool(parts.hostname)
            and parts.port != 0
            and value.isascii()
            and not re.search(r"\s", value)
        )
    except ValueError:  # urlsplit raises for an invalid port or IPv6 address
        good = False
    if not good:
        raise DataError(f"{variable}: {_redact(value)!r} is not a valid address; set it to {example}")
    return parts.scheme


def _redact(address: str) -> str:
    """Return `address` without user name and password, for messages; both may themselves contain slashes and at signs."""
    scheme, separator, rest = address.rpartition("://")
    # Split at the last @, as everything before it can be part of the password.
    *hidden, shown = rest.rsplit("@", 1)
    return scheme + separator + ("***@" if hidden else "") + shown


def disable_retries() -> None:
    """Make huggingface_hub try each request once, time out after `REQUEST_TIMEOUT` seconds, and check the responses.

    By itself the library retries some requests silently for minutes, tries others once, and waits for some forever.
    After this call every failure raises `HubError` at once, and the caller retries (`picogpt.data.outage`).
    """
    import huggingface_hub
    from huggingface_hub.utils._http import default_client_factory

    # The token may also come from a file, which `check_environment` does not see.
    token = huggingface_hub.get_token() or ""
    if not _TOKEN.fullmatch(token):
        raise DataError(f"{huggingface_hub.constants.HF_TOKEN_PATH}: it has no valid token; log in again, or delete the file")
    try:
        # A trial client: bad certificates or proxies raise here, once, instead of in every request.
        default_client_factory().close()
    except (OSError, ValueError, ImportError) as error:
        raise DataError(
            f"no connection can be made ({explain(error)}); check NO_PROXY, SSL_CERT_FILE and SSL_CERT_DIR"
        ) from error

    def client() -> Any:
        # The library's own client, with `send` wrapped: timeouts on the way in, checks on the way out.
        made: Any = default_client_factory()
        send = made.send

        def send_once(request: Any, **options: Any) -> Any:
            limits = request.extensions.get("timeout", {})  # None or absent means no limit
            request.extensions["timeout"] = {
                name: min(limits.get(name) or REQUEST_TIMEOUT, REQUEST_TIMEOUT) for name in ("connect", "read", "write", "pool")
            }
            try:
                response = send(request, **options)
            except Exception as error:
                # One class for all transient failures, which the library below does not retry.
                if is_transient(error):
                    raise HubError(f"{type(error).__name__}: {error}") from error
                raise
            _check_response(request, response)
            return response

        made.send = send_once
        return made

    huggingface_hub.set_client_factory(client)


def _check_response(request: Any, response: Any) -> None:
    """Raise `HubError` for a busy server, and for a response that covers less than the requested byte range."""
    status = response.status_code
    if status in _RETRYABLE or status >= 500:
        response.close()
        raise HubError(f"{request.method} {request.url.path}: {status} {response.reason_phrase}")
    # Some proxies cut range responses short; a parquet reader would take the rest for damage. Compare the headers
    # Range: bytes=START-END, Content-Range: bytes START-END/SIZE and Content-Length.
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
    given = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", response.headers.get("Content-Range", ""))
    if not asked or not given or status != 206 or "Content-Encoding" in response.headers:
        return
    start, end, size = map(int, given.groups())
    # END may lie beyond the file, or be missing; the response then ends at SIZE - 1.
    length = int(response.headers.get("Content-Length", end - start + 1))
    if start != int(asked[1]) or end < min(int(asked[2] or size), size - 1) or length != end - start + 1:
        response.close()
        raise HubError(f"{request.url.path}: incomplete response")


def is_transient(error: BaseException) -> bool:
    """Whether an error comes from the network or a busy server, so that a retry can succeed."""
    for cause in _causes(error, hidden=True):
        # Duck-typed, as the error can come from any of several HTTP libraries.
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status is not None and (status in _RETRYABLE or status >= 500):
            return True
        # Compare the names of all base classes.
        if any(kind.__name__ in _NETWORK_ERRORS for kind in type(cause).__mro__):
            return True
    return False


def hint(error: BaseException) -> str | None:
    """Return advice for an error that a retry cannot fix; None if a retry may help or nothing is known."""
    if is_transient(error):
        return None
    for cause in _causes(error):
        status = getattr(getattr(cause, "response", None), "status_code", None)
        # An OSError with a file name is about the local disk: the cache folder.
        if isinstance(cause, OSError) and cause.filename is not None and not isinstance(cause, FileNotFoundError):
            return "set HF_HOME to a writable folder with free space"
        if isinstance(cause, PermissionError) or status in {401, 403}:
            return "set HF_TOKEN to a token that may read it"
        if isinstance(cause, FileNotFoundError) or status in {404, 410, 416}:
            return "it no longer exists at the run's commit; --fresh starts over with the newest"
    return None


def explain(error: BaseException) -> str:
    """Describe an error on one line, by its innermost cause."""
    *_, innermost = _causes(error)
    if isinstance(innermost, OSError) and innermost.filename is not None:
        return f"{innermost.filename}: {innermost.strerror}"
    if "StopIteration" in repr(innermost):  # how the library reports an empty file
        return "it has no rows"
    # The name of the class says something, but for our own, whose message is complete.
    name = "" if isinstance(innermost, HubError) else f"{type(innermost).__name__}: "
    return f"{name}{first_line(innermost)[:200]}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _causes(error: BaseException, *, hidden: bool = False) -> Iterator[BaseException]:
    """Yield an error, its cause, the cause's cause, and so on; with `hidden` also causes suppressed by `from None`."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or (cause.__context__ if hidden else None)
