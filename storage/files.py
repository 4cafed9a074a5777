"""Files by path or URI: local ones by the standard library, gs:// and s3:// by Beam's filesystems.

Beam is imported only when a URI needs it, so that checks of local paths stay quick.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import fnmatch
import glob
import hashlib
import io
import os
import re
import stat
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from storage import s3, temporaries
from storage.errors import RequestError
from storage.retries import attempt

REMOTE = ("gs", "s3")
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://")
_GLOB = re.compile(r"[*?\[]")
_COPY_BYTES = 1 << 20
_TEMPORARY = ".tmp-"  # names that start with a dot are never inputs


@dataclass(frozen=True, slots=True)
class FileInfo:
    """A file that was listed: its path or URI, its size in bytes, and the time of its last change,
    in seconds since 1970, where a store tells it with the list."""

    path: str
    size: int
    changed: float | None = field(default=None, compare=False)


def is_remote(path: str) -> bool:
    """Whether `path` is a URI, not a local path; RequestError for a scheme that we cannot read."""
    match = _SCHEME.match(path)
    if match is None:
        return False
    if match[1].lower() not in REMOTE:
        raise RequestError(
            f"{path}: no filesystem for {match[1]}://; give a local path, gs:// or s3://"
        )
    if not path[match.end() :].strip("/"):
        raise RequestError(f"{path}: names no bucket; give {match[1]}://BUCKET/PATH")
    return True


def absolute(path: str) -> str:
    """`path` as it is listed everywhere: URIs as written, local paths absolute, no `file://`."""
    path = path.removeprefix("file://")
    return path if is_remote(path) else os.path.abspath(os.path.expanduser(path))


def join(base: str, *parts: str) -> str:
    """`parts` below `base`, for paths and URIs alike."""
    return "/".join([base.rstrip("/"), *parts])


def above_glob(pattern: str) -> str:
    """The folder below which all that `pattern` may match lies; itself where it is no glob."""
    glob_free = _GLOB.split(pattern, maxsplit=1)[0]
    return pattern if glob_free == pattern else glob_free.rpartition("/")[0]


def _beam() -> Any:
    from apache_beam.io.filesystems import FileSystems

    s3.share()
    return FileSystems


def beam_options(beam_args: Sequence[str]) -> Any:
    """Beam's flags as its PipelineOptions. Raises RequestError, one line, for what it refuses."""
    from apache_beam.options.pipeline_options import PipelineOptions

    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            options = PipelineOptions(list(beam_args))
            options.get_all_options()
    except SystemExit:  # after its usage, a line a flag
        raise RequestError(told.getvalue().strip().rpartition("error: ")[2]) from None
    return options


def configure_stores(beam_args: Sequence[str]) -> None:
    """Let gs:// and s3:// be reached with the credentials and addresses of Beam's flags.

    Raises RequestError for a value that Beam refuses.
    """
    from apache_beam.internal.gcp.auth import _Credentials
    from apache_beam.options.pipeline_options import GoogleCloudOptions

    options = beam_options(beam_args)
    if options.view_as(GoogleCloudOptions).no_auth:
        # Beam's client of gs:// looks for them all the same, 20 s long where there are none.
        _Credentials._credentials_init, _Credentials._credentials = True, None
    _beam().set_options(options)


def find(pattern: str) -> Iterator[FileInfo]:
    """The files that `pattern` stands for, each once: in the order of their names, and what links
    below a directory lead to behind the rest.

    A file stands for itself, a directory for every regular file below it whose own name does not
    start with `.` or `_`, a glob for the files and directories that it matches; on a store, for the
    objects, and for folders where it matches no object.
    Yields nothing where nothing is there. Raises OSError where listing is refused.
    """
    pattern = absolute(pattern)
    return _find_remote(pattern) if is_remote(pattern) else _find_local(pattern)


def _find_local(pattern: str) -> Iterator[FileInfo]:
    literal = not _GLOB.search(pattern) or _status(pattern, follow=False) is not None
    seen: set[str] = set()
    for path in [pattern] if literal else sorted(_matches("/", pattern.split("/")[1:], set())):
        path = path.rstrip("/") or "/"
        status = _status(path)
        if status is None:
            continue
        for found in _walk(path) if stat.S_ISDIR(status.st_mode) else [path]:
            if found not in seen and (known := _status(found)) and stat.S_ISREG(known.st_mode):
                seen.add(found)
                yield FileInfo(found, known.st_size)


def _status(path: str, follow: bool = True) -> os.stat_result | None:
    """What lies at `path`, None for nothing. Raises OSError where that cannot be told."""
    try:
        return os.stat(path, follow_symlinks=follow)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # a zero byte is in no name
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link to itself
            return None
        raise


