"""How many cores a process may use, by its container's share of their time."""

from __future__ import annotations

import os

import pytest

from storage import cores


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4.0),
        ({"cpu/cpu.cfs_quota_us": "400000\n"}, None),
        ({"cpu.max": "nonsense"}, None),
    ],
)
def test_the_share_that_a_control_group_allows(tmp_path, files, quota):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cores.cpu_quota(tmp_path) == quota


@pytest.mark.parametrize(("told", "expected"), [("max 100000", 3), ("150000 100000", 2)])
def test_the_share_bounds_the_cores(tmp_path, monkeypatch, told, expected):
    (tmp_path / "cpu.max").write_text(told)
    monkeypatch.setattr(cores, "_CONTROL", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 5, 7})
    assert cores.available_cores.__wrapped__() == expected
