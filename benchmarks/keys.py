"""Resume and commit with millions of keys: how long, and how much memory.

    python -m benchmarks.keys --rows 10000000 --rows_per_file 30000 --folder /tmp/keys

Makes an output of synthetic rows with vectors of two numbers (which resuming does not read), then
resumes it and commits 1000 rows more. Each phase runs in a process of its own; a line of JSON each,
memory in MiB at its peak, and of that what Python and the imports take (`imports_mib`; the digests
that a commit is given are not among it).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from formats import dataset, resuming, table
from formats.dataset import Publication
from formats.manifest import read_manifest
from formats.parts import PartFile, PartWriter
from formats.table import TableSpec

RECORDS = 10_000  # in one container
FRESH = 1000  # rows that the resumed run adds
ASKED = 100_000  # keys that are looked up
TOLD = "_parts"  # what the commit is told, which on an engine flows through the graph
ROWS = {"model": "m"}
SPEC = TableSpec(
    {"embedding": 2},
    metadata=table.metadata_text({"model_fingerprint": "m", resuming.ROW_META: ROWS}),
)


def batch_of(start: int, count: int, ids: bool) -> pa.RecordBatch:
    """Rows `start` to `start + count` as the job would write them, with ids or URI#index as key."""
    numbers = range(start, start + count)
    sources = [f"gs://bucket/data/train-{n // RECORDS:06}.tfrecord" for n in numbers]
    keys = [f"id-{n:012}" for n in numbers] if ids else [
        f"{source}#{n % RECORDS}" for source, n in zip(sources, numbers, strict=True)
    ]  # fmt: skip
    schema = SPEC.schema()
    flat = pa.array(np.zeros(2 * count, np.float32))
    offsets = pa.array(np.arange(count + 1, dtype=np.int32) * 2)
    columns = {
        "key": pa.array(keys),
        "source": pa.array(sources),
        "record_index": pa.array([n % RECORDS for n in numbers]),
        "sha256": pa.array([f"{n:064x}" for n in numbers]),
        "width": pa.array(np.full(count, 1, np.int32)),
        "height": pa.array(np.full(count, 1, np.int32)),
        "label": pa.nulls(count, schema.field("label").type),
        "embedding": pa.ListArray.from_arrays(offsets, flat, type=schema.field("embedding").type),
    }
    return pa.RecordBatch.from_arrays([columns[name] for name in schema.names], schema=schema)


def write(
    output: str, run_id: str, start: int, stop: int, a_file: int, ids: bool
) -> list[PartFile]:
    """Data files of run `run_id` with rows `start` to `stop`, `a_file` in each."""
    parts = []
    for at in range(start, stop, a_file):
        writer = PartWriter(output, "features", f"part-{run_id}-{at:012}", SPEC.schema(), "zstd")
        end = min(at + a_file, stop)
        for row in range(at, end, 10_000):
            writer.write(batch_of(row, min(10_000, end - row), ids))
        parts.append(writer.close())
    return parts


def published(output: str, run_id: str, parts: list[PartFile], **changes: object) -> None:
    """Commit `parts`."""
    described = {"model": {"fingerprint": "m", "outputs": {"embedding": 2}}}
    given = {"if_exists": "error", "replaces": None, **changes}
    run = Publication(
        output, run_id, max_failure_rate=1.0, compression="zstd", described=described,
        **given,  # type: ignore[arg-type]
    )  # fmt: skip
    dataset.publish(run, parts, 0, dict)


def timed(what: str, function: Callable[[], object], **told: object) -> None:
    """Call `function` and tell its seconds, and this process's memory before and at its peak."""
    before, started, cpu = peak(), time.perf_counter(), time.process_time()
    function()
    seconds = round(time.perf_counter() - started, 1)
    line = {
        "what": what,
        "seconds": seconds,
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "imports_mib": before,
        "peak_mib": peak(),
        **told,
    }
    print(json.dumps(line), flush=True)


def peak() -> int:
    """Most memory of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def phase_write(output: str, rows: int, a_file: int, ids: bool) -> None:
    """What workers do; the commit is told of the files."""
    parts = write(output, "r1", 0, rows, a_file, ids)
    Path(f"{output}/{TOLD}").write_bytes(pickle.dumps(parts))


def phase_commit(output: str, rows: int, a_file: int, ids: bool) -> None:
    """The commit of a new output."""

    def work() -> None:
        with open(f"{output}/{TOLD}", "rb") as stream:
            parts = pickle.load(stream)
        published(output, "r1", parts)

    timed("commit of new rows", work, files=-(-rows // a_file))
    print(json.dumps({"manifest_bytes": os.path.getsize(f"{output}/manifest.json")}), flush=True)


def phase_resume(output: str, rows: int, a_file: int, ids: bool) -> None:
    """What a launcher does."""
    from transforms.sources import Finished

    def work() -> None:
        found = resuming.resume(output, read_manifest(output), ROWS)
        Finished.write(f"{output}/_run-r2.finished", found.finished)
        assert len(found.kept) == -(-rows // a_file)

    timed("resume", work)


def phase_look_up(output: str, rows: int, a_file: int, ids: bool) -> None:
    """What a worker does."""
    from transforms.sources import Finished

    asked: Iterator[int] = itertools.chain(
        np.random.default_rng(0).integers(0, rows, ASKED // 2).tolist(),
        range(rows, rows + ASKED // 2),
    )
    places = []
    for n in asked:
        source = f"gs://bucket/data/train-{n // RECORDS:06}.tfrecord"
        key = f"id-{n:012}" if ids else f"{source}#{n % RECORDS}"
        places.append((key, source, n % RECORDS))

    def work() -> None:
        finished = Finished.read(f"{output}/_run-r2.finished")
        found = sum(finished.holds(*place, has_id=ids) for place in places)
        assert found == ASKED // 2, found

    timed(f"look-up of {ASKED} keys", work)


def phase_recommit(output: str, rows: int, a_file: int, ids: bool) -> None:
    """The commit of a resumed run."""
    kept = tuple(sorted(f"features/{path.name}" for path in Path(output, "features").iterdir()))
    fresh = write(output, "r2", rows, rows + FRESH, FRESH, ids)
    timed(
        f"commit of {FRESH} rows more",
        lambda: published(output, "r2", fresh, if_exists="resume", replaces="r1", kept=kept),
    )
    told = json.loads(Path(output, "manifest.json").read_text())
    assert told["counts"]["images"] == rows + FRESH


PHASES = {
    "write": phase_write,
    "commit": phase_commit,
    "resume": phase_resume,
    "look_up": phase_look_up,
    "recommit": phase_recommit,
}


def main() -> None:
    """Run the phases, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rows_per_file", type=int, default=30_000)
    parser.add_argument("--ids", action="store_true", help="keys of an id feature, not URI#index")
    parser.add_argument("--folder", required=True, help="where to put the output; must not exist")
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    request = parser.parse_args()
    if request.phase:
        work = PHASES[request.phase]
        return work(request.folder, request.rows, request.rows_per_file, request.ids)
    Path(request.folder).mkdir(parents=True)
    try:
        for phase in PHASES:
            command = [sys.executable, "-m", "benchmarks.keys", *sys.argv[1:], "--phase", phase]
            subprocess.run(command, check=True)
    finally:
        shutil.rmtree(request.folder)
    return None


if __name__ == "__main__":
    main()
