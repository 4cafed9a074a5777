"""Credentials in texts: what must be out of a text before it is logged, written or shown."""

from __future__ import annotations

import base64
import os
import re
import urllib.parse
import urllib.request
from collections.abc import Iterable

_URL = re.compile(r"https?://[^\s\"'<>]+", re.IGNORECASE)
_USER = re.compile(r"(?<=://)[^/?#]*@")
_TELLING = r"sig|signature|token|secret|password|passwd|pwd|credential|auth|(?:api|access|^)_?-?key"
_PARAMETER = re.compile(rf"(?<=[?&;])([^=&;#]*(?:{_TELLING})[^=&;#]*|key)=[^&;#]*", re.IGNORECASE)
_SECRET_NAME = re.compile(r"secret|token|password|passwd|credential|connection_string", re.I)
_SECRET_VARIABLE = re.compile(r"(SECRET|TOKEN|PASSWORD|PASSWD|_KEY|CREDENTIALS?)$", re.IGNORECASE)
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


def hide_in_url(text: str) -> str:
    """`text` without the credentials that its http(s) addresses hold."""
    return _URL.sub(_bare, text) if "://" in text else text


def _bare(match: re.Match[str]) -> str:
    return _PARAMETER.sub(r"\1=***", _USER.sub("***@", match[0], count=1))


def _in_environment() -> set[str]:
    return {
        value
        for name, value in os.environ.items()
        if len(value) >= _SHORTEST and _SECRET_VARIABLE.search(name) and not os.path.exists(value)
    }


def request(url: str) -> urllib.request.Request:
    """A request for `url`, its user and password as Basic authorisation, for its own host alone."""
    parts = urllib.parse.urlsplit(url)
    user, found, host = parts.netloc.rpartition("@")
    asked = urllib.request.Request(
        urllib.parse.urlunsplit(parts._replace(netloc=host)),
        headers={"User-Agent": "image-features"},
    )
    if found:
        plain = urllib.parse.unquote(user)
        know(plain.partition(":")[2])
        word = base64.b64encode(plain.encode()).decode()
        asked.add_unredirected_header("Authorization", f"Basic {word}")
    return asked
