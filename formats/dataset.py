"""An output directory, and the commit of a run to it.

manifest.json            the commit: a reader goes by it alone
_SUCCESS                 written last
features/part-*.parquet  failures/part-*.parquet
_failed/RUN_ID/          what a run left that had too many failures
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

from formats.digests import standing
from formats.manifest import FORMAT_VERSION, read_manifest, replaceable_manifest, write_manifest
from formats.parts import FAILURES, FEATURES, PartFile, describe_part, list_parts, of_each
from formats.settling import settle, still_failed
from storage import files, steady
from storage.errors import RequestError, RunError


@dataclass(frozen=True)
class Publication:
    """What the commit needs to know of the run besides its files.

    `replaces`: run id of the manifest that was there when the run began, None where none was.
    `described`: the manifest's fields that are known before the run (options, model, ...).
    `kept`: data files of earlier runs that stay (resume), relative paths; `retried`: failures of
    which those stay that were not tried again, and `reread`: digests of the sources that were read
    whole for it. `retired`: data files of killed runs to delete after the commit.
    """

    output: str
    run_id: str
    _: KW_ONLY
    if_exists: str
    replaces: str | None
    max_failure_rate: float
    compression: str
    described: Mapping[str, Any]
    kept: tuple[str, ...] = ()
    retried: tuple[str, ...] = ()
    reread: bytes = b""
    retired: tuple[str, ...] = ()


def publish(
    run: Publication,
    written: Iterable[PartFile],
    skipped: int,
    timing: Callable[[], Mapping[str, Any]],
) -> dict[str, Any]:
    """Settle, judge and commit a run; returns its verdict. Repeating it changes nothing.

    The verdict: {"status": "complete" or "too_many_failures", "run": {images, features, failures,
    skipped}}. Raises RunError where another run has published in the meantime, and where files are
    gone or changed that this run counts on. On a local disk one run commits at a time; on a store
    the last of two that write their manifest at once wins, and the other finds that out, or that
    what it named is gone.
    """
    with files.alone(run.output):
        return _publish(run, list(written), skipped, timing)


def _publish(
    run: Publication,
    written: Sequence[PartFile],
    skipped: int,
    timing: Callable[[], Mapping[str, Any]],
) -> dict[str, Any]:
    before = replaceable_manifest(run.output, run.if_exists)
    if before and before["run_id"] == run.run_id:  # a retried commit
        _finish(run, before)
    there = list_parts(run.output)
    ours = _written_by(run, there)
    listed = {entry["path"]: entry for entry in before["files"]} if before else {}
    verdict = read_verdict(run.output, run.run_id)
    if verdict:
        # What an attempt after the commit has written is named nowhere; but a manifest that came
        # since `before` was read, of another attempt, may name what lies there.
        if verdict["status"] != "complete" or (before and before["run_id"] == run.run_id):
            _delete(run, ours - set(listed))
        return verdict
    fresh = sorted(written, key=lambda part: part.path)
    if before and before["run_id"] != run.replaces and run.if_exists != "overwrite":
        _delete(run, ours - set(listed))
        raise RunError(
            f"{run.output}: run {before['run_id']} has published here since this run began; its "
            "data were not touched and this run's were dropped; --if_exists resume goes on from "
            "it, or give another --output"
        )
    doomed = set(before.get("superseded", ())) if before else set()
    gone = {part.path for part in fresh} - (ours - doomed)
    if gone:
        raise RunError(
            f"{run.output}: {min(gone)} of this run is gone; another run has replaced it, or a "
            "person has deleted it; nothing was published"
        )
    if lost := {*run.kept, *run.retried} - set(there):
        raise RunError(f"{run.output}: {min(lost)} is gone, which this run goes on from")

    def describe(path: str) -> PartFile:
        return describe_part(run.output, path, there[path], listed.get(path))

    kept, retried = (
        list(of_each(run.output, describe, paths)) for paths in (run.kept, run.retried)
    )
    still, tried_again = still_failed(
        run.output, retried, fresh, run.reread, run.run_id, run.compression
    )
    # What a killed run left was never judged.
    adopted = [part for part in kept if part.path not in listed]
    kept += still
    earlier, new = settle(run.output, kept, fresh, run.run_id, run.compression)
    parts = [*earlier, *new]
    there = list_parts(run.output)
    ours = _written_by(run, there)
    counts = _counts(new)
    this_run = {**counts, "images": counts["images"] + skipped, "skipped": skipped}
    # What had failed before and fails again makes the output no worse.
    again = len(standing(tried_again, [part.keys for part in new if part.kind == FAILURES]))
    judged = _counts([*adopted, *new])
    failed, taken_on = judged["failures"] - again, judged["images"] - again
    if taken_on and failed / taken_on > run.max_failure_rate:
        failures = [part for part in [*adopted, *new] if part.kind == FAILURES]
        told = _manifest(run, "too_many_failures", failures, this_run, (), timing)
        told["judged"] = {"failures": failed, "images": taken_on}
        # What was adopted of them is told there too, and the next run may try it again.
        taken_back = ours | {part.path for part in failures}
        return _reject(run, failures, told, taken_back - set(listed))
    final = {part.path for part in parts}
    superseded = {*listed, *run.kept, *run.retried, *doomed, *ours} & set(there) | set(run.retired)
    manifest = _manifest(run, "complete", parts, this_run, superseded - final, timing)
    now = replaceable_manifest(run.output, run.if_exists)
    if _run_id(now) != _run_id(before):  # of a run on a store, just now
        return _publish(run, written, skipped, timing)
    write_manifest(run.output, manifest)
    _finish(run, manifest)
    return {"status": "complete", "run": this_run}


def _manifest(
    run: Publication,
    status: str,
    parts: Iterable[PartFile],
    this_run: Mapping[str, int],
    superseded: Iterable[str],
    timing: Callable[[], Mapping[str, Any]],
) -> dict[str, Any]:
    reasons: Counter[str] = Counter()
    for part in parts:
        reasons.update(part.reasons)
    return {
        "format_version": FORMAT_VERSION,
        "run_id": run.run_id,
        "status": status,
        **run.described,
        "counts": _counts(parts),
        "run": this_run,
        "failures_by": dict(sorted(reasons.items())),
        "files": [part.listed() for part in sorted(parts, key=lambda part: part.path)],
        "superseded": sorted(superseded),
        "timing": dict(timing()),
    }


def _run_id(manifest: Mapping[str, Any] | None) -> str | None:
    return str(manifest["run_id"]) if manifest else None


def _counts(parts: Iterable[PartFile]) -> dict[str, int]:
    rows = {FEATURES: 0, FAILURES: 0}
    for part in parts:
        rows[part.kind] += part.rows
    return {"images": sum(rows.values()), **rows}


def _finish(run: Publication, manifest: Mapping[str, Any]) -> None:
    """After the manifest: the marker, then what it no longer names.

    RunError where another run's has taken its place: then only this run's files are to go. And
    where a file is gone that it names, as another run that was publishing may take it away.
    """
    now = read_manifest(run.output)
    there = list_parts(run.output)
    named = {entry["path"] for entry in now["files"]} if now else set()
    if _run_id(now) != run.run_id:
        _delete(run, _written_by(run, there) - named)
        raise RunError(f"{run.output}: run {_run_id(now)} has published over this one")
    if lost := named - set(there):
        raise RunError(
            f"{run.output}: {min(lost)} is gone, which another run replaced while this one was "
            "published, so that the output is not whole; run it again with --if_exists overwrite"
        )
    # Not empty: Beam's s3:// client cannot make an empty object.
    files.write_bytes(files.join(run.output, "_SUCCESS"), f"{run.run_id}\n".encode())
    _delete(run, manifest["superseded"])


def _written_by(run: Publication, there: Iterable[str]) -> set[str]:
    """What of `there` is this run's, of bundles that were tried again or lost too."""
    return {path for path in there if f"part-{run.run_id}-" in path}


