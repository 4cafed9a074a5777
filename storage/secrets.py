"""Credentials in texts: what must be out of a text before it is logged, written or shown."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import urllib.parse
import urllib.request
from collections.abc import Iterable

_URL = re.compile(r"https?://[^\s\"'<>]+", re.IGNORECASE)
_USER = re.compile(r"(?<=://)[^/?#]*@")
_PARAMETER = re.compile(r"(?<=[?&;])([^=&;#]+)=([^&;#]*)")
_TELLING = re.compile(  # anywhere in a parameter's name
    r"signature|token(?!iz)|secret|password|passwd|pwd|credential|(?:api|access)[_-]?key",
    re.IGNORECASE,
)
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_TELLING_WORDS = {"sig", "auth", "oauth", "authorization", "authkey", "key"}  # not design, author
_MARKED = re.compile(r"\*{3}[0-9a-f]{8}")
_SECRET_NAME = re.compile(r"secret|token|password|passwd|credential|connection_string", re.I)
_SECRET_VARIABLE = re.compile(r"(SECRET|TOKEN|PASSWORD|PASSWD|_KEY|CREDENTIALS?)$", re.IGNORECASE)
_AS_WRITTEN = "%/:=&?~#+!$,;'@()*[]"  # of an address, besides letters and digits
_SHORTEST = 6  # characters of a value worth hiding: a shorter one is a part of many words

_known: set[str] = set()


def know_flags(words: Iterable[str]) -> None:
    """Remember the values of flags whose names tell of a credential (`--s3_secret_access_key`)."""
    name = ""
    for word in words:
        if word.startswith("--"):
            name, given, value = word[2:].partition("=")
        else:
            given, value = "=", word
        if given and is_secret(name):
            know(value)


def is_secret(name: str) -> bool:
    """Whether a flag of this name holds a credential."""
    return bool(_SECRET_NAME.search(name))


def know(value: str) -> None:
    """Remember a credential, so that `hide` finds it wherever it stands."""
    if len(value) >= _SHORTEST:
        _known.add(value)


def hide(text: str) -> str:
    """`text` without credentials.

    In http(s) addresses user and password, and the values of parameters that sign or authorise, are
    `***`; so is every value that `know` was told, or that the environment holds under a telling
    name (AWS_SECRET_ACCESS_KEY, ...).
    """
    text = hide_in_url(text)
    for value in _known | _in_environment():
        if value in text:
            text = text.replace(value, "***")
    return text


def hide_in_url(text: str, apart: bool = False) -> str:
    """`text` without the credentials that its http(s) addresses hold.

    With `apart` two addresses that differ in a parameter such as `key` or `image_key` stay two: it
    may be a credential or the name of a picture, and 8 digits of its SHA-256 take its place.
    Others are renewed from day to day (signatures), while the picture is the same.
    """

    def hidden(parameter: re.Match[str]) -> str:
        name, value = parameter.groups()
        if not _is_telling(name) or _MARKED.fullmatch(value):
            return parameter[0]
        mark = hashlib.sha256(value.encode("utf-8", "backslashreplace")).hexdigest()[:8]
        return f"{name}=***{mark if apart and _may_name_a_picture(name) else ''}"

    def bare(url: re.Match[str]) -> str:
        return _PARAMETER.sub(hidden, _USER.sub("***@", url[0], count=1))

    return _URL.sub(bare, text) if "://" in text else text


def _is_telling(name: str) -> bool:
    """Whether a parameter of this name holds a credential, or may."""
    return bool(_TELLING.search(name) or _telling_words(name))


def _may_name_a_picture(name: str) -> bool:
    return not _TELLING.search(name) and _telling_words(name) == {"key"}


def _telling_words(name: str) -> set[str]:
    return {word.lower() for word in _WORD.findall(name)} & _TELLING_WORDS


def _in_environment() -> set[str]:
    return {
        value
        for name, value in os.environ.items()
        if len(value) >= _SHORTEST and _SECRET_VARIABLE.search(name) and not os.path.exists(value)
    }


def request(url: str) -> urllib.request.Request:
    """A request for `url`, its user and password as Basic authorisation, for its own host alone.

    Spaces and letters beyond ASCII are escaped, as browsers do; what is escaped already stays.
    """
    parts = urllib.parse.urlsplit(url)
    user, found, host = parts.netloc.rpartition("@")
    path, query = (urllib.parse.quote(part, safe=_AS_WRITTEN) for part in (parts.path, parts.query))
    asked = urllib.request.Request(
        urllib.parse.urlunsplit(parts._replace(netloc=host, path=path, query=query)),
        headers={"User-Agent": "image-features"},
    )
    if found:
        plain = urllib.parse.unquote(user)
        know(plain.partition(":")[2])
        word = base64.b64encode(plain.encode()).decode()
        asked.add_unredirected_header("Authorization", f"Basic {word}")
    return asked
