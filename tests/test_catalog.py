"""The catalogue's figures are those of TF-Slim and TF Hub."""

import dataclasses

import pytest

from models.catalog import HUB_MODELS, NETWORKS, ONE_CELL, NetworkSpec


def body(cells: int, reductions: dict[int, str]) -> list[str]:
    """Scopes of the cells behind the stem, with a reduction cell before each index told."""
    return [
        scope
        for index in range(cells)
        for scope in ([reductions[index]] if index in reductions else []) + [f"cell_{index}"]
    ]


@pytest.mark.parametrize(
    ("name", "size", "width", "conv0", "decay"),
    [
        ("nasnet_mobile", 224, 1056, 32, 4e-5),
        ("nasnet_large", 331, 4032, 96, 5e-5),
        ("pnasnet_large", 331, 4320, 96, 4e-5),
        ("pnasnet_mobile", 224, 1080, 32, 4e-5),
    ],
)
def test_sizes(name: str, size: int, width: int, conv0: int, decay: float):
    spec = NETWORKS[name]
    assert (spec.name, spec.image_size, spec.feature_width) == (name, size, width)
    assert (spec.conv0_filters, spec.weight_decay) == (conv0, decay)
    assert spec.width("classification") == spec.num_classes == 1001
    assert spec.width("feature_vector") == width


@pytest.mark.parametrize(
    ("name", "scopes"),
    [
        ("nasnet_mobile", body(12, {4: "reduction_cell_0", 8: "reduction_cell_1"})),
        ("nasnet_large", body(18, {6: "reduction_cell_0", 12: "reduction_cell_1"})),
        ("pnasnet_large", body(12, {})),
        ("pnasnet_mobile", body(9, {})),
    ],
)
def test_order_of_the_cells(name: str, scopes: list[str]):
    places = NETWORKS[name].places()
    assert [place.scope for place in places] == ["cell_stem_0", "cell_stem_1", *scopes]


def strided(spec: NetworkSpec) -> dict[str, int]:
    return {place.scope: place.filters for place in spec.places() if place.stride == 2}


def test_strides_and_filters():
    assert strided(NETWORKS["nasnet_mobile"]) == {
        "cell_stem_0": 11,
        "cell_stem_1": 22,
        "reduction_cell_0": 88,
        "reduction_cell_1": 176,
    }
    assert strided(NETWORKS["pnasnet_mobile"]) == {
        "cell_stem_0": 13,
        "cell_stem_1": 27,
        "cell_3": 108,
        "cell_6": 216,
    }
    assert list(strided(NETWORKS["pnasnet_large"]))[2:] == ["cell_4", "cell_8"]


def test_only_nasnet_large_looks_past_its_reduction_cells():
    past = {
        name: [place.scope for place in spec.places() if place.previous == -3]
        for name, spec in NETWORKS.items()
    }
    assert past.pop("nasnet_large") == ["cell_6", "cell_12"]
    assert not any(past.values())


@pytest.mark.parametrize(
    ("name", "scope", "keep_prob"),
    [
        ("nasnet_large", "cell_stem_0", 0.9863636363636363),
        ("nasnet_large", "reduction_cell_1", 0.7818181818181817),
        ("nasnet_large", "cell_17", 0.7),
        ("pnasnet_large", "cell_stem_1", 0.9428571428571428),
        ("pnasnet_large", "cell_5", 0.7714285714285715),
        ("pnasnet_large", "cell_11", 0.6),
    ],
)
def test_drop_path_grows_with_depth(name: str, scope: str, keep_prob: float):
    places = {place.scope: place for place in NETWORKS[name].places()}
    assert places[scope].keep_prob == pytest.approx(keep_prob, abs=1e-12)


def test_the_mobile_networks_drop_no_path():
    for name in ("nasnet_mobile", "pnasnet_mobile"):
        assert {place.keep_prob for place in NETWORKS[name].places()} == {1.0}


def test_published_handles():
    assert len(HUB_MODELS) == 2 * (4 + 4 + 5)
    model = HUB_MODELS["https://tfhub.dev/google/imagenet/nasnet_large/classification/5"]
    assert (model.network.name, model.head, model.version) == ("nasnet_large", "classification", 5)
    assert model.format == "saved_model"
    old = HUB_MODELS["https://tfhub.dev/google/imagenet/pnasnet_large/feature_vector/2"]
    assert old.format == "hub_v1"
    assert "https://tfhub.dev/google/imagenet/nasnet_mobile/feature_vector/2" not in HUB_MODELS
    assert not any("pnasnet_mobile" in handle for handle in HUB_MODELS)


def test_one_cell_is_one_cell():
    assert [place.scope for place in ONE_CELL.places()] == ["cell_stem_0", "cell_stem_1", "cell_0"]
    assert ONE_CELL.feature_width == 48
    assert ONE_CELL.name not in NETWORKS


def test_specs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ONE_CELL.num_cells = 2  # type: ignore[misc]