def _matches(folder: str, parts: Sequence[str], entered: set[tuple[int, int]]) -> Iterator[str]:
    """The paths below `folder` that a glob's `parts` match, as the glob module has it.

    That passes over folders which cannot be listed; here they raise OSError, for their pictures
    would be missed. `entered`: the folders above, for links may form a ring.
    """
    part, *rest = parts
    status = _status(folder)
    if status is None or not stat.S_ISDIR(status.st_mode):
        return
    if not _GLOB.search(part):
        below = [part] if _status(os.path.join(folder, part), follow=False) else []
    else:
        below = [name for name in os.listdir(folder) if part[0] == "." or name[0] != "."]
    if part == "**":
        here = (status.st_dev, status.st_ino)
        if here in entered:
            return
        if rest:
            yield from _matches(folder, rest, set())
        else:
            yield folder
        for name in below:
            path = os.path.join(folder, name)
            if os.path.isdir(path):
                yield from _matches(path, parts, entered | {here})
            elif not rest:
                yield path
        return
    for name in fnmatch.filter(below, part) if _GLOB.search(part) else below:
        path = os.path.join(folder, name)
        if rest:
            yield from _matches(path, rest, set())
        else:
            yield path


def _walk(folder: str) -> Iterator[str]:
    """The files below `folder`, each folder of them once: by its own name before any link's.

    Links may form a ring, and one that is pointed elsewhere later must not rename what stays.
    """
    entered: set[tuple[int, int]] = set()
    linked = [folder]
    for start in linked:
        for parent, folders, names in os.walk(start, onerror=_raise):
            status = os.stat(parent)
            if (status.st_dev, status.st_ino) in entered:
                folders.clear()
                continue
            entered.add((status.st_dev, status.st_ino))
            folders.sort()
            paths = {name: os.path.join(parent, name) for name in folders}
            links = {name for name, path in paths.items() if os.path.islink(path)}
            linked += [paths[name] for name in folders if name in links]
            folders[:] = [name for name in folders if name not in links]
            yield from (os.path.join(parent, name) for name in sorted(names) if not _hidden(name))


def _raise(error: OSError) -> None:
    raise error


def _hidden(name: str) -> bool:
    return name.startswith((".", "_"))


def _find_remote(pattern: str) -> Iterator[FileInfo]:
    # A name may hold a glob's characters; one look is less than listing twice.
    literal = not _GLOB.search(pattern) or is_file(pattern)
    named = not pattern.endswith("/") and not _is_bucket(pattern)
    pattern = glob.escape(pattern) if literal else pattern
    found = _match_glob(pattern) if named else []
    whole_folder = not found
    if whole_folder:
        found = _match_glob(pattern.rstrip("/") + "/**")
    for info in sorted(found, key=lambda info: info.path):
        name = info.path.rpartition("/")[2]
        if name and not (whole_folder and _hidden(name)):
            yield info


def _match_glob(pattern: str) -> list[FileInfo]:
    """What matches `pattern`, in which `**/` may stand for no folder, as Beam's may not."""
    pattern = re.sub(r"/(\*\*/)+", "/**/", pattern)
    found = _match(pattern.replace("/**/", "/**"))  # that, and more
    if "/**/" not in pattern:
        return found
    from apache_beam.io.filesystem import FileSystem

    within = re.compile(FileSystem.translate_pattern(pattern).replace("/.*/", "/(?:.*/)?"))
    return [info for info in found if within.match(info.path)]


def _match(pattern: str, limit: int | None = None) -> list[FileInfo]:
    try:
        result = _beam().match([pattern], limits=[limit])
    except Exception as error:
        raise _store_error(f"{pattern}: cannot be listed", error) from error
    return [
        FileInfo(meta.path, meta.size_in_bytes, meta.last_updated_in_seconds)
        for meta in result[0].metadata_list
    ]


def _below(folder: str) -> str:
    """What matches all objects below `folder`, whatever characters its name has."""
    return glob.escape(folder.rstrip("/")) + "/**"


def _store_error(path: str, error: Exception) -> OSError:
    """What a store's client raised, which may be of any class, as an OSError that names `path`."""
    absent = type(error).__name__ in ("NotFound", "FileNotFoundError")
    return (FileNotFoundError if absent else OSError)(f"{path}: {' '.join(str(error).split())}")


def occupied(folder: str) -> bool:
    """Whether any object lies under `folder` (or at it); folders of none are nothing."""
    if is_remote(folder):
        # Limits the listing to one page on a large output.
        return bool(_match(_below(folder), limit=1))
    if not os.path.isdir(folder):
        return os.path.lexists(folder)
    for below, folders, names in os.walk(folder, onerror=_raise):
        if names or any(os.path.islink(os.path.join(below, name)) for name in folders):
            return True
    return False  # empty folders, which a killed run leaves, are no objects


