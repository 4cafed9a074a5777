"""Every knob of the job in one frozen, validated dataclass, and its command line.

Needs the standard library only, so that `--help` and a misspelt flag are answered at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from pipeline.beam_flags import BEAM_FLAGS
from storage.errors import RequestError
from storage.secrets import hide, know_flags

INPUT_FORMATS = (
    "auto",
    "tfrecord",
    "images",
    "parquet",
    "webdataset",
    "manifest",
    "failures",
)
IMAGE_FORMATS = ("jpeg", "png", "webp", "gif", "bmp", "tiff", "avif")
LARGEST_BATCH = 4096
_LARGEST = float.fromhex("0x1.fffffep127")  # of float32
SIZE_UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def knob(default: Any, help: str, *, why: str = "", **spec: Any) -> Any:
    """A field with what its flag needs: `help` for the user, `why` the default is what it is.

    `spec` goes to argparse (`metavar`, `choices`, `type`, `action`), but `names`: a comma-separated
    list, with the allowed values or () for any; and `shown`: the default in words.
    """
    metadata = {"help": help, "why": why, **spec}
    if isinstance(default, list):
        return field(default_factory=lambda: tuple(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def byte_size(text: str) -> int:
    """Bytes from a count with or without a unit: `4096`, `64MiB`, `1GiB`."""
    try:
        for unit, factor in SIZE_UNITS.items():
            if text.endswith(unit):
                return int(float(text[: -len(unit)]) * factor)
        return int(text)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number of bytes; give such as 4096, 64MiB or 1GiB"
        ) from None


def value_range_of(text: str) -> tuple[float, float]:
    """Two numbers with a comma between, the lower first, which float32 can tell apart."""
    try:
        low, high = map(float, text.split(","))
        if low < high and max(-low, high, high - low) <= _LARGEST:
            return low, high
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(
        f"{text!r} is no range; give two numbers, the lower first, such as 0,1 or -1,1"
    )


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a run is to do. Raises RequestError where values cannot stand (together)."""

    input: tuple[str, ...] = knob(
        [],
        "what to read: local path, directory (recursive), glob, gs:// or s3://; may be repeated",
        metavar="PATTERN",
        action="append",
    )
    input_format: str = knob(
        "auto",
        "how to read it; webdataset is tars, manifest is csv or jsonl with a `uri` in each row, "
        "failures tries again what failed in an earlier run's --output",
        choices=INPUT_FORMATS,
        why="by content and ending; parquet and webdataset where every file has its name "
        "(.parquet, .parq, .pq; .tar, .tar.gz, .tgz) and any of the first ones begins so; manifest "
        "where every one has its name (.csv, .jsonl, .ndjson) and any of the first is no picture; "
        "a directory that otherwise holds any file that is no TFRecord is images; failures is "
        "never guessed",
    )
    image_key: str = knob(
        "image/encoded",
        "feature or column that holds the encoded image; in a Parquet file bytes, or a struct of "
        "bytes and path; in a tar the extension of the member",
        metavar="NAME",
        why="the name in TensorFlow's ImageNet records; in a tar it means any image's extension",
    )
    id_key: str | None = knob(
        None,
        "feature, column or member that becomes the row's key; `__key__` is a tar's sample name",
        metavar="NAME",
        why="none: the key is the path, or URI#index in a container",
    )
    label_key: str | None = knob(
        "image/class/label",
        "feature or column that becomes the row's label, int64 or string, '' for none; in a tar "
        "the member of that extension, or the field of its json",
        metavar="NAME",
        why="the name in TensorFlow's ImageNet records; in a tar it means cls; absent labels are "
        "null",
    )
    columns: tuple[str, ...] = knob(
        [],
        "further features, columns, members or json fields to carry along as columns",
        metavar="NAMES",
        names=(),
    )
    limit: int | None = knob(
        None,
        "stop after about the first N images, those that resume skips counted too",
        metavar="N",
        type=int,
        why="none: read everything",
    )
    allow_http: bool = knob(
        False,
        "fetch what a manifest names by http(s); otherwise such rows are failures",
        action="store_true",
        why="a list from elsewhere should not make workers call any address",
    )
    allow_empty: bool = knob(
        False, "an input that matches nothing is a complete, empty run", action="store_true"
    )
    formats: tuple[str, ...] = knob(
        ["jpeg", "png", "webp", "gif", "bmp"],
        "picture formats that may be decoded; tiff and avif can be added",
        metavar="NAMES",
        names=IMAGE_FORMATS,
        why="what photographs come in; each further decoder is more code open to hostile bytes",
    )
    model: str = knob(
        "",
        "the model, TF1 hub.Module or TF2 SavedModel: catalogue name, TF Hub or Kaggle handle, "
        "http(s) .tar.gz, gs://, s3://, local directory or .tar.gz",
        metavar="HANDLE",
    )
    model_sha256: str | None = knob(
        None, "refuse a model archive with another digest", metavar="HEX"
    )
    image_size: int | None = knob(
        None,
        "side of the model's input in pixels, where the model takes any",
        metavar="S",
        type=int,
        why="none: as the model tells",
    )
    value_range: tuple[float, float] | None = knob(
        None,
        "range of the pixel values that the model takes: 0,1 or 0,255 or -1,1",
        metavar="LOW,HIGH",
        type=value_range_of,
        why="none: as the model's first operations tell",
    )
    allow_unsafe_ops: bool = knob(
        False, "run a model whose graph can reach files or the network", action="store_true"
    )
    outputs: tuple[str, ...] = knob(
        [],
        "vectors to write",
        metavar="NAMES",
        names=("embedding", "logits"),
        shown="all that the model has",
        why="one pass gives both",
    )
    top_k: int = knob(
        0, "also write the K highest classes and their softmax scores", metavar="K", type=int
    )
    class_names: str | None = knob(
        None, "file of class names, one a line, as many as logits", metavar="URI"
    )
    fit: str = knob(
        "stretch",
        "how a picture fills the model's square: stretch all of it; slim: central 87.5 %, then "
        "stretch; cover: short side to S, centre crop; pad: long side to S, black borders",
        choices=("stretch", "slim", "cover", "pad"),
        why="keeps every pixel of the picture in view",
    )
    filter: str = knob(
        "antialias",
        "resampling: antialias is Pillow's BILINEAR; bilinear takes two taps, as "
        "tf.image.resize(antialias=False)",
        choices=("antialias", "bilinear"),
        why="without antialiasing a reduced photograph is mostly skipped pixels",
    )
    jpeg_scaling: str = knob(
        "auto",
        "JPEG's scaled decoding to what is still at least twice the target both ways, with filter "
        "antialias; off: never",
        choices=("auto", "off"),
        why="large photographs decode several times faster for 0.1 to 0.2 levels of difference",
    )
    precision: str = knob(
        "float32",
        "arithmetic of the model",
        choices=("float32", "bfloat16"),
        why="equal to TF-Slim's networks; bfloat16 is about 1 % off and faster on CPUs with AMX or "
        "AMD's AVX-512 BF16, and for large networks on GPUs; any other CPU stays in float32, and "
        "the job says so",
    )
    engine: str = knob(
        "tensorflow",
        "what computes the model; openvino, on CPUs, needs the extra [openvino]",
        choices=("tensorflow", "openvino"),
        why="equal to TF-Slim's networks on any device; openvino is within 1e-5 of it in "
        "float32, and faster on some CPUs",
    )
    inference_threads: int | None = knob(
        None,
        "batches that run at once, on one CPU thread each",
        metavar="N",
        type=int,
        why="none: one for each core of a CPU, 2 on a GPU; give fewer where several processes "
        "share the cores",
    )
    batch_size: int | None = knob(
        None,
        "images a batch, always padded to this size",
        metavar="N",
        type=int,
        why="chosen for the device: 1 to 16 on CPU, whose cache holds no more; 128 or 256 on GPU",
    )
    gpu: str | None = knob(
        None,
        "on Dataflow, the GPU of the workers that run the model, as its service names it: "
        "nvidia-tesla-t4, nvidia-l4, ...; other runners use what GPU there is",
        metavar="TYPE",
        why="none: CPUs, unless Beam's flags ask for an accelerator",
    )
    embedding_dtype: str = knob(
        "float32",
        "element type of the written vectors",
        choices=("float32", "float16"),
        why="what the model computes, bit for bit",
    )
    vector_type: str = knob(
        "list",
        "Parquet type of the written vectors",
        choices=("list", "fixed_size_list"),
        why="every reader takes it; ClickHouse refuses fixed_size_list",
    )
    output: str = knob("", "where to write: local directory, gs:// or s3://", metavar="DIR")
    sink: str = knob(
        "parquet",
        "where rows go; null: they are made, counted and dropped, to see what bounds a run; then "
        "--output is not needed, nothing in it is touched, and the status is `counted`",
        choices=("parquet", "null"),
        why="the rows are what a run is for",
    )
    stop_after: str | None = knob(
        None,
        "with --sink null: end after this step; images that came through it are counted as "
        "`passed`",
        choices=("read", "decode"),
        why="none: all steps",
    )
    if_exists: str = knob(
        "error",
        "what to do where any object lies under the output: refuse, replace it once the new one "
        "is whole, or go on from what is finished",
        choices=("error", "overwrite", "resume"),
        why="nothing is lost by mistake",
    )
    retry_failures: bool = knob(
        False,
        "with resume: try again what failed in an earlier run and is read in this one",
        action="store_true",
    )
    rows_per_file: int | None = knob(
        None,
        "most rows in one file",
        metavar="N",
        type=int,
        why="none: files are bounded by bytes and by 60 s",
    )
    compression: str = knob(
        "zstd",
        "codec of the Parquet files",
        choices=("zstd", "snappy", "gzip", "none"),
        why="smallest at little CPU, and every reader has it",
    )
    max_failure_rate: float = knob(
        0.1,
        "largest share of failed images among those that the run takes on, 0 to 1; above it exit 3 "
        "and nothing is published; what had failed before and fails again does not count",
        metavar="SHARE",
        type=float,
        why="real sets hold a few bad files; a tenth means that something else is wrong",
    )
    on_damage: str = knob(
        "record",
        "damage inside a container, or one that cannot be read: one failure row a damaged place "
        "and read on where possible, or fail the run",
        choices=("record", "fail"),
        why="one bad sector should not cost the rest",
    )
    max_image_pixels: int = knob(
        89478485,
        "largest picture, in pixels; refused from the header, as is a side over 1048576",
        metavar="N",
        type=int,
        why="Pillow's own bound: 256 MiB of RGB",
    )
    max_image_bytes: int = knob(
        256 << 20,
        "largest encoded picture, in bytes (or with KiB, MiB, GiB)",
        metavar="BYTES",
        type=byte_size,
        why="256 MiB: several are held at once",
    )
    decode_isolation: str = knob(
        "process",
        "decode in processes of their own, so that a crash, a hang or a lack of memory in a "
        "decoder costs one picture; none: in the job's own threads, where it ends the run",
        choices=("process", "none"),
        why="seen to cost 6 % more CPU and 5 % more time for decoding, 1 to 2 % of the job's CPU",
    )
    decode_seconds: float = knob(
        30.0,
        "longest time to decode one picture in, by the clock, with decode_isolation process",
        metavar="SECONDS",
        type=float,
        why="five times what the slowest picture of --max_image_pixels took: for busy machines",
    )
    decode_memory: int | None = knob(
        None,
        "most memory to decode one picture in, in bytes (or with KiB, MiB, GiB), with "
        "decode_isolation process",
        metavar="BYTES",
        type=byte_size,
        why="none: 24 for each of --max_image_pixels, 2 GiB; 17 were the most seen (a float TIFF)",
    )
    quiet: bool = knob(
        False,
        "log neither progress, which comes every 30 s where workers are threads of this process, "
        "nor advice at the end",
        action="store_true",
    )
    dry_run: bool = knob(
        False, "check model, input, output and one image; run nothing", action="store_true"
    )

    def __post_init__(self) -> None:
        for name in ("input", "model", "output"):
            if not getattr(self, name) and (name, self.sink) != ("output", "null"):
                raise RequestError(f"--{name} is required; see --help")
        if "" in map(str.strip, self.input):
            raise RequestError(
                '--input "": names nothing, and the folder at hand would be read; was a variable '
                "empty?"
            )
        for name in (
            "limit",
            "image_size",
            "batch_size",
            "inference_threads",
            "rows_per_file",
            "max_image_pixels",
            "max_image_bytes",
            "decode_memory",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RequestError(f"--{name} {value}: must be at least 1")
        if self.batch_size is not None and self.batch_size > LARGEST_BATCH:
            raise RequestError(
                f"--batch_size {self.batch_size}: at most {LARGEST_BATCH}; memory would run out, "
                "and nothing is faster for it"
            )
        if not 0 < self.decode_seconds <= 86400:
            raise RequestError(
                f"--decode_seconds {self.decode_seconds:g}: more than 0, at most a day (86400)"
            )
        if not 0 <= self.max_failure_rate <= 1:
            raise RequestError(f"--max_failure_rate {self.max_failure_rate}: a share from 0 to 1")
        if self.top_k < 0:
            raise RequestError(f"--top_k {self.top_k}: must be 0 (none) or more")
        if self.class_names and not self.top_k:
            raise RequestError("--class_names names the classes of --top_k, which is 0; give both")
        if self.retry_failures and self.if_exists != "resume":
            raise RequestError("--retry_failures needs --if_exists resume: nothing else is kept")
        for name in ("if_exists", "rows_per_file", "compression"):
            if self.sink == "null" and getattr(self, name) != getattr(Options, name):
                raise RequestError(
                    f"--{name} {getattr(self, name)}: says how rows are written, and --sink null "
                    "writes none; leave it out"
                )
        for name in ("decode_seconds", "decode_memory"):
            if self.decode_isolation == "none" and getattr(self, name) != getattr(Options, name):
                raise RequestError(
                    f"--{name} {getattr(self, name)}: bounds the processes that decode, and "
                    "--decode_isolation none has none; leave one of them out"
                )
        if self.stop_after and self.sink != "null":
            raise RequestError(
                f"--stop_after {self.stop_after}: no rows would be there to write; give --sink null"
            )
        if self.gpu is not None and not re.fullmatch(r"[a-z0-9-]+", self.gpu):
            raise RequestError(f"--gpu {self.gpu}: a type alone, such as nvidia-tesla-t4")
        if self.model_sha256 and not re.fullmatch("[0-9a-f]{64}", self.model_sha256):
            raise RequestError(f"--model_sha256 {self.model_sha256}: 64 lower-case hex digits")
        if not self.formats:
            raise RequestError("--formats: at least one is needed, or no picture can be decoded")
        if self.gpu and self.engine == "openvino":
            raise RequestError(
                f"--gpu {self.gpu}: --engine openvino computes on CPUs, so it would idle; leave "
                "one of them out"
            )
        repeated = {name for name in self.columns if self.columns.count(name) > 1}
        if repeated:
            raise RequestError(f"--columns names {', '.join(sorted(repeated))} twice")

    def described(self) -> dict[str, Any]:
        """Every field by name, as JSON holds it, without credentials."""
        return {name: _described(value) for name, value in dataclasses.asdict(self).items()}


def _described(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_described(item) for item in value]
    return hide(value) if isinstance(value, str) else value


class OneLineParser(argparse.ArgumentParser):
    """A parser that raises RequestError where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        """Raise RequestError with `message`."""
        raise RequestError(message)


def names_list(allowed: Sequence[str]) -> Any:
    """A parser of comma-separated names; with `allowed`, of no others."""

    def parse(text: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
        unknown = [name for name in names if allowed and name not in allowed]
        if unknown:
            raise argparse.ArgumentTypeError(
                f"{', '.join(unknown)} is none of {', '.join(allowed)}"
            )
        return names

    return parse


def parser() -> argparse.ArgumentParser:
    """The command line of `pipeline.extract`, one flag a field of `Options`."""
    result = OneLineParser(
        prog="python -m pipeline.extract",
        usage="python -m pipeline.extract --input PATTERN --model HANDLE --output DIR [flags]",
        description="Extract image embeddings and logits to Parquet. Beam's own flags "
        "(--runner, --temp_location, ...) pass through.",
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=100),
    )
    for knob_field in dataclasses.fields(Options):
        spec = dict(knob_field.metadata)
        text = spec.pop("help") + _default_text(knob_field)
        spec.pop("why")
        spec.pop("shown", None)
        if "names" in spec:
            spec |= {"type": names_list(spec.pop("names")), "action": "extend"}
        result.add_argument(
            f"--{knob_field.name}", help=text.replace("%", "%%"), default=argparse.SUPPRESS, **spec
        )
    return result


def default_shown(knob_field: dataclasses.Field[Any]) -> str:
    """The default as help and README show it: `required`, `none`, `off` or the value."""
    if knob_field.name in ("input", "model", "output"):
        return "required"
    if "shown" in knob_field.metadata:
        return str(knob_field.metadata["shown"])
    if knob_field.default_factory is not dataclasses.MISSING:
        return ",".join(knob_field.default_factory()) or "none"
    if knob_field.default is None:
        return "none"
    if knob_field.default is False:
        return "off"
    return str(knob_field.default)


def _default_text(knob_field: dataclasses.Field[Any]) -> str:
    shown = default_shown(knob_field)
    return "" if shown == "off" else f" ({shown if shown == 'required' else 'default ' + shown})"


def joined(argv: Sequence[str]) -> list[str]:
    """`argv` with a range below 0 in one word with its flag, `--value_range=-1,1`.

    argparse would take it for a flag.
    """
    words: list[str] = []
    for word in argv:
        if words[-1:] == ["--value_range"] and re.match(r"-[\d.]", word):
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words


def parse(argv: Sequence[str]) -> tuple[Options, list[str]]:
    """`argv` as options and the flags that are Beam's. Raises RequestError for anything else."""
    known, rest = parser().parse_known_args(joined(argv))
    check_beam_flags(rest)
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(known).items()
    }
    return Options(**values), rest


