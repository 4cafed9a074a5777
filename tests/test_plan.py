"""A plan: its numbers by hand, what it refuses, and that every constant tells where it is from."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import results, throughput
from pipeline import figures, plan
from storage.errors import RequestError

ROOT = Path(__file__).parents[1]


def reckoned(*words: str, images: str = "1000000", model: str = "nasnet_mobile"):
    return plan.reckon(plan.parser().parse_args(["--images", images, "--model", model, *words]))


def test_a_run_on_cpus_by_hand():
    told = reckoned(
        *("--images_per_file", "10", "--workers", "10", "--vcpus", "8"),
        *("--cpu_seconds", "0.0076", "--decode_seconds", "0.0014"),
    )
    a_core = 0.0076 + 0.0014 + figures.OTHER_SECONDS.value + figures.OBJECT_SECONDS.value / 10
    rate = 8 * figures.VCPU.value / a_core
    assert told["bound_by"] == "vCPUs"
    assert told["images_per_second_per_worker"] == pytest.approx(rate, abs=0.05)
    assert told["seconds"]["work"] == pytest.approx(1e6 / rate / 10, rel=1e-3)
    assert told["seconds"]["listing"] == 2 * 100 * 0.1
    assert told["gpu_hours"] == 0
    assert told["vcpus_to_a_gpu"] is None
    assert told["workers"] == 10
    assert told["vcpu_hours"] == pytest.approx(8 * told["worker_hours"], rel=1e-2)
    assert told["output_bytes"] == 1e6 * (300 + 4 * (1056 + 1001))
    assert told["input_bytes"] == 1e6 * 110_000
    assert told["requests"]["lists"] == 200 + 24  # and the commit's three of some 8,000 files
    assert told["requests"]["reads"] == 200_000


def test_a_gpu_waits_for_the_vcpus_that_decode():
    flags = ("--gpu", "any", "--gpu_images_per_second", "2000", "--decode_seconds", "0.0207")
    flags += ("--price_gpu_hour", "1")
    flags += ("--images_per_file", "1000")
    told = reckoned(*flags)
    a_core = 0.0207 + figures.OTHER_SECONDS.value + figures.OBJECT_SECONDS.value / 1000
    assert told["bound_by"] == "vCPUs"
    assert told["images_per_second_per_worker"] == pytest.approx(4 / a_core, abs=0.05)
    wanted = told["vcpus_to_a_gpu"]
    assert wanted == -(-2000 * a_core // 0.5)
    enough = reckoned(*flags, "--vcpus", str(wanted))
    assert enough["bound_by"] == "GPU"
    assert enough["images_per_second_per_worker"] == 2000
    assert enough["gpu_hours"] == enough["worker_hours"] > 0
    assert reckoned(*flags, "--vcpus", str(wanted - 1))["bound_by"] == "vCPUs"


def test_bfloat16_on_a_gpu_has_a_plan_where_its_speed_is_given():
    flags = ("--gpu", "nvidia-l4", "--precision", "bfloat16", "--gpu_images_per_second", "9")
    assert reckoned(*flags)["images_per_second_per_worker"] == 9


def test_single_objects_are_opened_by_one_process_a_worker():
    """More vCPUs do not help, containers do."""
    flags = ("--gpu", "nvidia-tesla-t4", "--vcpus", "32")
    files, shards = reckoned(*flags), reckoned(*flags, "--images_per_file", "1000")
    assert files["bound_by"].startswith("one process")
    assert files["images_per_second_per_worker"] == pytest.approx(0.5 / 0.0039, abs=0.05)
    assert shards["images_per_second_per_worker"] > 5 * files["images_per_second_per_worker"]


def test_keys_in_the_commit_by_hand():
    """16 bytes of the digest and 9 to find repeats, against half of a worker's 30 GiB."""
    (row,) = (r for r in reckoned("--vcpus", "8")["limits"] if r["what"] == "keys in the commit")
    assert row["value"] == 25e6
    assert row["at"] == pytest.approx(15 * 2**30 / 25e6, rel=0.01)


def test_objects_of_s3_take_longer_to_open():
    gs, s3 = reckoned("--gpu", "nvidia-l4"), reckoned("--gpu", "nvidia-l4", "--store", "s3")
    assert gs["images_per_second_per_worker"] == pytest.approx(0.5 / 0.0039, abs=0.05)
    assert s3["images_per_second_per_worker"] == pytest.approx(0.5 / 0.010, abs=0.05)


def test_vectors_that_are_not_written_take_no_room():
    both, one = reckoned(), reckoned("--outputs", "embedding", "--embedding_dtype", "float16")
    assert one["output_bytes"] == 1e6 * (300 + 2 * 1056)
    assert one["output_bytes"] < both["output_bytes"] / 3


