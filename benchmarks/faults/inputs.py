"""Inputs that are damaged: TFRecords in every way, and a folder of real pictures, whole and not."""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.faults.world import (
    Row,
    World,
    call,
    finish,
    manifest,
    picture,
    published,
    start,
    whole,
)
from formats.example import serialize_example
from formats.tfrecord import write_record

RECORDS, HARMED = 9, 4
DEFAULT_FORMATS = ("jpeg", "png", "webp", "gif", "bmp")
MORE_FORMATS = ("tiff", "avif")


def check(world: World) -> Iterator[Row]:
    """The rows of the table."""
    yield from damaged_records(world)
    if world.corpus:
        yield from corpus(world)


# --- TFRecords ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Damaged:
    """A damaged TFRecord file: its name and bytes, the records that can be reached, and the damage.

    `places` are pairs of error class and byte offset; `told` is a word of a warning on stderr.
    """

    what: str
    name: str
    data: bytes
    reached: tuple[int, ...]
    places: tuple[tuple[str, int], ...] = ()
    told: str = ""


def frames() -> list[bytes]:
    """The framed records of a whole file."""
    made = []
    for number in range(RECORDS):
        stream = io.BytesIO()
        write_record(stream, serialize_example({"image/encoded": picture(number)}))
        made.append(stream.getvalue())
    return made


def every_damage() -> list[Damaged]:
    """Each way in which a TFRecord file is known to come to harm."""
    raw = frames()
    data = b"".join(raw)
    at = sum(map(len, raw[:HARMED]))
    after = at + len(raw[HARMED])
    end = len(data)
    everything, before = tuple(range(RECORDS)), tuple(range(HARMED))
    others = tuple(n for n in everything if n != HARMED)
    payload = data[: after - 1] + bytes([data[after - 1] ^ 1]) + data[after:]
    length = data[: at + 9] + bytes([data[at + 9] ^ 1]) + data[at + 10 :]
    shard = "x-00000-of-00001"
    return [
        Damaged("bad payload checksum", shard, payload, others, (("BadChecksum", at),)),
        Damaged("bad length checksum", shard, length, before, (("BadLength", at),)),
        Damaged("cut inside a record", shard, data[: at + 99], before, (("TruncatedRecord", at),)),
        Damaged("trailing junk", shard, data + b"junk" * 5, everything, (("BadLength", end),)),
        Damaged("gzip without the name", shard, gzip.compress(data), everything),
        Damaged("the name of gzip without gzip", "x.tfrecord.gz", data, everything),
        Damaged("cut between records, a shard missing", "x-00000-of-00002", data[:at], before,
                told="not there"),
        Damaged("zero bytes", shard, b"", (), told="zero bytes"),
    ]  # fmt: skip


def damaged_records(world: World) -> Iterator[Row]:
    """A row for each damage, read with --on_damage record and fail."""
    for damaged in every_damage():
        folder = world.fresh("in")
        folder.mkdir()
        path = folder / damaged.name
        path.write_bytes(damaged.data)
        flags = {"input": path, "model": world.model, "input_format": "tfrecord"}
        output = world.fresh("out")
        ran = call(output=output, on_damage="record", max_failure_rate=1, **flags)
        rows = published(output)
        read = {row["record_index"] for row in rows if row["kind"] == "features"}
        failed = {
            (row["error_class"], int(row["key"].removeprefix(f"{path}@")))
            for row in rows
            if row["kind"] == "failures"
        }
        good = ran.code == 0 and whole(output) and read == set(damaged.reached)
        good = good and failed == set(damaged.places) and damaged.told in ran.stderr
        output = world.fresh("out")
        strict = call(output=output, on_damage="fail", **flags)
        if damaged.places:
            good = good and strict.code == 1 and strict.short and manifest(output) is None
        else:
            good = good and strict.code == 0
        told = ", ".join(f"{name} at byte {at}" for name, at in sorted(failed)) or "no failure"
        yield Row(
            f"TFRecord: {damaged.what}",
            f"record: {len(read)} of {RECORDS} records, {told}"
            + (f', "{damaged.told}" told' if damaged.told else "")
            + f"; fail: exit {strict.code}"
            + (f", {len(strict.stderr)} bytes" if strict.code else ""),
            good,
        )


# --- real pictures -----------------------------------------------------------------------------


def corpus(world: World) -> Iterator[Row]:
    """Every file of the corpus by its expected outcome, with two sets of formats."""
    assert world.corpus
    with (world.corpus / "manifest.csv").open() as stream:
        expected = list(csv.DictReader(stream))
    folders = sorted({row["path"].partition("/")[0] for row in expected})
    for formats in (DEFAULT_FORMATS, DEFAULT_FORMATS + MORE_FORMATS):
        output = world.fresh("out")
        process = start(
            input=[world.corpus / folder for folder in folders],
            model=world.model,
            output=output,
            formats=",".join(formats),
            max_failure_rate=1,
        )
        ran = finish(process)
        rows = {row["key"]: row for row in published(output)}
        wrong = [
            row["path"]
            for row in expected
            if not as_expected(row, rows.get(str(world.corpus / row["path"])), formats)
        ]
        features = sum(row["kind"] == "features" for row in rows.values())
        yield Row(
            f"{len(expected)} real and damaged pictures, --formats {','.join(formats)}",
            f"{len(expected) - len(wrong)} as expected ({features} features), "
            f"{int(ran.code != 0)} deaths" + (f"; not {', '.join(wrong[:3])}" if wrong else ""),
            ran.code == 0 and not wrong and whole(output) and len(rows) == len(expected),
        )


def as_expected(row: dict[str, str], found: dict | None, formats: tuple[str, ...]) -> bool:
    """Whether what was `found` of a file is what its line of the corpus says."""
    if found is None:
        return False
    outcome = row["expected"]
    if outcome in ("reject", "limit"):
        return found["kind"] == "failures"
    if not outcome.startswith("decode"):  # either
        return True
    if row["container"] not in formats:
        return found["kind"] == "failures" and found["error_class"] == "UnsupportedFormat"
    sides = int(row["width"]), int(row["height"])
    # The corpus has sizes as stored, but for TIFF as Pillow tells them: turned already.
    turned = row["orientation"] in ("5", "6", "7", "8") and row["container"] != "tiff"
    return found["kind"] == "features" and (found["width"], found["height"]) == (
        sides[::-1] if turned else sides
    )
