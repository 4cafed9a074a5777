"""Any model handle -> a local directory that holds a model. No TensorFlow here.

What is fetched is kept under `$IMAGE_FEATURES_CACHE` (else `~/.cache/image-features`), one folder a
handle, which appears by a rename once it is whole. Nobody waits for anybody: two processes that
want one model both fetch it, and the second finds the first's in place.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import hashlib
import http.client
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from models.archives import ArchiveError, unpack
from models.catalog import HUB_MODELS, NETWORKS
from storage import files, secrets, temporaries
from storage.errors import RequestError

SAVED_MODEL, HUB_V1, PREPARED = "saved_model", "hub_v1", "prepared"
PREPARED_FILE = "prepared.json"
_MARKERS = {"tfhub_module.pb": HUB_V1, "saved_model.pb": SAVED_MODEL, PREPARED_FILE: PREPARED}
_KAGGLE = re.compile(
    r"https?://(?:www\.)?kaggle\.com/(?:api/v1/)?models/(?P<owner>[^/?]+)/(?P<model>[^/?]+)/"
    r"(?:frameworks/)?(?P<framework>[^/?]+)/(?:variations/)?(?P<variation>[^/?]+)/"
    r"(?:versions/)?(?P<version>\d+)(?:/download)?/?(?:\?.*)?",
    re.IGNORECASE,
)
_KAGGLE_SHORT = re.compile(
    r"(?P<owner>[\w-]+)/(?P<model>[\w.-]+)/(?P<framework>tensorFlow[12])/(?P<variation>[\w.-]+)/"
    r"(?P<version>\d+)",
    re.IGNORECASE,
)
_ARCHIVE = (".tar.gz", ".tgz")
_TRIES = 3
_PAUSE_SECONDS = 0.5  # before the second try, and longer before each further one
_STALL_SECONDS = 30.0  # without a byte, or at less than the slowest, after which a try is given up
_SLOWEST = 1 << 10  # bytes a second
_LONGEST_SECONDS = 3600.0  # of one try, however steadily it comes
_BUSY = (408, 429)  # beside 5xx, the answers that ask for another try
_STALE_SECONDS = 86400.0  # after which what a killed process left in the cache is removed
_CHUNK = 1 << 20


def model_format(directory: str) -> str:
    """`hub_v1`, `saved_model` or `prepared`, by the files in `directory`. RequestError for none."""
    if not os.path.isdir(directory):
        near = difflib.get_close_matches(os.path.basename(directory), NETWORKS, n=1, cutoff=0.8)
        hint = f" (did you mean {near[0]}?)" if near else ""
        found = "a file, and no .tar.gz" if os.path.isfile(directory) else "no such directory"
        raise RequestError(
            f"--model {directory}: {found}{hint}; give a folder with a saved_model.pb, such as "
            "`python -m pipeline.models export` writes, or a handle of the hub"
        )
    for name, kind in _MARKERS.items():
        if os.path.isfile(os.path.join(directory, name)):
            if kind == HUB_V1 and not os.path.isfile(os.path.join(directory, "saved_model.pb")):
                continue
            return kind
    raise RequestError(
        f"--model {directory}: holds no saved_model.pb, so no model; give the folder itself that "
        "holds it"
    )


def archive_url(handle: str) -> str | None:
    """The address of the archive that a web handle names, None for a handle of another kind.

    A catalogue name stands for the newest classification model of its network on tfhub.dev. Raises
    RequestError for a web page that is no model.
    """
    if handle in NETWORKS and not (NETWORKS[handle].hub_versions or not os.path.isdir(handle)):
        return None  # a folder of that name, and nothing on the hub
    if handle in NETWORKS:
        published = [m for m in HUB_MODELS.values() if m.network.name == handle]
        if not published:
            raise RequestError(
                f"--model {handle}: was never published; make it with `python -m pipeline.models "
                "export --checkpoint` and give its directory"
            )
        handle = max(published, key=lambda m: (m.head == "classification", m.version)).handle
    web = handle.startswith(("http://", "https://"))
    kaggle = (_KAGGLE if web else _KAGGLE_SHORT).fullmatch(handle)
    if not web and (kaggle is None or os.path.isdir(handle)):
        return None
    if kaggle:
        path = "/".join(kaggle[name] for name in ("owner", "model", "framework", "variation"))
        return f"https://www.kaggle.com/api/v1/models/{path}/{kaggle['version']}/download"
    bare = handle.partition("?")[0].rstrip("/")
    if bare.endswith(_ARCHIVE):
        return handle
    if re.match(r"https?://(www\.)?tfhub\.dev/.+/\d+$", bare):
        return f"{bare}?tf-hub-format=compressed"
    raise RequestError(
        f"--model {handle}: not a model's address; give a tfhub.dev or Kaggle handle with its "
        "version, or the address of a .tar.gz"
    )


def resolve(handle: str, sha256: str | None = None) -> str:
    """The local directory of the model that `handle` names: its absolute path, fetched if need be.

    `sha256` (lower-case hex) is the digest that its archive must have. Raises RequestError, one
    line, where there is none, it cannot be reached, or it is cut or altered.
    """
    url = archive_url(handle)
    path = handle if url else files.absolute(handle)
    try:
        if url:
            return _cached(handle, url, sha256)
        if path.endswith(_ARCHIVE) and (files.is_remote(path) or os.path.isfile(path)):
            return _cached(f"{path} {files.version(path)}", path, sha256)
        if sha256:
            raise RequestError(
                f"--model_sha256: the digest of an archive, but {handle} is a directory"
            )
        if files.is_remote(path):
            return _cached_folder(path)
    except RequestError:
        raise
    except (ValueError, OSError, http.client.HTTPException) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise RequestError(f"--model {handle}: cannot be had ({reason})") from None
    model_format(path)
    return path


# --- the cache ---------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where fetched models are kept."""
    if chosen := os.environ.get("IMAGE_FEATURES_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"  # which may not be known
    return Path(base) / "image-features"


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    """A folder in the cache for what is on its way, removed at the end."""
    cache = cache_folder()
    with contextlib.ExitStack() as stack:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            scratch = stack.enter_context(temporaries.scratch(cache, ".tmp-"))
        except OSError as error:
            raise RequestError(
                f"--model: cannot be kept in {cache} ({error}); set IMAGE_FEATURES_CACHE to a "
                "folder that you may write to"
            ) from None
        for left in cache.glob(".tmp-*"):
            with contextlib.suppress(OSError):
                if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                    shutil.rmtree(left, ignore_errors=True)
        yield scratch


def _cached(identity: str, address: str, sha256: str | None) -> str:
    """The unpacked archive at `address`; `identity` is what it is known by in the cache.

    What is there once is never replaced, since somebody may be reading it: where the archive at
    `address` has changed, the one with the digest `sha256` lies beside the first.
    """
    places = [_place(identity)]
    if sha256:
        places.append(_place(f"{identity} {sha256}"))
    for place in places:
        if _digest(place) and sha256 in (None, _digest(place)):
            return _model_below(place / "model")
    with _scratch() as scratch:
        archive = scratch / "archive"
        found = _fetch(address, archive)
        if sha256 not in (None, found):
            raise RequestError(
                f"--model_sha256 {sha256}: the archive at {address} has {found}; it is another "
                "file than the one you trust"
            )
        whole = scratch / "whole"
        whole.mkdir()
        unpack(archive, whole / "model")
        _model_below(whole / "model")
        (whole / "archive.sha256").write_text(found)
        for place in places:
            _settle(whole, place)
            if _digest(place) == found or not sha256:
                return _model_below(place / "model")
    raise OSError(f"{place} in the cache is damaged; remove it")


def _place(identity: str) -> Path:
    return cache_folder() / hashlib.sha256(identity.encode()).hexdigest()


def _digest(place: Path) -> str | None:
    """The digest of the archive that lies unpacked at `place`; None where there is none."""
    try:
        return (place / "archive.sha256").read_text()
    except OSError:
        return None


def _settle(whole: Path, place: Path) -> None:
    """Put the folder `whole` at `place` by a rename, unless something is there already."""
    try:
        whole.rename(place)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise


def _model_below(folder: Path) -> str:
    """The folder itself, or the only one in it, whichever holds a model."""
    inner = list(folder.iterdir())
    if len(inner) == 1 and inner[0].is_dir():
        folder = inner[0]
    if not any((folder / name).is_file() for name in ("saved_model.pb", PREPARED_FILE)):
        raise ArchiveError("it holds no saved_model.pb, so no model")
    return str(folder)


def _cached_folder(uri: str) -> str:
    """The files below `uri` (gs:// or s3://) as a local directory."""
    uri = uri.rstrip("/")
    listed = [info for info in files.list_folder(uri) if not info.path.endswith("/")]
    if not listed:
        raise RequestError(f"--model {uri}: nothing is there")
    stamp = "\n".join(f"{info.path} {info.size} {info.changed}" for info in listed)
    place = _place(f"{uri}\n{stamp}")
    if not place.is_dir():
        with _scratch() as scratch:
            for info in listed:
                name = info.path.removeprefix(f"{uri}/")
                if ".." in name.split("/"):
                    raise OSError(f"{info.path} would lie outside the model")
                target = scratch / "model" / name
                target.parent.mkdir(parents=True, exist_ok=True)
                with files.open_read(info.path) as source:
                    _copy(source.read, target)
                if target.stat().st_size != info.size:
                    raise OSError(f"{info.path} was cut on its way")
            _model_below(scratch / "model")
            _settle(scratch / "model", place)
    return _model_below(place)


# --- fetching ----------------------------------------------------------------------------------


def _fetch(address: str, target: Path) -> str:
    """Copy what lies at `address` to `target`; returns its SHA-256. Raises OSError."""
    if not address.startswith(("http://", "https://")):
        with files.open_read(address) as source:
            return _copy(source.read, target)
    for tried in range(1, _TRIES + 1):
        try:
            return _download(address, target)
        except urllib.error.HTTPError as error:
            if (error.code < 500 and error.code not in _BUSY) or tried == _TRIES:
                raise OSError(f"{address} answers {error.code} {error.reason}") from None
        except urllib.error.URLError as error:
            # No name or no route does not mend itself in seconds.
            raise OSError(f"{address} cannot be reached: {error.reason}") from None
        except (OSError, http.client.HTTPException):
            if tried == _TRIES:
                raise
        time.sleep(_PAUSE_SECONDS * tried)
    raise AssertionError("unreachable")


def _download(address: str, target: Path) -> str:
    with urllib.request.urlopen(secrets.request(address), timeout=_STALL_SECONDS) as response:
        announced = response.length
        digest = _copy(response.read1, target, _SLOWEST)
    if announced is not None and target.stat().st_size != announced:
        raise OSError(f"{address} sent {target.stat().st_size} of {announced} bytes")
    return digest


def _copy(read: Callable[[int], bytes], target: Path, slowest: int = 0) -> str:
    """Write what `read` gives to `target`; returns its SHA-256."""
    digest = hashlib.sha256()
    started, size = time.monotonic(), 0
    with target.open("wb") as file:
        while chunk := read(_CHUNK):
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
            seconds = time.monotonic() - started
            too_slow = seconds > _STALL_SECONDS and size < slowest * seconds
            if too_slow or seconds > _LONGEST_SECONDS:
                raise TimeoutError(f"only {size} bytes came in {seconds:.0f} s")
    return digest.hexdigest()
