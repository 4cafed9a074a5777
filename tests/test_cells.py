"""The cells are well-formed data, and read as the papers draw them."""

import subprocess
import sys

import pytest

from models.cells import (
    AVG3,
    MAX3,
    NASNET_NORMAL,
    NASNET_REDUCTION,
    NONE,
    PNASNET,
    SEP3,
    SEP5,
    SEP7,
    Cell,
    Operation,
)

CELLS = {"normal": NASNET_NORMAL, "reduction": NASNET_REDUCTION, "pnasnet": PNASNET}
SHORT = {SEP3: "sep3", SEP5: "sep5", SEP7: "sep7", AVG3: "avg3", MAX3: "max3", NONE: "none"}


def told(cell: Cell) -> str:
    return "; ".join(
        f"({SHORT[left]}, {i})+({SHORT[right]}, {j})" for (left, i), (right, j) in cell.combinations
    )


@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
def test_branches_read_only_what_is_there(cell: Cell):
    assert len(cell.combinations) == 5
    for index, branches in enumerate(cell.combinations):
        for _, state in branches:
            assert 0 <= state < index + 2


@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
def test_every_state_is_read_or_returned(cell: Cell):
    read = {state for branches in cell.combinations for _, state in branches}
    assert read | set(cell.outputs) == set(range(7))
    assert list(cell.outputs) == sorted(set(cell.outputs))


@pytest.mark.parametrize(
    ("cell", "combinations", "outputs"),
    [
        (
            NASNET_NORMAL,
            "(sep5, 0)+(sep3, 1); (sep5, 1)+(sep3, 1); (avg3, 0)+(none, 1); "
            "(avg3, 1)+(avg3, 1); (sep3, 0)+(none, 0)",
            [1, 2, 3, 4, 5, 6],
        ),
        (
            NASNET_REDUCTION,
            "(sep5, 0)+(sep7, 1); (max3, 0)+(sep7, 1); (avg3, 0)+(sep5, 1); "
            "(none, 3)+(avg3, 2); (sep3, 2)+(max3, 0)",
            [3, 4, 5, 6],
        ),
        (
            PNASNET,
            "(sep5, 1)+(max3, 1); (sep7, 0)+(max3, 0); (sep5, 0)+(sep3, 0); "
            "(sep3, 4)+(max3, 0); (sep3, 1)+(none, 0)",
            [2, 3, 4, 5, 6],
        ),
    ],
    ids=CELLS,
)
def test_cells_are_the_published_ones(cell: Cell, combinations: str, outputs: list[int]):
    assert told(cell) == combinations
    assert list(cell.outputs) == outputs


def test_operations_say_what_they_are():
    assert Operation("separable", 5) == SEP5
    assert len(SHORT) == 6


def test_the_data_needs_no_tensorflow():
    code = "import models.catalog, sys; print('tensorflow' in sys.modules, 'numpy' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False False\n"