def test_prices_are_flags():
    names = [name for name in figures.PRICES if name != "gpu_hour"]
    free = [w for name in names for w in (f"--price_{name}", "0")]
    told = reckoned(*free)
    assert told["usd"]["run"] == told["usd_a_month"] == 0
    assert told["constants"]["price_vcpu_hour"]["source"] == "told by its flag"
    dear = reckoned(*free, "--gpu", "nvidia-l4", "--price_gpu_hour", "2", "--workers", "3")
    assert dear["usd"]["run"] == pytest.approx(2 * dear["gpu_hours"], abs=0.02)


def test_workers_come_from_the_hours():
    told = reckoned("--hours", "0.5")
    assert told["seconds"]["work"] <= 1800
    fewer = reckoned("--workers", str(told["workers"] - 1))
    assert fewer["seconds"]["work"] > 1800


def test_a_file_is_read_by_one_worker(capsys):
    """So nothing is quicker with more workers than files, and the plan warns of it."""
    alone = reckoned("--images_per_file", "1e6", "--workers", "1")
    words = ("--images_per_file", "1e6", "--workers", "100")
    many = reckoned(*words)
    assert many["hours"] == alone["hours"]
    assert many["images_per_second"] == alone["images_per_second"]
    assert (alone["bound_by"], alone["warnings"]) == ("vCPUs", [])
    assert many["bound_by"] == "files"
    (told,) = many["warnings"]
    assert "of 1 the busiest of 100 workers has 1, and 99 have none" in told
    assert plan.main(["--images", "1e6", "--model", "nasnet_mobile", *words]) == 0
    assert re.search(rf"\nwarning +{re.escape(told)}\n", capsys.readouterr().err)


def test_the_busiest_worker_bounds_a_run():
    """Of four files two workers read two each, and one of three workers still reads two."""
    two, three, four = (
        reckoned("--images_per_file", "250000", "--workers", n)["seconds"]["work"] for n in "234"
    )
    assert two == three == pytest.approx(2 * four, abs=0.1)


def test_no_more_workers_than_files_come_from_the_hours():
    told = reckoned("--images_per_file", "500000", "--hours", "0.01")
    assert told["workers"] == 2
    assert told["bound_by"] == "files"
    assert told["warnings"][0].startswith("--hours 0.01 is too short: a file is read by one")
    enough = reckoned("--images_per_file", "300000", "--hours", "0.5")  # four files, two each
    assert (enough["workers"], enough["warnings"]) == (2, [])
    assert enough["seconds"]["work"] <= 1800


def test_image_files_are_read_in_units():
    assert reckoned("--workers", "8", images="1280")["bound_by"] == "files"
    assert reckoned("--workers", "5", images="1280")["warnings"] == []


@pytest.mark.parametrize("images", ["1e6", "1e8", "1e10"])
def test_the_limits_come_in_their_order_and_larger_containers_move_the_first(images):
    files = reckoned(images=images)["limits"]
    shards = reckoned("--images_per_file", "5000", images=images)["limits"]
    for told in (files, shards):
        assert [row["at"] for row in told] == sorted(row["at"] for row in told)
    assert shards[0]["at"] > files[0]["at"]
    assert [row["what"] for row in files[:3]] == [
        "small files, for a reader",
        "files to resume",
        "listing in memory",
    ]


def test_files_to_resume_by_hand():
    """10.9 requests for each file on gs://, 8.0 on s3://, of 16 files at once, in two hours."""
    for store, requests in (("gs", 10.9), ("s3", 8.0)):
        told = reckoned("--store", store)
        (row,) = (r for r in told["limits"] if r["what"] == "files to resume")
        asked = told["output_files"] * requests / 16
        assert row["at"] == pytest.approx(7200 / (asked * 0.05), rel=0.01)


def test_limits_that_are_passed_are_told(capsys):
    assert plan.main(["--images", "1e12", "--model", "nasnet_mobile"]) == 0
    out, err = capsys.readouterr()
    limits = json.loads(out)["limits"]
    assert all(0 < row["at"] < 1 for row in limits)
    for row in limits:
        assert re.search(rf"{row['what']} +{row['at']:,}  PASSED\n", err)


def test_a_price_is_told_by_its_flag_even_where_it_equals_a_listed_one():
    told = reckoned("--gpu", "nvidia-l4", "--price_gpu_hour", "0.35")["constants"]
    assert told["price_gpu_hour"]["source"] == "told by its flag"
    listed = reckoned("--gpu", "nvidia-l4")["constants"]["price_gpu_hour"]
    assert (listed["value"], listed["source"] != "told by its flag") == (0.56, True)


