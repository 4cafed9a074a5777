"""What run_local.sh runs: the main job, with pictures and a model of its own where none are given.

The pictures are real photographs out of the scikit-image package; the model is nasnet_mobile with
seeded weights, whose embeddings show only shape and speed.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline import extract
from pipeline import options as flags
from storage import files, temporaries
from storage.errors import RequestError
from storage.stdio import tell_error

PHOTOGRAPHS = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "retina.jpg",
    "rocket.jpg",
)
SEED = 0


def photographs() -> Iterator[tuple[str, bytes]]:
    """Name and encoded bytes of the photographs in the installed package."""
    import importlib.resources

    folder = importlib.resources.files("skimage") / "data"
    for name in PHOTOGRAPHS:
        yield name, (folder / name).read_bytes()


def write_photographs(folder: Path) -> tuple[Path, Path]:
    """The photographs as TFRecords (two shards) and as files: the two folders, below `folder`.

    They are written once; later calls find them.
    """
    from formats import example, tfrecord

    records, pictures = folder / "tfrecord", folder / "files"
    if folder.exists():
        return records, pictures
    folder.parent.mkdir(parents=True, exist_ok=True)
    with temporaries.scratch(folder.parent, f"{folder.name}.") as scratch:
        whole = scratch / "whole"
        for name in (records.name, pictures.name):
            (whole / name).mkdir(parents=True)
        names = [f"photographs-{i:05}-of-00002" for i in (0, 1)]
        shards = [(whole / records.name / name).open("wb") for name in names]
        for number, (name, data) in enumerate(photographs()):
            (whole / pictures.name / name).write_bytes(data)
            features = {"image/encoded": data, "image/filename": name.encode()}
            tfrecord.write_record(shards[number % 2], example.serialize_example(features))
        for shard in shards:
            shard.close()
        try:
            whole.rename(folder)
        except OSError:
            if not folder.exists():  # another call was quicker
                raise
    return records, pictures


def build_seeded_model(directory: str) -> None:
    """Write nasnet_mobile with seeded weights to `directory`, where it is not there yet."""
    if Path(directory).exists():
        return
    from models.catalog import NASNET_MOBILE
    from models.checkpoint import seeded
    from models.export import export_saved_model
    from models.networks import variable_shapes

    values = seeded(variable_shapes(NASNET_MOBILE, "classification"), SEED)
    try:
        export_saved_model(NASNET_MOBILE, values, "classification", directory)
    except OSError:
        if not Path(directory).exists():  # another call was quicker
            raise


def main(argv: Sequence[str]) -> int:
    """Run the job with the flags `argv`, filling in what is missing; returns the exit code."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--root", type=Path, required=True)
    ours, given = parser.parse_known_args(argv)
    out: Path = ours.root / "out"
    fresh = out / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    defaults = {
        "--input": out / ".photographs",
        "--model": out / ".models" / f"nasnet_mobile-seed{SEED}",
        "--output": fresh,
    }
    named = {word.partition("=")[0] for word in given}
    missing = {flag: str(value) for flag, value in defaults.items() if flag not in named}
    full = [*given, *itertools.chain.from_iterable(missing.items())]
    try:
        options, beam_args = flags.parse(full)
        if missing:
            files.check_writable(str(out), "--root")
        if "--model" in missing:
            sys.stderr.write(
                "WARNING: no --model given, so this runs nasnet_mobile with SEEDED RANDOM weights."
                " Its embeddings show shape and speed only and mean NOTHING of the pictures.\n"
            )
            build_seeded_model(options.model)
        if "--input" not in missing:
            return extract.main(full)
        return _extract_both(options, beam_args, out / ".photographs")
    except (RequestError, OSError) as error:
        tell_error(error)
        return 2


def _extract_both(options: flags.Options, beam_args: Sequence[str], folder: Path) -> int:
    """Extract from the TFRecords and from the files; one JSON line, with the second's as `also`."""
    from pipeline import job

    runs = [
        dataclasses.replace(
            options, input=(str(source),), output=files.join(options.output, source.name)
        )
        for source in write_photographs(folder)
    ]
    for run in runs:  # what is wrong with the second is told before the first
        job.run(dataclasses.replace(run, dry_run=True), beam_args)
    results: list[dict[str, Any]] = [job.run(run, beam_args) for run in runs]
    job.tell({**results[0], "also": results[1]})
    return max(job.EXIT_CODES[result["status"]] for result in results)


if __name__ == "__main__":
    extract.run_process(lambda: main(sys.argv[1:]))
