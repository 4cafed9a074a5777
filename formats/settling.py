"""Each key once: repeated ids and copies settled, and failures that were tried again let go of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from formats import table
from formats.digests import (
    Bytes,
    DigestSet,
    key_digest,
    place_digest,
    place_digests,
    repeated_rows,
    standing,
)
from formats.parts import (
    FAILURES,
    PLACE,
    PartFile,
    PartWriter,
    column_batches,
    is_damage,
    of_each,
    open_part,
)
from formats.records import DUPLICATE, Failure, one_line, place_key


def still_failed(
    output: str,
    failures: Sequence[PartFile],
    fresh: Sequence[PartFile],
    reread: bytes,
    name: str,
    compression: str,
) -> tuple[list[PartFile], set[bytes]]:
    """`failures` of earlier runs without those that this run, which wrote `fresh`, has tried again.

    That is what has its key or place in `fresh`, and whatever was told of a source that was to be
    read whole again (`reread`: digests of these); but not a record that may lie behind damage of
    this time, nor an image that lost its id to another, as long as that one need not be read. Files
    that lose rows are written anew as `part-NAME-retried-...`. With them the digests of the keys
    that were tried again.
    """
    tried_again: set[bytes] = set()
    if not failures:
        return [], tried_again
    keys = DigestSet.of(b"".join(part.keys for part in fresh))

    def places_of(part: PartFile) -> bytes:
        with open_part(output, part.path, part.bytes) as reader:
            return b"".join(place_digests(*b.columns) for b in column_batches(reader, PLACE))

    places = DigestSet.of(b"".join(of_each(output, places_of, fresh)))
    whole = DigestSet.of(reread)
    lost = [part for part in fresh if part.kind == FAILURES] if reread else []
    damaged = set().union(*of_each(output, lambda part: _damaged(output, part), lost))
    left = []
    for number, part in enumerate(failures):
        dropped: set[int] = set()
        start = 0
        names = ["key", *PLACE, "error_class"]
        with open_part(output, part.path, part.bytes) as reader:
            for batch in column_batches(reader, names):
                rows = zip(*(column.to_pylist() for column in batch.columns), strict=True)
                for row, (key, source, index, error_class) in enumerate(rows, start):
                    digest = key_digest(key)
                    if (
                        digest in keys
                        or place_digest(source, index) in places
                        or (
                            error_class != DUPLICATE
                            and (index is None or source not in damaged)
                            and key_digest(source) in whole
                        )
                    ):
                        dropped.add(row)
                        tried_again.add(digest)
                start += batch.num_rows
        if dropped:
            new_name = f"part-{name}-retried-{number}"
            part = _without(output, part, dropped, new_name, compression)
        left.append(part)
    return [part for part in left if part.rows], tried_again


def _damaged(output: str, part: PartFile) -> set[str]:
    """The sources of which the failures in `part` tell that not all of them was read."""
    found: set[str] = set()
    with open_part(output, part.path, part.bytes) as reader:
        for batch in column_batches(reader, ["key", *PLACE]):
            key, source, index = batch.columns
            cut = pc.or_(pc.is_null(index), is_damage(key, source))
            found.update(source.filter(cut).unique().to_pylist())
    return found


def settle(
    output: str, kept: Sequence[PartFile], fresh: Sequence[PartFile], name: str, compression: str
) -> tuple[list[PartFile], list[PartFile]]:
    """`kept` (of earlier runs) and `fresh` (of this one) with each key once in both together.

    Of images with one id the smallest (source, index) keeps it, and the others become failures of
    class DuplicateKey under `source#index`, with `#2` or more after it where that is another's key.
    Copies of one image, which a retried bundle leaves,
    are dropped but one, features before failures. Files that lose rows are written anew as
    `part-NAME-...`.
    """
    parts = [*kept, *fresh]
    repeated = repeated_rows([part.keys for part in parts])
    if not repeated:
        return list(kept), list(fresh)
    rows = []  # (key, source, index or -1, whether a failure, part, row, sha256)
    for index, numbers in repeated.items():
        with open_part(output, parts[index].path) as part:
            columns = part.read(["key", "source", "record_index", "sha256"]).take(numbers)
        for number, row in zip(numbers, columns.to_pylist(), strict=True):
            place = -1 if row["record_index"] is None else row["record_index"]
            failed = parts[index].kind == FAILURES
            at = (row["key"], row["source"], place, failed, index, number)
            rows.append((*at, row["sha256"]))
    rows.sort(key=lambda row: row[:6])
    dropped: dict[int, set[int]] = {}
    lost = []  # (row, who keeps its key)
    for before, row in zip([None, *rows[:-1]], rows, strict=True):
        if before is None or before[0] != row[0]:
            winner = row
            continue
        dropped.setdefault(row[4], set()).add(row[5])
        if row[1:3] != before[1:3]:
            lost.append((row, winner))
    losers: tuple[list[Failure], list[Failure]] = ([], [])  # of earlier runs, of this one
    free = _free_keys([_place_key(row) for row, _ in lost], [part.keys for part in parts])
    for new_key, (row, winner) in zip(free, lost, strict=True):
        losers[row[4] >= len(kept)].append(_duplicate(row, winner, new_key))
    settled: tuple[list[PartFile], list[PartFile]] = ([], [])
    for index, part in enumerate(parts):
        if index in dropped:
            new_name = f"part-{name}-settled-{index}"
            part = _without(output, part, dropped[index], new_name, compression)
        settled[index >= len(kept)].append(part)
    schema = _failure_schema_like(output, parts[-1])
    for side, of, failures in zip(settled, ("earlier", "this"), losers, strict=True):
        if failures:
            new_name = f"part-{name}-duplicates-{of}"
            writer = PartWriter(output, FAILURES, new_name, schema, compression)
            writer.write(table.failures_table(failures, schema))
            side.append(writer.close())
    earlier, new = ([part for part in side if part.rows] for side in settled)
    return earlier, new


def _failure_schema_like(output: str, part: PartFile) -> pa.Schema:
    with open_part(output, part.path) as reader:
        metadata = reader.schema_arrow.metadata or {}
    return table.failure_schema({k.decode(): v.decode() for k, v in metadata.items()})


def _free_keys(wanted: Sequence[str], taken: Sequence[Bytes]) -> list[str]:
    """`wanted`, where that is among the digests `taken` or stood before with `#2` or more added."""
    found: dict[int, str] = {}
    given: set[str] = set()
    number = 0
    while len(found) < len(wanted):
        number += 1
        end = f"#{number}" if number > 1 else ""
        tried = {at: key + end for at, key in enumerate(wanted) if at not in found}
        there = standing([key_digest(key) for key in tried.values()], taken)
        for at, key in tried.items():
            if key not in given and key_digest(key) not in there:
                given.add(key)
                found[at] = key
    return [found[at] for at in range(len(wanted))]


def _place_key(row: tuple[Any, ...]) -> str:
    return place_key(row[1], None if row[2] < 0 else row[2])  # as `settle` holds them


def _duplicate(row: tuple[Any, ...], winner: tuple[Any, ...], new_key: str) -> Failure:
    key, source, place, *_, sha256 = row
    where = _place_key(winner)
    return Failure(
        new_key,
        source,
        None if place < 0 else place,
        "read",
        DUPLICATE,
        one_line(f"the id {key[:100]} is that of {where[-300:]} too, which keeps it"),
        sha256,
    )


def _without(
    output: str, part: PartFile, dropped: set[int], name: str, compression: str
) -> PartFile:
    with open_part(output, part.path) as reader:
        writer = PartWriter(output, part.kind, name, reader.schema_arrow, compression)
        start = 0
        for number in range(reader.num_row_groups):
            group = reader.read_row_group(number)
            keep = [start + i not in dropped for i in range(group.num_rows)]
            start += group.num_rows
            for batch in group.filter(pa.array(keep)).combine_chunks().to_batches():
                writer.write(batch)
    return writer.close()