@settings(max_examples=60, deadline=None)
@given(
    images=st.integers(1, 10**11),
    more=st.integers(2, 1000),
    workers=st.integers(1, 5000),
    per_file=st.integers(1, 10**5),
)
def test_more_images_never_cost_less(images, more, workers, per_file):
    flags = ("--workers", str(workers), "--images_per_file", str(per_file))
    small, large = (reckoned(*flags, images=str(n)) for n in (images, images * more))
    for name in ("hours", "output_bytes", "output_files", "manifest_bytes", "vcpu_hours"):
        assert small[name] <= large[name]
    assert small["usd"]["run"] <= large["usd"]["run"]
    room = {row["what"]: row["at"] for row in large["limits"]}
    assert all(room[row["what"]] <= row["at"] for row in small["limits"])


def test_every_network_and_precision_has_a_plan():
    from models.catalog import HUB_MODELS, NETWORKS

    for precision in ("float32", "bfloat16"):
        speeds = {
            name: reckoned("--precision", precision, model=name)["images_per_second_per_worker"]
            for name in NETWORKS
        }
        assert speeds["pnasnet_large"] < speeds["nasnet_large"] < speeds["nasnet_mobile"]
    handle = next(iter(HUB_MODELS))
    assert reckoned(model=handle)["images_per_second"]


def test_every_constant_tells_its_unit_and_source():
    told = {
        **reckoned()["constants"],
        **reckoned("--gpu", "nvidia-tesla-t4")["constants"],
    }
    assert {"decode_seconds", "model_seconds", "gpu_images_per_second", "price_gpu_hour"} <= set(
        told
    )
    for name, constant in told.items():
        assert constant["source"], name
        assert constant["unit"], name
    assert told["gpu_images_per_second"]["source"].startswith("ASSUMED")
    measured = [c["source"] for c in told.values() if "docs/" in c["source"]]
    assert measured
    for source in measured:
        assert (ROOT / source.split("docs/")[1].split(".md")[0].join(["docs/", ".md"])).exists()


def test_the_speeds_are_those_of_the_page():
    """By the runs of the machine that the figures name, in which two cores are busy."""
    (machine,) = (told for told, name in results._KNOWN.items() if name == "Zen 5")
    page = results.by_machine(ROOT, throughput.PART)
    (runs,) = (parts[throughput.PART] for told, parts in page.items() if machine in told)

    def seconds(name):
        return 2 / results.median(runs[name], "images_per_second")

    short = {"float32": "f32", "bfloat16": "bf16"}
    for (network, precision), figure in figures.MODEL_SECONDS.items():
        name = "bare" if network == "nasnet_mobile" else network
        assert figure.value == pytest.approx(seconds(f"{name}_{short[precision]}"), rel=0.05)
    decoding = results.median(runs["stage_decode"], "cpu_ms") / 1000  # as the job does it
    assert pytest.approx(decoding, rel=0.1) == figures.DECODE_SECONDS.value