def parse_beside_beam(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> tuple[argparse.Namespace, list[str]]:
    """What `parser` makes of `argv`, or of the command line, and Beam's flags in it.

    Those are taken out first: argparse would take the value of a flag that it does not know for a
    positional argument. Raises RequestError.
    """
    ours, beams = split_beam(sys.argv[1:] if argv is None else argv)
    request, unknown = parser.parse_known_args(ours)
    own = [name.removeprefix("--") for action in parser._actions for name in action.option_strings]
    check_beam_flags([*unknown, *beams], own)
    return request, beams


def split_beam(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of `argv` that are not Beam's, and its flags with their values.

    Credentials among all of them are remembered, so that no text will show them.
    """
    know_flags(argv)
    ours: list[str] = []
    beams: list[str] = []
    value_follows = False
    for word in argv:
        name, gives_value, _ = word.removeprefix("--").partition("=")
        is_beams = word.startswith("--") and name in BEAM_FLAGS
        (beams if is_beams or value_follows else ours).append(word)
        value_follows = is_beams and BEAM_FLAGS[name] and not gives_value
    return ours, beams


def check_beam_flags(rest: Sequence[str], own: Iterable[str] | None = None) -> None:
    """Refuse what neither we nor Beam know: Beam itself would drop it with a log line.

    Credentials among them are remembered, so that no text will show them. `own`: the names of the
    command's flags, of the job's if not given.
    """
    know_flags(rest)
    value_may_follow = False
    for word in rest:
        if not word.startswith("--"):
            if not value_may_follow:
                raise RequestError(
                    f"{word}: belongs to no flag; see --help, and quote what the shell would "
                    "expand, such as *.jpg"
                )
            value_may_follow = False
            continue
        name, gives_value, _ = word[2:].partition("=")
        if name not in BEAM_FLAGS:
            own = own or [knob_field.name for knob_field in dataclasses.fields(Options)]
            near = nearest_flag(name, [*own, *BEAM_FLAGS])
            raise RequestError(f"--{name}: no such flag, here or in Beam; {near}")
        value_may_follow = BEAM_FLAGS[name] and not gives_value


def nearest_flag(name: str, known: Iterable[str]) -> str:
    """What to do about a flag that there is not: the flag of `known` that is nearest, or --help."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean --{near[0]}?" if near else "see --help"


def options_table() -> str:
    """The README's table of flags, in Markdown."""
    rows = ["| flag | default | meaning |", "|---|---|---|"]
    for knob_field in dataclasses.fields(Options):
        meta = knob_field.metadata
        choices = f" ({', '.join(meta['choices'])})" if "choices" in meta else ""
        why = f". Default because: {meta['why']}" if meta["why"] else ""
        metavar = f" {meta['metavar']}" if "metavar" in meta else ""
        rows.append(
            f"| `--{knob_field.name}{metavar}` | {default_shown(knob_field)} "
            f"| {meta['help']}{choices}{why} |"
        )
    return "\n".join(rows)