def _delete(run: Publication, paths: Iterable[str]) -> None:
    full = (files.join(run.output, path) for path in sorted({*paths, finished_name(run.run_id)}))
    files.delete([path for path in full if files.abandoned(path)])


def finished_name(run_id: str) -> str:
    """Where below its output run `run_id` keeps for its workers what they need not do again."""
    return f"_run-{run_id}.finished"


def _reject(
    run: Publication,
    failures: Sequence[PartFile],
    manifest: Mapping[str, Any],
    taken_back: set[str],
) -> dict[str, Any]:
    """Keep `failures` readable under `_failed/RUN_ID/`, an output of its own with `manifest`.

    The files `taken_back` are deleted: what the run has written, and what it keeps there.
    """
    folder = files.join(run.output, "_failed", run.run_id)
    for part in failures:
        data = steady.read_bytes(files.join(run.output, part.path), part.bytes)
        files.write_bytes(files.join(folder, part.path), data)
    write_manifest(folder, manifest)
    _delete(run, taken_back)
    return {"status": manifest["status"], "run": manifest["run"]}


def read_verdict(output: str, run_id: str) -> dict[str, Any] | None:
    """What became of run `run_id`: as `publish` returned it, None where it never committed."""
    for folder in (output, files.join(output, "_failed", run_id)):
        manifest = None
        with contextlib.suppress(RequestError):  # what cannot be read is no verdict
            manifest = read_manifest(folder)
        if manifest and manifest["run_id"] == run_id:
            return {"status": manifest["status"], "run": manifest["run"]}
    return None