def test_a_gpu_of_known_speed_wants_no_speed_of_a_cpu():
    known = ("--widths", "2048", "--gpu", "nvidia-l4", "--gpu_images_per_second", "900")
    told = reckoned(*known, model="resnet")
    assert "model_seconds" not in told["constants"]
    assert told["constants"]["gpu_images_per_second"]["value"] == 900


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--images", "1e308", "--model", "nasnet_mobile"], "too large"),
        (["--images", "1", "--model", "nasnet_mobile", "--vcpus", "9" * 400], "too large"),
        (
            [
                *("--images", "1", "--model", "nasnet_mobile", "--gpu", "nvidia-l4"),
                *("--gpu_images_per_second", "1e-320"),
            ],
            "too small",
        ),
        (["--images", "1", "--model", "resnet", "--widths", "9" * 5000], "--widths"),
        (["--images", "1e6"], "--model"),
        (["--images", "some", "--model", "nasnet_mobile"], "--images"),
        (["--images", "-5", "--model", "nasnet_mobile"], "--images"),
        (["--images", "1.5", "--model", "nasnet_mobile"], "--images"),
        (["--images", "1", "--model", "resnet"], "give --cpu_seconds and --widths"),
        (["--images", "1", "--model", "resnet", "--widths", "9"], "give --cpu_seconds"),
        (["--images", "1", "--model", "nasnet_mobile", "--gpu", "h900"], "--gpu_images_per_second"),
        (
            [
                *("--images", "1", "--model", "nasnet_mobile"),
                *("--gpu", "h900", "--gpu_images_per_second", "9"),
            ],
            "--price_gpu_hour",
        ),
        (["--images", "1", "--model", "nasnet_mobile", "--workers", "0"], "--workers 0"),
        *(
            (
                ["--images", "1", "--model", "nasnet_mobile", "--gpu_images_per_second", rate],
                f"--gpu_images_per_second {rate}",
            )
            for rate in ("0.0", "-1.0", "nan")
        ),
        (
            [
                *("--images", "1", "--model", "nasnet_mobile"),
                *("--gpu", "nvidia-l4", "--precision", "bfloat16"),
            ],
            "--precision bfloat16",
        ),
        (["--images", "1", "--model", "nasnet_mobile", "--hours", "-1"], "--hours"),
        (["--images", "1", "--model", "nasnet_mobile", "--hours", "nan"], "--hours nan"),
        (["--images", "inf", "--model", "nasnet_mobile"], "'inf' is no count"),
        (["--images", "1.5", "--model", "nasnet_mobile"], "'1.5' is no count"),
        (
            ["--images", "1", "--model", "nasnet_mobile", "--decode_seconds", "nan"],
            "--decode_seconds nan",
        ),
        (
            ["--images", "1", "--model", "nasnet_mobile", "--price_vcpu_hour", "-1"],
            "--price_vcpu_hour -1",
        ),
        (["--images", "1", "--model", "nasnet_mobile", "--pric_gpu_hour", "1"], "--pric_gpu_hour"),
        (
            ["--images", "1", "--model", "nasnet_mobile", "--worker", "3"],
            "--worker: no such flag; did you mean --workers?",
        ),
        (
            ["--images", "1", "--model", "nasnet_mobile", "--worker=3"],
            "--worker: no such flag; did you mean --workers?",
        ),
        (["--images", "1", "--model", "nasnet_mobile", "--zzz"], "--zzz: no such flag; see --help"),
        (["--images", "1", "--model", "nasnet_mobile", "--price_gpu_hour", "3"], "beside --gpu"),
        (
            ["--images", "1", "--model", "nasnet_mobile", "--gpu_images_per_second", "900"],
            "--gpu_images_per_second: counts beside --gpu only",
        ),
        (["--images", "1", "--model", "nasnet_mobile", "3"], "3: belongs to no flag"),
        *(
            (
                ["--images", "1", "--model", "nasnet_mobile", "--gpu", gpu, *speed],
                f"(did you mean nvidia-tesla-{gpu.lower()[-2:]}?); give {flag}",
            )
            for gpu, speed, flag in (
                ("t4", [], "--gpu_images_per_second"),
                ("nvidia-T4", ["--gpu_images_per_second", "9"], "--price_gpu_hour"),
            )
        ),
        (["--images", "1", "--model", "nasnet_mobile", "--widths", "a"], "--widths a"),
        (
            [
                *("--images", "1", "--model", "m", "--widths", "9", "--cpu_seconds", "1"),
                *("--outputs", "logits"),
            ],
            "--outputs logits",
        ),
    ],
)
def test_a_wrong_request_is_one_line_and_exit_2(capsys, words, told):
    assert plan.main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert told in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(("workers", "told"), [("1", "1 worker"), ("2", "2 workers")])
def test_one_worker_is_no_workers(capsys, workers, told):
    assert plan.main(["--images", "1e6", "--model", "nasnet_mobile", "--workers", workers]) == 0
    assert f" h with {told}, bound by " in capsys.readouterr().err


def test_a_model_of_ones_own():
    flags = ("--cpu_seconds", "0.02", "--widths", "512", "--outputs", "embedding")
    assert reckoned(*flags, model="mine")["output_bytes"] == 1e6 * (300 + 4 * 512)
    with pytest.raises(RequestError, match="--gpu_images_per_second"):
        reckoned(*flags, "--gpu", "nvidia-l4", model="mine")


def test_json_is_the_last_line_and_the_table_is_on_stderr(capsys):
    assert plan.main(["--images", "1e6", "--model", "nasnet_large", "--gpu", "nvidia-l4"]) == 0
    out, err = capsys.readouterr()
    told = json.loads(out.splitlines()[-1])
    assert len(out.splitlines()) == 1
    assert f"{told['gpu_hours']:,}" in err
    assert "assumed, not measured: " in err


def test_help_needs_the_standard_library_only():
    code = (
        "import sys\n"
        "from pipeline import plan\n"
        "plan.parser().format_help()\n"
        "plan.main(['--images', '1', '--model', 'nasnet_mobile'])\n"
        "heavy = {'numpy', 'apache_beam', 'tensorflow', 'pyarrow', 'PIL'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
