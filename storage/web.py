"""Files at http(s) addresses, for lists that may name them."""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Callable

from storage import secrets
from storage.retries import BadAddress, attempt, ignore

_TIMEOUT = 30  # seconds without a byte
_PATIENCE, _LEAST = 60, 4 << 10  # seconds after which fewer bytes a second are too few
_PIECE = 1 << 20


def read_url(url: str, most: int, on_retry: Callable[[], None] = ignore) -> bytes:
    """The first `most` bytes at `url` (http or https; redirections lead nowhere else).

    Raises OSError: FileNotFoundError and PermissionError where the server says so, other answers
    after they were tried again.
    """

    def fetch() -> bytes:
        try:
            with _opener().open(secrets.request(url), timeout=_TIMEOUT) as answer:
                data = _paced(answer, url, most)
                left = answer.length  # of the length that was announced
                if left and len(data) < most:
                    raise OSError(f"{url}: the connection ended {left} bytes too early")
                return data
        except urllib.error.HTTPError as error:
            error.close()
            raise
        except (http.client.InvalidURL, UnicodeError) as error:
            raise BadAddress(f"{url}: {' '.join(str(error).split())}") from None
        except (http.client.HTTPException, ValueError) as error:
            raise OSError(
                f"{url}: {' '.join(str(error).split()) or type(error).__name__}"
            ) from None

    return attempt(fetch, url, on_retry)


def _paced(answer: http.client.HTTPResponse, url: str, most: int) -> bytes:
    """The first `most` bytes of `answer`; OSError where they come so slowly as to hold up a run."""
    data = bytearray()
    start = time.monotonic()
    while len(data) < most and (piece := answer.read1(min(_PIECE, most - len(data)))):
        data += piece
        seconds = time.monotonic() - start
        if seconds > _PATIENCE and len(data) < _LEAST * seconds:
            raise OSError(f"{url}: only {len(data)} bytes came in {seconds:.0f} s")
    return bytes(data)


def _opener() -> urllib.request.OpenerDirector:
    opener = urllib.request.OpenerDirector()  # build_opener would add ftp:, file: and data:
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    return opener
