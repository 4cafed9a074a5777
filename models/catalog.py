"""What is known of each network: its sizes, the order of its cells, where it was published.

Hyper-parameters of TF-Slim's NASNet-A (Zoph et al. 2018, arXiv:1707.07012) and PNASNet-5 (Liu et
al. 2018, arXiv:1712.00559), from which the TF Hub models were exported. Plain data: nothing here
imports TensorFlow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from models.cells import NASNET_NORMAL, NASNET_REDUCTION, PNASNET, Cell

Head = Literal["classification", "feature_vector"]
ModelFormat = Literal["saved_model", "hub_v1"]

HEADS: tuple[Head, ...] = ("classification", "feature_vector")
FORMATS: tuple[ModelFormat, ...] = ("saved_model", "hub_v1")


class Place(NamedTuple):
    """One cell in its network.

    `scope` is Slim's name; `filters` the width of each hidden state; `stride` 1 or 2; `previous`
    the index, from the end of the outputs so far, of the cell's second input; `keep_prob` the
    drop path's keep probability, in (0, 1], at the end of the original training.
    """

    scope: str
    cell: Cell
    filters: int
    stride: int
    previous: int
    keep_prob: float


@dataclass(frozen=True, slots=True)
class NetworkSpec:
    """One network of the family.

    `image_size` is the side of its square input in pixels; `num_cells` counts the cells besides
    the stem's two and the reduction cells; `first_filters` is the width of `cell_0`;
    `stem_multiplier` widens the first convolution, of 32 filters; `weight_decay` is the factor of
    every kernel's L2 loss; `drop_path_keep_prob` the last cell's; `skip_reduction_layer_input`
    lets the normal cell behind a reduction cell look past it; `hub_versions` are those that
    tfhub.dev published, of either head.

    Without a `reduction` cell (PNASNet-5) the `normal` one reduces too, with stride 2.
    """

    name: str
    image_size: int
    normal: Cell
    reduction: Cell | None
    num_cells: int
    first_filters: int
    stem_multiplier: int = 1
    weight_decay: float = 4e-5
    drop_path_keep_prob: float = 1.0
    skip_reduction_layer_input: bool = False
    num_reductions: int = 2
    num_classes: int = 1001
    hub_versions: tuple[int, ...] = ()

    @property
    def conv0_filters(self) -> int:
        """Channels of the first convolution."""
        return 32 * self.stem_multiplier

    @property
    def feature_width(self) -> int:
        """Length of the feature vector: the channels of the last cell."""
        return self.first_filters * 2**self.num_reductions * len(self.normal.outputs)

    def width(self, head: Head) -> int:
        """Length of what `head` gives for an image: logits (index 0 = background) or features."""
        return self.num_classes if head == "classification" else self.feature_width

    def places(self) -> tuple[Place, ...]:
        """Every cell in the order in which Slim builds them, the stem's two first."""
        strided = self.reduction or self.normal
        past_reduction = -3 if self.skip_reduction_layer_input else -2
        reduction_at = [
            (number + 1) * self.num_cells // (self.num_reductions + 1)
            for number in range(self.num_reductions)
        ]
        plan: list[tuple[str, Cell, float, int, int]] = [
            ("cell_stem_0", strided, 1 / 4, 2, -2),
            ("cell_stem_1", strided, 1 / 2, 2, -2),
        ]
        scaling = 1
        for index in range(self.num_cells):
            stride, previous = 1, -2
            if index in reduction_at:
                scaling *= 2
                if self.reduction:
                    scope = f"reduction_cell_{reduction_at.index(index)}"
                    plan.append((scope, self.reduction, scaling, 2, -2))
                    previous = past_reduction
                else:
                    stride = 2
            plan.append((f"cell_{index}", self.normal, scaling, stride, previous))
        return tuple(
            Place(
                scope,
                cell,
                int(self.first_filters * scaling),
                stride,
                previous,
                keep_prob=1 - (number + 1) / len(plan) * (1 - self.drop_path_keep_prob),
            )
            for number, (scope, cell, scaling, stride, previous) in enumerate(plan)
        )


NASNET_MOBILE = NetworkSpec(
    name="nasnet_mobile",
    image_size=224,
    normal=NASNET_NORMAL,
    reduction=NASNET_REDUCTION,
    num_cells=12,
    first_filters=44,
    hub_versions=(1, 3, 4, 5),
)

NASNET_LARGE = NetworkSpec(
    name="nasnet_large",
    image_size=331,
    normal=NASNET_NORMAL,
    reduction=NASNET_REDUCTION,
    num_cells=18,
    first_filters=168,
    stem_multiplier=3,
    weight_decay=5e-5,
    drop_path_keep_prob=0.7,
    skip_reduction_layer_input=True,
    hub_versions=(1, 3, 4, 5),
)

PNASNET_LARGE = NetworkSpec(
    name="pnasnet_large",
    image_size=331,
    normal=PNASNET,
    reduction=None,
    num_cells=12,
    first_filters=216,
    stem_multiplier=3,
    drop_path_keep_prob=0.6,
    hub_versions=(1, 2, 3, 4, 5),
)

PNASNET_MOBILE = NetworkSpec(
    name="pnasnet_mobile",
    image_size=224,
    normal=PNASNET,
    reduction=None,
    num_cells=9,
    first_filters=54,
)

# For tests: seconds, not minutes, through the same builder.
ONE_CELL = NetworkSpec(
    name="one_cell",
    image_size=32,
    normal=NASNET_NORMAL,
    reduction=NASNET_REDUCTION,
    num_cells=1,
    first_filters=8,
    drop_path_keep_prob=0.8,
    num_reductions=0,
    num_classes=11,
)

NETWORKS: dict[str, NetworkSpec] = {
    spec.name: spec for spec in (NASNET_MOBILE, NASNET_LARGE, PNASNET_MOBILE, PNASNET_LARGE)
}


@dataclass(frozen=True, slots=True)
class HubModel:
    """A model that was published on TF Hub: versions 1 to 3 for TF1, 4 and 5 for TF2."""

    network: NetworkSpec
    head: Head
    version: int

    @property
    def handle(self) -> str:
        """The address by which tensorflow_hub knows the model."""
        return f"https://tfhub.dev/google/imagenet/{self.network.name}/{self.head}/{self.version}"

    @property
    def format(self) -> ModelFormat:
        """How the model lies on disk."""
        return "hub_v1" if self.version <= 3 else "saved_model"


HUB_MODELS: dict[str, HubModel] = {
    model.handle: model
    for network in NETWORKS.values()
    for head in HEADS
    for version in network.hub_versions
    for model in [HubModel(network, head, version)]
}
