"""The same input again and again: other shards, workers, order, batches, and another model."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from benchmarks.faults.world import (
    Row,
    World,
    call,
    network,
    row_hashes,
    vectors,
    whole,
    write_files,
    write_shards,
)

IMAGES = 60


def check(world: World) -> Iterator[Row]:
    """The rows of the table."""
    yield same_rows(world)
    yield other_batches(world)
    yield overwritten(world)


def same_rows(world: World) -> Row:
    """Other shards, order, workers and running mode: the same set of (key, row hash)."""
    expected, same = None, 0
    for turn in range(world.times):
        numbers = list(range(IMAGES))
        world.random.shuffle(numbers)
        shards = world.random.randint(1, 8)
        workers = world.random.choice([1, 2, 4])
        output = world.fresh("out")
        ran = call(
            input=write_shards(world.fresh("in"), numbers, shards),
            id_key="id",
            model=world.model,
            output=output,
            direct_num_workers=workers,
            direct_running_mode="multi_threading" if workers > 1 else "in_memory",
            rows_per_file=world.random.choice([7, 1000]),
        )
        found = row_hashes(output)
        if turn == 0 and ran.code == 0 and len(found) == IMAGES:
            expected = found
        same += ran.code == 0 and found == expected and whole(output)
    return Row(
        "same input, other shards, workers, order, rows in a file",
        f"{same} of {world.times} the same set of (key, row hash)",
        same == world.times,
    )


def other_batches(world: World) -> Row:
    """The largest difference to a batch of one, as a share of the vector's largest value."""
    folder = write_files(world.fresh("in"), IMAGES)
    sizes = [1, 2, 3, 5, 8, 16, 31, 64][: max(2, world.times)]
    found = []
    for size in sizes:
        output = world.fresh("out")
        call(input=folder, model=world.model, output=output, batch_size=size)
        found.append(vectors(output))
    first = found[0]
    worst = max(
        float(np.abs(other[key] - value).max() / np.abs(value).max())
        for other in found[1:]
        for key, value in first.items()
    )
    complete = all(len(other) == IMAGES for other in found)
    return Row(
        f"batch sizes {', '.join(map(str, sizes))}",
        f"{worst:.1e} apart at most" if complete else "rows are missing",
        complete and worst < 1e-5,
    )


def overwritten(world: World) -> Row:
    """Two models of equal sizes take turns on one output: rows of the other one are stale."""
    folder = write_files(world.fresh("in"), IMAGES)
    models = [str(world.model), network(world.folder / "other", seed=1)]
    expected = []
    for number, model in enumerate(models):
        output = world.fresh(f"calm{number}")
        call(input=folder, model=model, output=output)
        expected.append(row_hashes(output))
    assert not set(expected[0]) & set(expected[1])
    output, stale = world.fresh("out"), 0
    for turn in range(world.times):
        model = models[turn % 2]
        rows = world.random.choice([7, 1000])
        call(input=folder, model=model, output=output, if_exists="overwrite", rows_per_file=rows)
        stale += row_hashes(output) != expected[turn % 2] or not whole(output)
    return Row(
        "overwrite with another model of equal sizes",
        f"{stale} of {world.times} stale",
        not stale,
    )
