"""Files at http(s) addresses, for lists that may name them."""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from collections.abc import Callable

from storage import secrets
from storage.retries import BadAddress, attempt, ignore

_TIMEOUT = 30  # seconds without a byte


def read_url(url: str, most: int, on_retry: Callable[[], None] = ignore) -> bytes:
    """The first `most` bytes at `url` (http or https; redirections lead nowhere else).

    Raises OSError: FileNotFoundError and PermissionError where the server says so, other answers
    after they were tried again.
    """

    def fetch() -> bytes:
        try:
            with _opener().open(secrets.request(url), timeout=_TIMEOUT) as answer:
                data = bytes(answer.read(most))
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
