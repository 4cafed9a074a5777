"""The model commands.

    python -m pipeline.models export --network nasnet_mobile --head classification \\
        --format saved_model --seed 0 --output out/nasnet_mobile
    python -m pipeline.models inspect out/nasnet_mobile
    python -m pipeline.models prepare out/nasnet_mobile --output out/nasnet_mobile_prepared

Beam's flags for gs:// and s3:// (--s3_endpoint_url, --no_auth, ...) pass through in the last two.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from models.catalog import FORMATS, HEADS, NETWORKS
from pipeline.options import OneLineParser, joined, split_beam, value_range_of
from storage import files, reach, stdio
from storage.errors import RequestError
from storage.secrets import hide

if TYPE_CHECKING:
    from models.loading import LoadSpec


def parser() -> argparse.ArgumentParser:
    """The command line, one subcommand a verb."""
    result = OneLineParser(
        prog="python -m pipeline.models",
        usage="python -m pipeline.models VERB [flags]; VERB --help tells its flags",
        description="Make and look at models. Beam's flags for gs:// and s3:// pass through in "
        "inspect and prepare.",
        allow_abbrev=False,
    )
    verbs = result.add_subparsers(dest="verb", metavar="VERB", required=True)

    export = verbs.add_parser(
        "export",
        help="network + weights -> a model directory",
        allow_abbrev=False,
        usage="python -m pipeline.models export --network N --head H --format F "
        "(--checkpoint PREFIX [--ema] | --seed N) --output DIR [--archive FILE.tar.gz]",
    )
    export.add_argument(
        "--network",
        required=True,
        choices=sorted(NETWORKS),
        metavar="N",
        help=", ".join(sorted(NETWORKS)),
    )
    export.add_argument(
        "--head", required=True, choices=HEADS, metavar="H", help=" or ".join(HEADS)
    )
    export.add_argument(
        "--format",
        required=True,
        choices=FORMATS,
        metavar="F",
        help="TF2 saved_model or TF1 hub_v1",
    )
    weights = export.add_mutually_exclusive_group(required=True)
    weights.add_argument("--checkpoint", metavar="PREFIX", help="a TF-Slim checkpoint")
    weights.add_argument(
        "--seed", type=int, metavar="N", help="random weights, the same for each N: shape and speed"
    )
    export.add_argument("--ema", action="store_true", help="take the checkpoint's moving averages")
    export.add_argument("--output", required=True, metavar="DIR")
    export.add_argument("--archive", metavar="FILE.tar.gz", help="also pack DIR as the hub does")

    inspect = verbs.add_parser(
        "inspect",
        help="what a model is, as JSON on stdout",
        allow_abbrev=False,
        usage="python -m pipeline.models inspect MODEL [flags]",
    )
    prepare = verbs.add_parser(
        "prepare",
        help="resolve, verify and optimise a model once",
        allow_abbrev=False,
        usage="python -m pipeline.models prepare MODEL --output DIR [flags]",
    )
    prepare.add_argument("--output", required=True, metavar="DIR", help="local, gs:// or s3://")
    for verb in (inspect, prepare):
        verb.add_argument("model", metavar="MODEL", help="any handle that extract's --model takes")
        verb.add_argument(
            "--model_sha256", type=_digest, metavar="HEX", help="digest that its archive must have"
        )
        verb.add_argument("--image_size", type=_size, metavar="S", help="where the model takes any")
        verb.add_argument("--value_range", type=value_range_of, metavar="LOW,HIGH")
        verb.add_argument("--allow_unsafe_ops", action="store_true")
    return result


def _size(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: pixels, at least 1")
    return int(text)


def _digest(text: str) -> str:
    if not re.fullmatch("[0-9a-f]{64}", text):
        raise argparse.ArgumentTypeError(f"{text}: 64 lower-case hex digits")
    return text


def _local(flag: str, path: str) -> str:
    """The absolute local `path`, where nothing may be yet."""
    path = files.absolute(path)
    if files.is_remote(path):
        raise RequestError(f"{flag} {path}: must be local; copy it to a store afterwards")
    _check_free(flag, path)
    return path


def _check_free(flag: str, path: str) -> None:
    if files.occupied(path):
        raise RequestError(f"{flag} {path}: something is there already; give another")


def _check_reached(*places: str) -> None:
    for place in places:
        if not place.startswith(("http://", "https://")):  # fetching has its own bound
            reach.check(place)


def export(request: argparse.Namespace) -> None:
    """Write the model directory that `request` asks for. Raises RequestError."""
    if request.ema and not request.checkpoint:
        raise RequestError("--ema chooses among a checkpoint's values; give --checkpoint too")
    output = _local("--output", request.output)
    archive = _local("--archive", request.archive) if request.archive else None
    if archive and not archive.endswith((".tar.gz", ".tgz")):
        raise RequestError(f"--archive {archive}: it will be a .tar.gz, and is to be named so")
    if archive and archive.startswith(f"{output}/"):
        raise RequestError(f"--archive {archive}: would lie in what it is made of; give another")
    files.check_writable(output)
    if archive:
        files.check_writable(os.path.dirname(archive), "--archive")
    from models.checkpoint import CheckpointError, read_checkpoint, seeded
    from models.export import export_hub_v1, export_saved_model, write_archive
    from models.networks import variable_shapes

    spec = NETWORKS[request.network]
    shapes = variable_shapes(spec, request.head)
    try:
        values = (
            read_checkpoint(request.checkpoint, shapes, request.ema)
            if request.checkpoint
            else seeded(shapes, request.seed)
        )
    except CheckpointError as error:
        raise RequestError(f"--checkpoint {request.checkpoint}: {error}") from None
    write = export_saved_model if request.format == "saved_model" else export_hub_v1
    write(spec, values, request.head, output)
    if archive:
        write_archive(output, archive)
    of = request.checkpoint or "SEEDED RANDOM weights, which show shape and speed only"
    _say(f"wrote {output}: {request.network}, {request.head}, {request.format}, of {of}")


def inspect(request: argparse.Namespace) -> None:
    """Print what the model `request.model` is. Raises RequestError.

    A model that can reach files or the network is not loaded without leave: then what only loading
    tells is null.
    """
    from models import handles

    _check_reached(request.model)
    directory = handles.resolve(request.model, request.model_sha256)
    from models.loading import look, unsafe_operations

    unsafe = unsafe_operations(directory)
    told: dict[str, Any] = dict.fromkeys(
        ("image_size", "value_range", "outputs", "signatures", "fingerprint")
    )
    if not unsafe or request.allow_unsafe_ops:
        told = look(_spec(request))
    told = {"format": handles.model_format(directory), **told, "unsafe_ops": unsafe}
    stdio.tell(json.dumps(told, indent=1))


def prepare(request: argparse.Namespace) -> None:
    """Write the model `request.model`, prepared, to `request.output`. Raises RequestError."""
    from models import handles

    output = files.absolute(request.output)
    _check_reached(request.model, output)
    _check_free("--output", output)
    files.check_writable(output)
    handles.resolve(request.model, request.model_sha256)
    from models.loading import prepare as write_prepared

    write_prepared(_spec(request), output)
    _say(f"wrote {output}: {request.model}, prepared")


def _say(text: str) -> None:
    stdio.tell(hide(text), "stderr")


def _spec(request: argparse.Namespace) -> LoadSpec:
    from models.loading import Hints, LoadSpec

    return LoadSpec(
        request.model,
        sha256=request.model_sha256,
        hints=Hints(request.image_size, request.value_range),
        allow_unsafe_ops=request.allow_unsafe_ops,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one model command; returns the exit code: 0, or 2 where the request is wrong."""
    try:
        words = joined(sys.argv[1:] if argv is None else argv)
        # Making a model needs none of Beam's flags, and has a --network of its own.
        ours, beams = (words, []) if words[:1] == ["export"] else split_beam(words)
        request = parser().parse_args(ours)
        if beams:
            files.configure_stores(beams)
        {"export": export, "inspect": inspect, "prepare": prepare}[request.verb](request)
    except (RequestError, OSError) as error:
        stdio.tell_error(error)
        return 2
    return 0


if __name__ == "__main__":
    stdio.open_missing()
    sys.exit(main())
