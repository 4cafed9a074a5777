"""How many cores this process may use."""

from __future__ import annotations

import functools
import math
import os
from pathlib import Path

_CONTROL = Path("/sys/fs/cgroup")


@functools.cache
def available_cores() -> int:
    """Cores that this process may run on, no more than its container's share of time allows."""
    allowed = len(os.sched_getaffinity(0))
    quota = cpu_quota(_CONTROL)
    return min(allowed, math.ceil(quota)) if quota else allowed


def cpu_quota(folder: Path) -> float | None:
    """The cores whose time a container may use, by its control group; None for any.

    `folder`: where the kernel shows that, of cgroup v2 or v1 (its documentation: cpu.max, and
    cpu.cfs_quota_us with cpu.cfs_period_us).
    """
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            words = " ".join((folder / name).read_text() for name in names).split()
            quota, period = map(int, words)
        except (OSError, ValueError):  # not there; "max", which is any
            continue
        return quota / period if quota > 0 and period > 0 else None
    return None