def _is_bucket(path: str) -> bool:
    """Whether the URI `path` names a bucket and nothing in it."""
    return not path.partition("://")[2].partition("/")[2].strip("/")


def is_file(path: str) -> bool:
    """Whether a file (or object) lies at `path`."""
    if not is_remote(path):
        return os.path.isfile(path)
    if _is_bucket(path):  # Beam's clients would try again for minutes
        return False
    try:
        return bool(_beam().exists(path))
    except Exception as error:
        raise _store_error(path, error) from error


def list_folder(folder: str) -> list[FileInfo]:
    """Every file right in or below `folder`, hidden ones too; empty where it does not exist."""
    if is_remote(folder):
        return _match(_below(folder))
    # What vanishes meanwhile (another run renames its temporaries) was none.
    found = ((str(path), _status(str(path))) for path in sorted(Path(folder).rglob("*")))
    return [FileInfo(path, s.st_size) for path, s in found if s and stat.S_ISREG(s.st_mode)]


def size_of(path: str) -> int:
    """Bytes of the file at `path`. Raises OSError."""
    if not is_remote(path):
        return os.path.getsize(path)
    found = _match(glob.escape(path))
    if not found:
        raise FileNotFoundError(f"{path}: nothing is there")
    return found[0].size


def open_read(path: str) -> BinaryIO:
    """`path` opened for reading its bytes as they are. Raises OSError."""
    if not is_remote(path):
        return open(path, "rb")
    from apache_beam.io.filesystem import CompressionTypes

    try:
        handle = _beam().open(
            path, "application/octet-stream", compression_type=CompressionTypes.UNCOMPRESSED
        )
    except Exception as error:
        raise _store_error(path, error) from error
    return cast(BinaryIO, handle)


def read_bytes(path: str) -> bytes:
    """All bytes of `path`. Raises OSError."""
    with open_read(path) as stream:
        return stream.read()


class NewFile:
    """A file that appears under its name whole and closed, or not at all.

    Local: written beside its name, synced to the disk and renamed; locked meanwhile, so that
    `abandoned` can tell it from what a killed process left. gs:// and s3://: written to local disk
    and uploaded on `close`, since closing a stream after an error would publish its beginning.
    `size` and `sha256` tell of what has been written so far.
    """

    def __init__(self, path: str):
        self.path = path
        self.size = 0
        self._hash = hashlib.sha256()
        self._temporary: str | None = None
        self._handle: IO[bytes]
        if is_remote(path):
            self._handle = tempfile.TemporaryFile()  # noqa: SIM115
        else:
            folder, name = os.path.split(path)
            _make_folder(folder)
            self._temporary = os.path.join(folder, f"{_TEMPORARY}{uuid.uuid4().hex[:8]}-{name}")
            with temporaries.making:
                temporaries.track(self._temporary)
                self._handle = open(self._temporary, "wb")  # noqa: SIM115 - closed by close or abort
            with contextlib.suppress(OSError):  # a filesystem without locks
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)

    @property
    def sha256(self) -> str:
        """SHA-256 of the bytes so far, lower-case hex."""
        return self._hash.hexdigest()

    def write(self, data: Any) -> int:
        """Append `data`, anything with a buffer; returns its size in bytes."""
        view = memoryview(data).cast("B")
        self._handle.write(view)
        self._hash.update(view)
        self.size += len(view)
        return len(view)

    def flush(self) -> None:
        """Nothing to do before `close`; file-like callers expect the method."""

    @property
    def closed(self) -> bool:
        """Whether `close` or `abort` was called."""
        return self._handle.closed

    def close(self) -> None:
        """Make the file appear under its name, lastingly. Raises OSError; then nothing appears."""
        if self.closed:
            return
        try:
            if self._temporary is None:
                try:
                    attempt(self._upload, self.path)
                except Exception as error:
                    if self.path in str(error):
                        raise
                    raise _store_error(self.path, error) from error
            else:
                self._handle.flush()
                os.fsync(self._handle.fileno())
            self._handle.close()
            if self._temporary is not None:
                os.replace(self._temporary, self.path)
                temporaries.forget(self._temporary)
                _sync_folder(os.path.dirname(self.path))
        except BaseException:
            self.abort()
            raise

    def _upload(self) -> None:
        from apache_beam.io.filesystem import CompressionTypes

        self._handle.seek(0)
        target = _beam().create(
            self.path, "application/octet-stream", compression_type=CompressionTypes.UNCOMPRESSED
        )
        try:
            while chunk := self._handle.read(_COPY_BYTES):
                target.write(chunk)
            target.close()
        except BaseException:
            _spoil(target)
            raise

    def abort(self) -> None:
        """Forget the file; nothing appears."""
        try:
            self._handle.close()
        except OSError:
            pass  # a full disk refuses the last flush, and the bytes are not wanted
        if self._temporary is not None:
            Path(self._temporary).unlink(missing_ok=True)
            temporaries.forget(self._temporary)


