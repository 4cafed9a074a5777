"""The model commands.

    python -m pipeline.models export --network nasnet_mobile --head classification \\
        --format saved_model --seed 0 --output models/nasnet_mobile
    python -m pipeline.models inspect models/nasnet_mobile
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from models.catalog import FORMATS, HEADS, NETWORKS
from pipeline.options import OneLineParser
from storage import files
from storage.errors import RequestError


def parser() -> argparse.ArgumentParser:
    """The command line, one subcommand a verb."""
    result = OneLineParser(
        prog="python -m pipeline.models",
        usage="python -m pipeline.models VERB [flags]; VERB --help tells its flags",
        description="Make and look at models.",
    )
    verbs = result.add_subparsers(dest="verb", metavar="VERB", required=True)

    export = verbs.add_parser(
        "export",
        help="network + weights -> a model directory",
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

    inspect = verbs.add_parser("inspect", help="what a model is, as JSON on stdout")
    inspect.add_argument("model", metavar="MODEL")
    return result


def export(request: argparse.Namespace) -> None:
    """Write the model directory that `request` asks for. Raises RequestError."""
    if request.ema and not request.checkpoint:
        raise RequestError("--ema chooses among a checkpoint's values; give --checkpoint too")
    if files.occupied(request.output):
        raise RequestError(f"--output {request.output}: something is there already; give another")
    files.check_writable(files.absolute(request.output))
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
    write(spec, values, request.head, request.output)
    if request.archive:
        write_archive(request.output, request.archive)


def inspect(request: argparse.Namespace) -> None:
    """Print what the model `request.model` is. Raises RequestError."""
    from models.handles import resolve

    directory = resolve(request.model)
    from models.loading import LoadSpec, load

    info = load(LoadSpec(directory)).info
    told = {
        "format": info.format,
        "image_size": info.image_size,
        "outputs": dict(info.outputs),
        "signatures": list(info.signatures),
        "fingerprint": info.fingerprint,
    }
    sys.stdout.write(json.dumps(told, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one model command; returns the exit code: 0, or 2 where the request is wrong."""
    try:
        request = parser().parse_args(argv)
        {"export": export, "inspect": inspect}[request.verb](request)
    except RequestError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
