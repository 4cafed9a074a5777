"""The examples run as they are, and what they show happens: the loss falls, the averages move."""

from __future__ import annotations

import runpy
from pathlib import Path

import exports
import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def from_its_folder(monkeypatch):
    """As where the file is run: its folder comes first."""
    monkeypatch.syspath_prepend(str(EXAMPLES))


@pytest.mark.parametrize(
    ("example", "head"),
    [("finetune_keras_layer", "feature_vector"), ("finetune_hub_load", "classification")],
)
def test_fine_tuning(example, head, capsys):
    main = runpy.run_path(str(EXAMPLES / f"{example}.py"))["main"]
    model = exports.exported("saved_model", head)
    losses, moved = main(["--model", model, "--epochs", "5", "--images", "48"])
    assert len(losses) == 5
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.8 * losses[0]
    assert moved > 1e-3
    told = capsys.readouterr().out
    assert f"loss {losses[0]:.3f} -> {losses[-1]:.3f}" in told
    assert "moving averages" in told


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short(example):
    assert len(example.read_text().splitlines()) < 80


def test_crops_are_of_every_photograph():
    module = runpy.run_path(str(EXAMPLES / "finetune_keras_layer.py"))
    images, labels = module["crops"](32, 24, seed=0)
    assert images.shape == (32, 24, 24, 3)
    assert images.dtype == np.float32
    assert images.min() >= 0
    assert images.max() <= 1
    assert set(labels) == {0, 1, 2, 3}
    again, _ = module["crops"](32, 24, seed=0)
    assert np.array_equal(images, again)
