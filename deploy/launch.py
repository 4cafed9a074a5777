"""What the Flex Template's launcher runs: the job's main, from the folder that holds the packages.

Run as a script, `pipeline/extract.py` would put its own folder first on the path, whose `models.py`
is not the package `models`.
"""

import dataclasses
import sys
from collections.abc import Sequence

from pipeline.extract import main, run_process
from pipeline.options import Options

SWITCHES = {f"--{knob.name}" for knob in dataclasses.fields(Options) if knob.default is False}


def words(parameters: Sequence[str]) -> list[str]:
    """The job's flags: a template gives each parameter a value, and switches take none."""
    on = {f"{switch}=true": switch for switch in SWITCHES}
    off = {f"{switch}=false" for switch in SWITCHES}
    return [on.get(word, word) for word in parameters if word not in off]


if __name__ == "__main__":
    run_process(lambda: main(words(sys.argv[1:])))
