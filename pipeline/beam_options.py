"""Beam's own flags: what its option classes declare, and the list of them that we ship.

`python -m pipeline.beam_options` writes pipeline/beam_flags.py anew; a test holds the two equal.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator
from pathlib import Path


def _subclasses(cls: type) -> Iterator[type]:
    child: type
    for child in cls.__subclasses__():
        yield child
        yield from _subclasses(child)


def declared_flags() -> dict[str, bool]:
    """Name to whether a value follows, of every flag that Beam's PipelineOptions declare."""
    module = importlib.import_module("apache_beam.options.pipeline_options")
    flags: dict[str, bool] = {}
    for options in _subclasses(module.PipelineOptions):
        if not options.__module__.startswith("apache_beam."):
            continue
        parser = module._BeamArgumentParser(add_help=False, conflict_handler="resolve")
        options._add_argparse_args(parser)  # type: ignore[attr-defined]
        for action in parser._actions:
            takes_value = not isinstance(
                action, argparse._StoreTrueAction | argparse._StoreFalseAction
            )
            flags.update({name.removeprefix("--"): takes_value for name in action.option_strings})
    return dict(sorted(flags.items()))


def flags_module() -> str:
    """The text of pipeline/beam_flags.py."""
    lines = [
        '"""Beam\'s flags, name to whether a value follows.',
        "",
        "Written by `python -m pipeline.beam_options`; do not edit.",
        '"""',
        "",
        "BEAM_FLAGS = {",
        *(f'    "{name}": {value},' for name, value in declared_flags().items()),
        "}",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    argparse.ArgumentParser(description="pipeline/beam_flags.py, written anew.").parse_args()
    Path(__file__).with_name("beam_flags.py").write_text(flags_module())
