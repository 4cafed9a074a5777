"""Every knob: documented, validated, refused when misspelt, never a name that Beam uses."""

import dataclasses
import re
from pathlib import Path

import pytest

from pipeline import beam_flags, beam_options, models, options, preflight, readme
from pipeline.options import Options, parse
from storage.errors import RequestError

REQUIRED = ["--input", "a", "--model", "m", "--output", "o"]
FIELDS = dataclasses.fields(Options)
README = (Path(__file__).parents[1] / "README.md").read_text()
CONTRACT = {
    "input_format": "auto",
    "image_key": "image/encoded",
    "id_key": None,
    "label_key": "image/class/label",
    "columns": (),
    "limit": None,
    "allow_empty": False,
    "formats": ("jpeg", "png", "webp", "gif", "bmp"),
    "model_sha256": None,
    "outputs": (),
    "top_k": 0,
    "class_names": None,
    "fit": "stretch",
    "filter": "antialias",
    "jpeg_scaling": "auto",
    "precision": "float32",
    "batch_size": None,
    "embedding_dtype": "float32",
    "vector_type": "list",
    "if_exists": "error",
    "retry_failures": False,
    "rows_per_file": None,
    "compression": "zstd",
    "max_failure_rate": 0.1,
    "on_damage": "record",
    "max_image_pixels": 89478485,
    "max_image_bytes": 256 << 20,
    "dry_run": False,
}


@pytest.mark.parametrize("knob", FIELDS, ids=lambda f: f.name)
def test_every_knob_is_documented_and_its_default_explained(knob):
    assert knob.metadata["help"]
    switch = knob.default is False
    required = options.default_shown(knob) == "required"
    explained = knob.metadata["why"] or switch or required or options.default_shown(knob) == "none"
    assert explained or knob.default == 0


def test_the_documents_hold_what_is_generated():
    scale = readme.SCALE.read_text()
    assert (readme.rendered(README), readme.rendered(scale)) == (README, scale)
    assert all(text in README + scale for text in readme.parts().values())


def test_a_flag_for_each_field_and_no_other():
    told = set(re.findall(r"^ +(?:-h, )?--(\w+)", options.parser().format_help(), re.M))
    assert told == {knob.name for knob in FIELDS} | {"help"}


def test_no_flag_of_ours_is_one_of_beams():
    ours = {knob.name for knob in FIELDS}
    assert ours & set(beam_flags.BEAM_FLAGS) == {"dry_run"}


def test_beams_flags_are_those_of_the_installed_beam():
    assert beam_options.declared_flags() == beam_flags.BEAM_FLAGS


def test_the_defaults_that_the_contract_names():
    chosen, _ = parse(REQUIRED)
    assert {name: getattr(chosen, name) for name in CONTRACT} == CONTRACT


def test_defaults_and_lists():
    chosen, rest = parse([*REQUIRED, "--input=b", "--outputs", "logits, embedding,logits"])
    assert chosen.input == ("a", "b")
    assert chosen.outputs == ("logits", "embedding")
    assert chosen.max_image_bytes == 256 << 20
    assert rest == []


@pytest.mark.parametrize(
    ("text", "size"), [("10", 10), ("2KiB", 2048), ("1.5MiB", 3 << 19), ("1GiB", 1 << 30)]
)
def test_sizes_with_units(text, size):
    assert parse([*REQUIRED, "--max_image_bytes", text])[0].max_image_bytes == size


@pytest.mark.parametrize("text", ["-1,1", "-.5,0.5", "-2,-1", "0,1"])
def test_a_range_is_taken_in_one_word_or_two(text):
    low, high = map(float, text.split(","))
    for words in (["--value_range", text], [f"--value_range={text}"]):
        assert parse([*REQUIRED, *words])[0].value_range == (low, high)
        request = models.parser().parse_args(options.joined(["inspect", "m", *words]))
        assert request.value_range == (low, high)


@pytest.mark.parametrize(
    "flags",
    [
        ["--runner", "PrismRunner"],
        ["--temp_location=gs://b/t", "--max_num_workers", "3"],
        ["--no_use_public_ips", "--labels", "a=b", "--labels", "c=d"],
        ["--experiments=x", "--streaming"],
    ],
)
def test_beams_flags_pass_through(flags):
    assert parse([*REQUIRED, *flags])[1] == flags


def test_dry_run_is_ours_and_not_forwarded():
    chosen, rest = parse([*REQUIRED, "--dry_run"])
    assert chosen.dry_run
    assert rest == []


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--batchsize", "3"], "did you mean --batch_size?"),
        (["--max_num_worker", "3"], "did you mean --max_num_workers?"),
        (["--zzz"], "see --help"),
        (["photo.jpg"], "belongs to no flag"),
        (["--streaming", "photo.jpg"], "belongs to no flag"),
        (["--out", "x"], "--out"),
        (["--limit", "0"], "at least 1"),
        (["--limit", "-1,1"], "--limit: expected one argument"),
        (["--value_range", "--quiet"], "--value_range: expected one argument"),
        (["--limit", "many"], "many"),
        (["--max_failure_rate", "1.5"], "0 to 1"),
        (["--decode_seconds", "0"], "more than 0"),
        (["--decode_seconds", "nan"], "more than 0"),
        (["--decode_seconds", "inf"], "at most a day"),
        (["--decode_memory", "0"], "at least 1"),
        (["--decode_isolation", "thread"], "process"),
        (["--top_k", "-1"], "0 (none) or more"),
        (["--class_names", "f"], "--top_k"),
        (["--retry_failures"], "--if_exists resume"),
        (["--formats", ","], "at least one"),
        (["--columns", "a,b,a", "--limit", "0"], "at least 1"),
        (["--fit", "crop"], "crop"),
        (["--gpu", "type:nvidia-l4;count:1"], "a type alone"),
    ],
)
def test_what_cannot_stand_is_refused_in_one_line(flags, told):
    with pytest.raises(RequestError) as refused:
        parse([*REQUIRED, *flags])
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("missing", ["input", "model", "output"])
def test_what_is_required(missing):
    at = REQUIRED.index(f"--{missing}")
    with pytest.raises(RequestError, match=f"--{missing} is required"):
        parse([*REQUIRED[:at], *REQUIRED[at + 2 :]])


@pytest.mark.parametrize("name", [None, "DirectRunner", "directrunner", "Direct", "direct"])
def test_direct_runner_means_one_runner_however_it_is_spelt(name):
    assert preflight.runner_of(name) == preflight.DIRECT_RUNNER
    assert preflight.runner_of("PrismRunner") == "PrismRunner"


def test_a_flag_that_the_readme_lacks_is_seen():
    stale = README.replace("| `--fit`", "| `--crop`")
    assert stale != README
    assert readme.rendered(stale) != stale