class _Nowhere:
    """Takes an upload's bytes and does nothing."""

    def put(self, data: Any) -> None:
        """Nothing."""

    def finish(self) -> None:
        """Nothing."""


def _spoil(target: Any) -> None:
    """Keep a stream that failed from publishing what came so far.

    It would try once more when it is closed, by the garbage collector at the latest, at any time
    and in any thread.
    """
    raw: Any = getattr(target, "raw", None)
    if hasattr(raw, "_uploader"):  # s3://, which keeps and bills the parts that it has
        begun, raw._uploader = raw._uploader, _Nowhere()
        with contextlib.suppress(Exception):
            begun._client.client.abort_multipart_upload(
                Bucket=begun._bucket, Key=begun._name, UploadId=begun.upload_id
            )
    if hasattr(target, "terminate"):  # gs://
        with contextlib.suppress(Exception):  # the store forgets by itself what it is not told of
            target.terminate()
        target._buffer.close()


def _make_folder(folder: str) -> None:
    """Make `folder` and what is missing above it, lastingly."""
    if not os.path.isdir(folder):
        above = os.path.dirname(folder)
        _make_folder(above)
        os.makedirs(folder, exist_ok=True)
        _sync_folder(above)


def _sync_folder(folder: str) -> None:
    """Let the names in `folder` outlast a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # folders that cannot be synced
            raise
    finally:
        os.close(handle)


def abandoned(path: str) -> bool:
    """Whether nobody writes at `path` any more, a temporary of `NewFile`; True for others."""
    if is_remote(path) or not os.path.basename(path).startswith(_TEMPORARY):
        return True
    try:
        with open(path, "rb") as handle:
            # Shared, which the writer's lock keeps out too; NFS gives no other to a mere reader.
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # gone, or on a filesystem without locks
    return True


@contextlib.contextmanager
def alone(folder: str) -> Iterator[None]:
    """No other process is in here for the same local `folder`; a killed one holds nobody up.

    On a store, and where the filesystem knows no locks, it keeps nobody out.
    """
    if is_remote(folder):
        yield
        return
    _make_folder(folder)
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def write_bytes(path: str, data: bytes) -> None:
    """`data` at `path`, whole or not at all: a rename on a local disk, one upload to a store."""
    write_pieces(path, [data])


def write_pieces(path: str, pieces: Iterable[Any]) -> None:
    """`pieces`, one after the other, at `path`, whole or not at all. Raises OSError."""
    file = NewFile(path)
    try:
        for piece in pieces:
            file.write(piece)
        file.close()
    except BaseException:
        file.abort()
        raise


def delete(paths: list[str]) -> None:
    """Remove the files at `paths`; what is gone already is no error."""
    remote = [path for path in paths if is_remote(path)]
    for path in set(paths) - set(remote):
        Path(path).unlink(missing_ok=True)
    if remote:  # a store may refuse single ones of many for a moment
        attempt(lambda: _delete_remote(remote), remote[0])


def _delete_remote(paths: list[str]) -> None:
    # Beam takes a name in gs:// for a glob here, and would remove all that it matches.
    globs = [glob.escape(path) if path.lower().startswith("gs://") else path for path in paths]
    try:
        _beam().delete(globs)
    except Exception as error:
        if any(map(is_file, paths)):  # else another has deleted them meanwhile
            raise _store_error(paths[0], error) from error


def check_writable(folder: str, flag: str = "--output") -> None:
    """Raise RequestError unless a file can be made in `folder`, of `flag`; leaves no trace."""
    made: list[Path] = []
    probe = join(folder, f"{_TEMPORARY}probe-{uuid.uuid4().hex[:8]}")
    try:
        if not is_remote(folder):
            path = Path(folder)
            made = [p for p in [path, *path.parents] if not p.exists()]
            path.mkdir(parents=True, exist_ok=True)
        write_bytes(probe, b"probe")
        delete([probe])
    except Exception as error:  # Beam's stores raise classes of their own
        raise RequestError(
            f"{flag} {folder}: cannot be written ({error}); there would be nowhere to put what is "
            "made; give a folder that you may write to"
        ) from None
    finally:
        for path in made:
            try:
                path.rmdir()
            except OSError:
                pass  # never made, or another run has begun to use it


def version(path: str) -> str:
    """A text that changes when the file at `path` does: its size and time of change."""
    if not is_remote(path):
        status = os.stat(path)
        return f"{status.st_size} {status.st_mtime_ns}"
    found = _match(glob.escape(path))
    if not found:
        raise FileNotFoundError(f"{path}: nothing is there")
    return f"{found[0].size} {found[0].changed}"
