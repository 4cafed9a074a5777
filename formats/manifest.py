"""manifest.json, the commit of an output: a reader goes by it alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from formats import table
from storage import files, steady
from storage.errors import RequestError

FORMAT_VERSION = 1
# What is relied on of a manifest, and of each file in it.
_FIELDS: dict[str, type] = {
    "run_id": str,
    "status": str,
    "counts": dict,
    "failures_by": dict,
    "run": dict,
    "files": list,
}
_ENTRY: dict[str, type] = {"path": str, "rows": int, "bytes": int, "sha256": str}


class NewerVersion(RequestError):
    """A manifest that a newer version of this program wrote."""


def read_manifest(output: str) -> dict[str, Any] | None:
    """The manifest of `output`, None where there is none. RequestError where it cannot be used."""
    path = files.join(output, "manifest.json")
    if not files.is_file(path):
        return None
    try:
        manifest = json.loads(steady.read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path}: not a manifest ({error}); its data cannot be read") from None
    check_version(path, manifest)
    try:
        check_fields(manifest)
    except (ValueError, KeyError, TypeError) as error:
        raise RequestError(
            f"{path}: not a manifest ({type(error).__name__}: {str(error)[:200]}); its data cannot "
            "be read"
        ) from None
    return dict(manifest)


def replaceable_manifest(output: str, if_exists: str) -> dict[str, Any] | None:
    """As `read_manifest`, but None too for one that cannot be used and is to be overwritten.

    Not of a newer version: which files it names is not known, and they would stay.
    """
    try:
        return read_manifest(output)
    except NewerVersion:
        raise
    except RequestError:
        if if_exists != "overwrite":
            raise
        return None


def check_fields(manifest: Mapping[str, Any]) -> None:
    """Raise KeyError or TypeError unless `manifest` has all that is relied on, of its type."""
    for fields, types in [(manifest, _FIELDS), *((e, _ENTRY) for e in manifest["files"])]:
        for name, kind in types.items():
            if not isinstance(fields[name], kind):
                raise TypeError(f"{name} is no {kind.__name__}")


def check_version(path: str, manifest: Mapping[str, Any]) -> None:
    """Raise RequestError unless this program reads the version of the manifest at `path`."""
    version = manifest.get("format_version") if isinstance(manifest, Mapping) else None
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise RequestError(
            f"{path}: not a manifest, for it has no format_version that is a number; its data "
            "cannot be read"
        )
    if version > FORMAT_VERSION:
        raise NewerVersion(
            f"{path}: format_version {version} is newer than {FORMAT_VERSION}, which this version "
            "reads; use a newer version of this program"
        )


def write_manifest(folder: str, manifest: Mapping[str, Any]) -> None:
    """Commit `manifest` as the one of `folder`, in one go. Raises OSError."""
    text = json.dumps(table.utf8_within(manifest), indent=1, ensure_ascii=False)
    files.write_bytes(files.join(folder, "manifest.json"), text.encode())
