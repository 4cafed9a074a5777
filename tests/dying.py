"""A commit that ends at a call to the system, as a lost process does: no handler of its own runs.

    python tests/dying.py PLAN FOLDER    # a plan of tests/test_dataset.py; what it saw, as JSON

Each commit is a fork of this process, which holds neither TensorFlow nor Beam.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

if __name__ == "__main__":  # before what follows is looked for
    sys.path.insert(0, str(Path(__file__).parents[1]))

import test_dataset as plans

from formats import resuming
from storage import files

ENDED = 77
CALLS = ("open", "close", "replace", "unlink", "fsync", "mkdir")


class System:
    """Counts twice, before and after, each call by which `storage.files` opens, closes, renames,
    deletes, syncs and makes folders; the process ends at the count `at`.
    """

    def __init__(self, at: int | None = None):
        self.at = at
        self.seen: list[str] = []

    def step(self, name: str) -> None:
        """Here the process may end."""
        self.seen.append(name)
        if len(self.seen) == self.at:
            os._exit(ENDED)

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` with a step before and after it."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.step(name)
            result = function(*args, **kwargs)
            self.step(name)
            return result

        return call

    def open_file(self, path: str, mode: str = "r") -> Any:
        """A file whose closing is counted too."""
        kind = io.BufferedWriter if mode == "wb" else io.BufferedReader
        system = self

        class Counted(kind):  # type: ignore[misc, valid-type]
            def close(self) -> None:
                if not self.closed:
                    system.around("close", super().close)()

        return self.around("open", lambda: Counted(io.FileIO(path, mode)))()

    @contextlib.contextmanager
    def beneath(self) -> Iterator[None]:
        """While this lasts, files are reached through here."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(files, "open", self.open_file, create=True))
            for name in CALLS:
                counted = self.around(name, getattr(os, name))
                stack.enter_context(mock.patch.object(os, name, counted))
            yield


def main(plan_name: str, folder: Path) -> dict[str, Any]:
    """End the commit of a plan everywhere; what was wrong, and how many steps each call had."""
    plan = getattr(plans, plan_name)
    resuming._LEFTOVER = plans.SHORT_IDS
    output, prepared = folder / "out", folder / "prepared"
    run, parts, skipped = plan(output)
    shutil.copytree(output, prepared)
    old = plans.published(output)
    system = System()
    with system.beneath():
        verdict = plans.commit(run, parts, skipped)
    new = plans.published(output)
    left = plans.files_below(output)
    # What was written to replace another output is no part of it, should the commit not come.
    adopts = plan_name in ("plan_first", "plan_resume")
    wrong = []
    for at in range(1, len(system.seen) + 1):
        shutil.rmtree(output)
        shutil.copytree(prepared, output)
        child = os.fork()
        if not child:
            with System(at).beneath():
                plans.commit(run, parts, skipped)
            os._exit(0)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        good = ended == ENDED and plans.published(output) in (old, new)
        if at % 2 or not adopts:  # the step is tried again by another worker
            good &= plans.commit(run, parts, skipped) == verdict
            good &= plans.published(output) == new
        plans.go_on(output)
        good &= plans.published(output) == new and len(plans.files_below(output)) == len(left)
        if not good:
            wrong.append(f"{at}, {system.seen[at - 1]}: exit {ended}, {plans.files_below(output)}")
    return {"wrong": wrong, "seen": {name: system.seen.count(name) for name in CALLS}}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]))))
