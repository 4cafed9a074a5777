"""The cells of NASNet-A and PNASNet-5 as data: which operation reads which hidden state.

A cell has hidden states h0 = the previous cell's output (squeezed), h1 = the output of the cell
before that (adjusted), and one more for each combination, in order: the sum of its two branches.

NASNet-A: Zoph et al. 2018, arXiv:1707.07012. PNASNet-5: Liu et al. 2018, arXiv:1712.00559.
"""

from __future__ import annotations

from typing import Literal, NamedTuple


class Operation(NamedTuple):
    """What one branch does with its hidden state; `size` is the square kernel's side in pixels."""

    kind: Literal["separable", "average", "maximum", "identity"]
    size: int


SEP3 = Operation("separable", 3)
SEP5 = Operation("separable", 5)
SEP7 = Operation("separable", 7)
AVG3 = Operation("average", 3)
MAX3 = Operation("maximum", 3)
NONE = Operation("identity", 1)

Branch = tuple[Operation, int]


class Cell(NamedTuple):
    """A cell: `combinations` of two (operation, hidden state), and the hidden states it returns.

    `outputs` are the indices of the hidden states that are concatenated along the channels.
    """

    combinations: tuple[tuple[Branch, Branch], ...]
    outputs: tuple[int, ...]


NASNET_NORMAL = Cell(
    combinations=(
        ((SEP5, 0), (SEP3, 1)),
        ((SEP5, 1), (SEP3, 1)),
        ((AVG3, 0), (NONE, 1)),
        ((AVG3, 1), (AVG3, 1)),
        ((SEP3, 0), (NONE, 0)),
    ),
    outputs=(1, 2, 3, 4, 5, 6),
)

NASNET_REDUCTION = Cell(
    combinations=(
        ((SEP5, 0), (SEP7, 1)),
        ((MAX3, 0), (SEP7, 1)),
        ((AVG3, 0), (SEP5, 1)),
        ((NONE, 3), (AVG3, 2)),
        ((SEP3, 2), (MAX3, 0)),
    ),
    outputs=(3, 4, 5, 6),
)

PNASNET = Cell(
    combinations=(
        ((SEP5, 1), (MAX3, 1)),
        ((SEP7, 0), (MAX3, 0)),
        ((SEP5, 0), (SEP3, 0)),
        ((SEP3, 4), (MAX3, 0)),
        ((SEP3, 1), (NONE, 0)),
    ),
    outputs=(2, 3, 4, 5, 6),
)
