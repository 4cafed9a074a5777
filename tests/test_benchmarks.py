"""The benchmarks' bookkeeping: processes, results, tables. Nothing here measures speed."""

import os
import re
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest

from benchmarks import (
    bare,
    duel,
    gpu,
    growth,
    kernels,
    large_pictures,
    precision,
    processes,
    results,
    scaling,
    startup,
    targets,
    throughput,
)
from benchmarks.pictures import crops, write_records
from formats import image

SPAWNS = """
import json, subprocess, sys, time
child = "x = bytearray(200 << 20); print(flush=True); input()"
piped = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
children = [subprocess.Popen([sys.executable, "-c", child], **piped) for _ in range(3)]
for one in children:
    one.stdout.readline()
time.sleep(3)
for one in children:
    one.communicate(b"\\n")
print("chatter")
print(json.dumps({"images": 3, "first_at": time.time()}))
"""


def test_a_process_is_measured_with_what_it_starts():
    told = processes.run([sys.executable, "-c", SPAWNS])
    assert told["images"] == 3
    assert told["peak_mib"] > 600  # of all at once; the kernel tells of the largest one
    assert 0 < told["first"] <= told["seconds"]
    assert told["cpu"] > 0


LEAVES_ONE_BEHIND = """
import os, subprocess, sys, time
child = "import time\\nwhile time.process_time() < 1.5: pass\\nprint(flush=True)\\ntime.sleep(9)"
one = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE)
one.stdout.readline()
time.sleep(2)
print("{}", flush=True)
os._exit(0)
"""


def test_the_work_of_a_process_that_is_left_behind_counts():
    told = processes.run([sys.executable, "-c", LEAVES_ONE_BEHIND])
    assert told["cpu"] > 1


def test_the_first_file_tells_when_the_first_row_was_there(tmp_path):
    code = f"import time; time.sleep(0.2); open('{tmp_path}/part-1', 'w').close()"
    told = processes.run(
        [sys.executable, "-c", f"{code}; time.sleep(0.2); print('{{}}')"], tmp_path
    )
    assert 0.2 <= told["first"] <= told["seconds"]


def test_a_failure_is_told_with_its_last_words():
    with pytest.raises(RuntimeError, match="no such rival"):
        processes.run([sys.executable, "-c", "raise SystemExit('no such rival')"])


def test_what_hangs_is_killed():
    with pytest.raises(RuntimeError, match="ended with -9"):
        processes.run([sys.executable, "-c", "import time; time.sleep(60)"], limit=0.3)


def test_runs_add_up_on_disk_until_fresh_ones_replace_them(tmp_path):
    for rate in (1, 2):
        results.add(tmp_path, "part", "ours", {"rate": rate})
    runs = results.read(tmp_path)["part"]["ours"]
    assert [run["rate"] for run in runs] == [1, 2]
    assert {"machine", "versions", "commit", "load"} <= set(runs[0]["of"])
    results.add(tmp_path, "part", "rival", {"rate": 4})
    results.forget(tmp_path, "part", ["ours", "none"])
    results.add(tmp_path, "part", "ours", {"rate": 3})
    found = results.read(tmp_path)["part"]
    assert {name: [run["rate"] for run in runs] for name, runs in found.items()} == {
        "ours": [3],
        "rival": [4],
    }


def test_code_that_is_in_no_commit_is_told(monkeypatch, tmp_path):
    def git(*request):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=b", *request], check=True)

    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(results, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    for name in ("code.py", "docs/performance.json"):
        (tmp_path / name).write_text("before")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "All")
    (tmp_path / "docs/performance.json").write_text("after")
    assert re.fullmatch("[0-9a-f]+", results.circumstances()["commit"])
    (tmp_path / "code.py").write_text("after")
    assert results.circumstances()["commit"].endswith(", changed")


def test_a_table_replaces_its_own_part_of_the_page_alone(tmp_path, capsys):
    page = tmp_path / "docs" / "a.md"
    page.parent.mkdir()
    page.write_text(
        "a\n<!-- measured: x -->\nold\n<!-- end -->\nb\n<!-- measured: y -->\n<!-- end -->"
    )
    results.show(tmp_path, "x", r"new \1")
    assert page.read_text() == (
        "a\n<!-- measured: x -->\nnew \\1\n<!-- end -->\nb\n<!-- measured: y -->\n<!-- end -->"
    )
    assert capsys.readouterr().out == "new \\1\n"


def test_each_machine_has_a_table_of_its_own_the_last_first(tmp_path, monkeypatch, capsys):
    def add(machine, rate, fresh=False, cores=2):
        of = {"machine": machine, "at": str(rate), "cores": cores}
        monkeypatch.setattr(results, "circumstances", lambda cores: of)
        if fresh:
            results.forget(tmp_path, "part", ["ours"])
        results.add(tmp_path, "part", "ours", {"rate": rate})

    def make(runs):
        return " ".join(f"{name} {[run['rate'] for run in found]}" for name, found in runs.items())

    add("one", 1)
    results.show_each(tmp_path, "part", make)
    assert capsys.readouterr().out == "ours [1]\n"
    add("other", 2)
    add("one", 3)
    results.show_each(tmp_path, "part", make)
    assert capsys.readouterr().out == "On one:\n\nours [1, 3]\n\nOn other:\n\nours [2]\n"
    add("other", 4, fresh=True)
    results.show_each(tmp_path, "part", make)
    assert capsys.readouterr().out == "On other:\n\nours [4]\n\nOn one:\n\nours [1, 3]\n"
    add("other", 5, cores=16)
    results.show_each(tmp_path, "part", make)
    assert capsys.readouterr().out == (
        "On other, 16 cores:\n\nours [5]\n\nOn other, 2 cores:\n\nours [4]\n\n"
        "On one:\n\nours [1, 3]\n"
    )
    add("other", 6, cores=16, fresh=True)
    assert [run["rate"] for run in results.read(tmp_path)["part"]["ours"]] == [1, 3, 4, 6]


PAGE = {
    "throughput": (throughput.PART, throughput.table),
    "stages": (throughput.PART, throughput.stages),
    **{
        bench.PART: (bench.PART, bench.table)
        for bench in (duel, gpu, growth, kernels, large_pictures, precision, startup)
    },
    scaling.PART: (scaling.PART, lambda runs: scaling.table(runs["flink"])),
}


@pytest.mark.parametrize("place", PAGE)
def test_the_page_shows_what_was_measured(place):
    text = results.each(results.ROOT, *PAGE[place])
    assert pages().count(f"<!-- measured: {place} -->\n{text}\n<!-- end -->\n") == 1


def pages():
    return "".join(path.read_text() for path in results.ROOT.glob(results.PAGES))


def test_the_page_shows_every_target():
    text = targets.table(results.by_machine(results.ROOT))
    assert pages().count(f"<!-- measured: {targets.NAME} -->\n{text}\n<!-- end -->\n") == 1


def test_the_page_shows_the_ways_to_choose_from():
    text = throughput.overview(results.by_machine(results.ROOT))
    assert pages().count(f"<!-- measured: overview -->\n{text}\n<!-- end -->\n") == 1


def test_every_part_of_the_pages_is_made_by_a_benchmark():
    made = re.findall("<!-- (measured|generated): (.*) -->", pages())
    assert len(made) == pages().count("<!-- end -->")
    measured = sorted(name for kind, name in made if kind == "measured")
    assert measured == sorted([*PAGE, targets.NAME, "overview"])


def test_median_and_spread_pass_over_what_was_not_measured():
    runs = [{"s": 3.0}, {"s": None}, {"s": 1.0}, {}, {"s": 2.0}]
    assert results.median(runs, "s") == 2
    assert results.spread(runs, "s", 1) == "2.0 (1.0 to 3.0)"
    assert results.spread(runs, "other") == "-"


OF = {
    "cores": 2,
    "machine": "m",
    "python": "3",
    "versions": {},
    "commit": "c",
    "at": "t",
    "load": 0,
}


def ran(*rates, cpu_ms=8.0):
    """Runs of an hour each."""
    common = {"cpu_ms": cpu_ms, "peak_mib": 1.0, "first": 5.0, "images": 10_000}
    return [
        {"images_per_second": rate, **common, "of": {**OF, "at": f"2026-01-01 {hour:02}:00"}}
        for hour, rate in enumerate(rates)
    ]


def rival(lanes, plain):
    return {"tfdata_bf16": ran(lanes), "tfdata_bf16_plain": ran(plain)}


def held(**parts):
    """The targets over `parts`, of those measured: figure, bounds and verdict by what is shown."""
    found = [target for target in targets.every(parts) if target.measured is not None]
    return {one.shown: [one.figure, one.wanted, one.verdict] for one in found}


def test_a_line_holds_a_target_against_every_machine():
    fast = {"ours_bf16": ran(120), "tfdata_bf16_small": ran(80), **rival(100, 110)}
    machines = {
        "AMD EPYC, family 26 model 2, 24 GiB": {"throughput": fast},
        "another": {"throughput": {"ours_bf16": ran(90), "tfdata_bf16": ran(100)}},
        "a third": {"throughput": {"ours_bf16": ran(130), **rival(100, 80)}},
        "untried": {},
    }
    assert "| (a) tf.data + frozen graph, bfloat16 | 110 | 100 | 100 |  |" in (
        throughput.overview(machines)
    )
    assert throughput.overview(machines).splitlines()[:2] == [
        "| images/s | Zen 5 | another | a third | untried |",
        "|---|---|---|---|---|",
    ]
    assert "| ours, `--precision bfloat16` | 120 | 90 | 130 |  |" in throughput.overview(machines)
    assert targets.table(machines).splitlines() == [
        "| | wanted | Zen 5 | another | a third | untried |",
        "|---|---|---|---|---|---|",
        "| bfloat16 / rival (a), same pixels | at least 1.05 | 1.09 | **0.90** | 1.30 ? |  |",
        "",
        "?: what did not run there: tfdata_bf16_small.",
    ]


def test_targets_are_of_runs_near_in_time_and_told_where_both_sides_ran():
    runs = {
        "ours_bf16": ran(210, 220, 260),
        "ours_bf16_embedding": ran(230),
        "tfdata_bf16": ran(200, 200, 200),
        "tfdata_bf16_small": ran(100, 100),
        "tfdata_bf16_plain": ran(100, 100),
        "tfdata_signature": ran(130),
        "decode": ran(1000, cpu_ms=1.0),
        "bare_bf16": ran(250, cpu_ms=7.0),
    }
    cost = "cost of embedding + logits / embedding alone, bfloat16"
    assert held(throughput=runs) == {
        "bfloat16 / rival (a), same pixels": ["1.10", "at least 1.05", "met"],
        "bfloat16 / signature in float32": ["1.62", "at least 1.8", "missed"],
        "bfloat16, share of what the cores allow": ["0.860", "at least 0.92", "missed"],
        cost: ["1.095", "at most 1.03", "missed"],
    }


def test_nothing_is_met_before_all_ways_of_the_rival_ran():
    def verdict():
        (row,) = held(throughput=runs).values()
        return row

    runs = {"ours_bf16": ran(120), "tfdata_bf16": ran(100)}
    assert verdict() == ["1.20", "at least 1.05", "not shown"]
    runs["tfdata_bf16_plain"] = ran(110)
    assert verdict() == ["1.09", "at least 1.05", "not shown"]
    runs["tfdata_bf16_small"] = ran(90)
    assert verdict() == ["1.09", "at least 1.05", "met"]
    for one in runs["ours_bf16"]:
        one["images"] = 2000
    assert verdict() == ["1.09", "at least 1.05", "not shown"]
    runs = {"nasnet_large_bf16": ran(12), "timm_nasnet_large_bf16_lanes": ran(11)}
    assert verdict() == ["1.09", "at least 1.2", "missed"]


def grown(images, cpu, peak_mib, hour=0, seconds=None, **more):
    of = {**OF, "at": f"2026-01-01 {hour:02}:00"}
    figures = {"images": images, "seconds": seconds or cpu / 2, "cpu": cpu, "peak_mib": peak_mib}
    return {**figures, **more, "of": of}


def test_growth_is_held_within_an_hour_memory_by_the_worst_pair():
    runs = {
        "base": [grown(500, 10, 900)],
        "small": [grown(2000, 40, 1000), grown(2000, 44, 900), grown(2000, 20, 500, hour=9)],
        "huge": [grown(50000, 1029.7, 1000)],
        "large": [grown(20000, 400, 1000), grown(20000, 400, 1300, hour=20)],
    }
    expected = {
        "peak, 20,000 images / 2,000": ["1.11", "at most 1.1", "missed"],
        "peak at 20,000 images, the last, MiB (1.2 GB)": ["1300", "at most 1144", "missed"],
        "CPU time an image, 50,000 images / 2,000": ["1.03", "at most 1.05", "met"],
        "share of the cores kept busy, 50,000 images": ["1.00", "at least 0.95", "met"],
    }
    assert held(growth=runs) == expected
    runs["small"].append(grown(200, 40, 10))  # what is said to be of 2,000 images is of no other
    runs["huge"].append(grown(50000, 3000, 1000, precision="float32"))
    assert held(growth=runs) == expected


def test_one_file_that_is_one_thread_is_seen():
    runs = {"base": [grown(500, 10, 900)], "one_shard": [grown(10000, 200, 900, seconds=195)]}
    shown = "share of the cores kept busy, one TFRecord file"
    assert held(growth=runs) == {shown: ["0.50", "at least 0.95", "missed"]}


def test_starts_and_large_pictures_are_held_against_their_bounds():
    starts = [{"import tensorflow": 5.0, "first row": first} for first in (4.98, 7.5, 4.97)]
    sizes = [{"times": 3.9, "mean_levels": 0.2}]
    assert held(startup={"nasnet_mobile": starts}, large_pictures={"224": sizes}) == {
        "nasnet_mobile: first row, seconds after TensorFlow's import": ["0.0", "at most 2", "met"],
        "12 megapixels to 224, scaled decoding, times faster": ["3.9", "at least 4", "missed"],
        "12 megapixels to 224, mean difference in levels": ["0.20", "at most 0.5", "met"],
    }


def test_runs_more_than_an_hour_apart_are_not_held_against_each_other():
    mine, later = ran(100), ran(50, 50, 50)[2:]
    assert results.paired(mine, later, "images_per_second") is None
    assert results.paired(mine, [], "images_per_second") is None
    ways = {"tfdata_bf16_small": ran(80), "tfdata_bf16_plain": later}
    runs = {"ours_bf16": mine, "tfdata_bf16": ran(80), **ways}
    assert held(throughput=runs) == {
        "bfloat16 / rival (a), same pixels": [
            "1.25",
            "at least 1.05",
            "not shown",
        ]
    }


def test_runs_of_other_precisions_are_not_held_against_each_other():
    mine, other = ran(100), ran(50)
    mine[0]["precision"], other[0]["precision"] = "float32", "bfloat16"
    assert results.paired(mine, other, "images_per_second") is None
    assert results.worst(mine, other, "images_per_second") is None


def test_hours_are_hours_when_clocks_are_put_back(monkeypatch):
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        early, late = ({"of": {"at": f"2026-10-25 {hour}:30"}} for hour in ("01", "03"))
        assert results.at(late) - results.at(early) == 2 * 3600
    finally:
        monkeypatch.undo()
        time.tzset()


# ---------------------------------------------------------------- one turn of a contender


def turn(monkeypatch, tmp_path, contender, **wrong):
    """What `measure` makes of a contender that starts in 5 s and takes 8 ms an image; commands."""
    commands = []

    def run(command, watch=None):
        commands.append(command)
        images = int(command[1])
        told = {"images": images, "seconds": 5 + images * 0.004, "cpu": 7 + images * 0.008}
        first = 4.0 if watch else 6.0
        more = {"peak_mib": 900 + images / 100, "first": first, "failures": 0}
        steady = {"steady_seconds": 2.0, "steady_cpu": 4.0}
        return {**told, **more, **steady, **wrong}

    monkeypatch.setattr(throughput, "run", run)
    for write in ("write_records", "write_files"):
        monkeypatch.setattr(throughput, write, lambda folder, images, shards=0: str(images))
    place = throughput.Place(tmp_path)
    return throughput.measure(contender, place, (500, 10500), 4, ["pinned"]), commands


def command(place, records):
    return [records]


def test_what_counts_is_what_more_images_cost(monkeypatch, tmp_path):
    told, commands = turn(monkeypatch, tmp_path, throughput.Contender("ours", command))
    assert told == pytest.approx(
        {
            "images_per_second": 250,
            "cpu_ms": 8,
            "peak_mib": 1005,
            "first": 6,
            "small_seconds": 7,
            "images": 10000,
        }
    )
    assert commands == [["pinned", "500"], ["pinned", "10500"]]


def test_the_first_row_comes_from_a_run_of_its_own(monkeypatch, tmp_path):
    contender = throughput.Contender("ours", command, first=("--limit", "16"), share=0.2)
    told, commands = turn(monkeypatch, tmp_path, contender)
    assert (told["first"], told["images"]) == (4, 2000)
    assert commands[1:] == [["pinned", "2500"], ["pinned", "500", "--limit", "16"]]


def test_a_function_alone_times_itself(monkeypatch, tmp_path):
    told, _ = turn(monkeypatch, tmp_path, throughput.Contender("bare", command, steady=True))
    assert (told["images_per_second"], told["cpu_ms"]) == (250, 8)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"failures": 1}, "499 images of 500"),
        ({"images": 400}, "400 images of 500"),
        ({"seconds": 9}, "10500 images cost no more than 500"),
    ],
)
def test_no_figure_is_made_of_pictures_that_failed_or_of_noise(monkeypatch, tmp_path, wrong, says):
    with pytest.raises(RuntimeError, match=says):
        turn(monkeypatch, tmp_path, throughput.Contender("ours", command), **wrong)


def test_pictures_are_the_same_again_and_their_bytes_never(tmp_path):
    pattern = write_records(tmp_path, 6, 2)
    found = list(bare.encoded(pattern))
    assert len(found) == len(set(found)) == 6
    made = {image.decode_image(data, image.Preprocessing(32))[0].tobytes() for data in found}
    assert made == {
        image.decode_image(data, image.Preprocessing(32))[0].tobytes() for data in crops()[:6]
    }
    assert write_records(tmp_path, 6, 2) == pattern


def test_models_of_other_code_are_not_measured(tmp_path, monkeypatch):
    made = []

    def make(command, check):
        made.append(command)
        open(command[-1], "w").close()

    monkeypatch.setattr(throughput.subprocess, "run", make)
    place = throughput.Place(tmp_path)
    path = place.prepared()
    assert (place.prepared(), len(made)) == (path, 2)  # of the model, which was made for it
    monkeypatch.setattr(throughput, "_source", lambda: "changed")
    assert place.prepared() != path
    assert len(made) == 4


def test_a_stage_costs_what_it_adds():
    runs = {
        "stage_read": ran(1, cpu_ms=0.5),
        "stage_decode": ran(1, cpu_ms=2.5),
        "stage_infer_bf16": ran(1, cpu_ms=10.0),
        "ours_bf16": ran(1, cpu_ms=10.25),
    }
    cells = [row.split("|")[2].strip() for row in throughput.stages(runs).splitlines()[2:]]
    assert cells == ["0.50", "2.00", "7.50", "0.25", "10.25", "-", "-"]
    runs["ours_bf16"] = ran(1, 1, 1, cpu_ms=9.0)[1:]  # an hour later, and two
    cells = [row.split("|")[2].strip() for row in throughput.stages(runs).splitlines()[2:]]
    assert cells[3:5] == ["-1.00", "9.00"]
    runs["ours_bf16"] = runs["ours_bf16"][1:]
    cells = [row.split("|")[2].strip() for row in throughput.stages(runs).splitlines()[2:]]
    assert cells[3:5] == ["-", "-"]


def test_contenders_run_side_by_side_each_on_cores_of_its_own(tmp_path, monkeypatch, capsys):
    busy, most = Counter(), []

    def measure(contender, place, images, shards, prefix):
        assert prefix[:2] == ["taskset", "--cpu-list"]
        busy.update([place.into, *prefix[2].split(",")])
        most.append(len(busy))
        assert max(busy.values()) == 1
        time.sleep(0.05)
        for used in (place.into, *prefix[2].split(",")):
            del busy[used]
        return {"images_per_second": 2.0, "cpu_ms": 1.0, "peak_mib": 1, "images": 9, "first": 1}

    monkeypatch.setattr(throughput, "measure", measure)
    monkeypatch.setattr(throughput, "make", lambda *_: {})
    monkeypatch.setattr(throughput.os, "sched_getaffinity", lambda pid: set(range(5)))
    folders = ["--work", str(tmp_path), "--results", str(tmp_path)]
    command = ["throughput", "--only", "*_f32", "--repeat", "2", "--cores_each", "2", *folders]
    monkeypatch.setattr("sys.argv", command)
    throughput.main()
    found = results.read(tmp_path)["throughput"]
    assert set(map(len, found.values())) == {2}
    assert {one["of"]["cores"] for runs in found.values() for one in runs} == {2}
    assert max(most) == 6  # two contenders, each with a folder and two cores
    monkeypatch.setattr("sys.argv", [*command, "--cores_each", "6"])
    with pytest.raises(SystemExit):
        throughput.main()
    assert "may run on 5 only" in capsys.readouterr().err


def test_turns_alternate_and_what_fails_is_told_and_forgotten(tmp_path, monkeypatch, capsys):
    order, broken = [], []

    def measure(contender, place, images, shards, prefix):
        order.append((contender.shown, prefix))
        if contender.shown in broken:
            raise RuntimeError("no compiler")
        return {"images_per_second": 2.0, "cpu_ms": 1.0, "peak_mib": 1, "images": 9, "first": 1}

    def main(*flags):
        folders = ["--work", str(tmp_path), "--results", str(tmp_path)]
        monkeypatch.setattr("sys.argv", ["throughput", *folders, *flags])
        throughput.main()
        return {name: len(found) for name, found in results.read(tmp_path)["throughput"].items()}

    monkeypatch.setattr(throughput, "measure", measure)
    monkeypatch.setattr(throughput, "make", lambda *_: {})
    monkeypatch.setattr(throughput.os, "sched_getaffinity", lambda pid: {0, 1, 2})
    two = ("--only", "ours_f32", "decode")
    assert main(*two, "--repeat", "2") == {"ours_f32": 2, "decode": 2}
    shown = [throughput.CONTENDERS[name].shown for name in ("ours_f32", "decode")]
    assert order == [(name, []) for name in [*shown, *shown[::-1]]]
    order.clear()
    assert main("--only", "decode", "--cores_each", "2", "--fresh") == {
        "ours_f32": 2,
        "decode": 3,
    }  # the others were of three cores
    assert order == [(shown[1], ["taskset", "--cpu-list", "0,1"])]
    broken.append(shown[1])
    with pytest.raises(SystemExit, match="no figure of decode"):
        main(*two, "--fresh")
    found = results.read(tmp_path)["throughput"]
    assert [(name, len(runs)) for name, runs in found.items()] == [("ours_f32", 1), ("decode", 1)]
    header = throughput.overview({"family 26 model 2, 2 GiB, 8 cores": {}, "family 0": {}})
    assert header.startswith("| images/s | Zen 5, 8 cores | family 0 |")
    with pytest.raises(SystemExit) as ended:
        main("--only", "their_f32")
    assert ended.value.code == 2
    assert "no contender has such a name" in capsys.readouterr().err


def test_growth_takes_start_up_off():
    (now,), (_, later) = ran(1), ran(1, 1)
    runs = {
        "base": [{"images": 500, "seconds": 10, "cpu": 15, "peak_mib": 900, "of": now["of"]}],
        "small": [{"images": 2000, "seconds": 20, "cpu": 30, "peak_mib": 950, "of": now["of"]}],
    }
    runs["base"].append({**runs["base"][0], "cpu": 25, "of": later["of"]})
    assert "| small | 2000 | 150 | 10.00 | 0.75 | 950 |" in growth.table(runs)
    runs["small"][0]["of"] = later["of"]  # its start was slower at that time
    assert "| small | 2000 | 150 | 3.33 | 0.25 | 950 |" in growth.table(runs)


def test_scaling_is_told_where_engines_are(tmp_path):
    runs = [
        {"one": 50.0, "two": two, "ratio": two / 50, "start_up": 9.6, "of": OF}
        for two in (95, 90, 97)
    ]
    text = scaling.table(runs)
    assert "| 50.0 | 95.0 | 1.90 | 10 | 0 |\n" in text
    assert "\n\nMedian ratio 1.90. m, 2 cores" in text
    page = tmp_path / "docs" / "ENGINES.md"
    page.parent.mkdir()
    page.write_text((results.ROOT / "docs" / "ENGINES.md").read_text())
    results.show(tmp_path, scaling.PART, text)
    assert f"<!-- measured: scaling -->\n{text}\n<!-- end -->" in page.read_text()


def test_units_are_many_enough_for_two_workers_to_share_them_by_hash():
    larger = [
        max(n, scaling.SHARDS - n)
        for n in np.random.default_rng(0).binomial(scaling.SHARDS, 0.5, 2001)
    ]
    assert scaling.SHARDS / np.median(larger) > 1.9


def test_vectors_are_compared_photograph_by_photograph():
    exact = np.array([[3.0, 4.0], [0.0, 10.0]])
    told = precision.compare(np.array([[3.0, 4.0], [0.5, 9.0]]), exact)
    assert told["least_cosine"] == pytest.approx(9 / np.hypot(0.5, 9))
    assert told["largest_error"] == pytest.approx(0.1)
    assert told["relative_length"] == pytest.approx(np.hypot(0.5, 1) / 10)
    assert told["same_largest"] == 1


def test_both_sides_of_every_ratio_are_contenders():
    rates = {name: ran(100) for name in throughput.CONTENDERS}
    assert len(held(throughput=rates)) == 33
    assert throughput.table(rates).count("\n| ") == len(throughput.CONTENDERS)


def test_kernels_are_told_by_their_ratios(tmp_path, monkeypatch):
    """Each network by oneDNN's and by each of ours, in turn, of which this CPU would take one."""
    networks = []

    class Model:
        info = None

    def loaded(prepared, width):
        networks.append((prepared, width))
        return Model()

    by_turn = [[20.0, 17.0, 18.0], [22.0, 18.0, 19.0], [21.0, 18.9, 21.0]]
    monkeypatch.setattr(kernels, "load_by", loaded)
    monkeypatch.setattr(kernels, "measure", lambda _, turns, __: (by_turn[:turns], [0.0, 2e-7]))
    monkeypatch.setattr(kernels, "compiled_width", lambda: 16)
    monkeypatch.setattr(kernels, "register", lambda width: True)
    monkeypatch.setattr(kernels, "chosen_width", lambda: 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1})
    monkeypatch.setattr(throughput.Place, "prepared", lambda place, network: network)
    into = ["--work", str(tmp_path), "--results", str(tmp_path), "--turns", "3"]
    monkeypatch.setattr(sys, "argv", ["kernels", *into])
    kernels.main()
    assert networks == [("nasnet_mobile", width) for width in (0, 16, 8)]
    rows = kernels.table(results.read(tmp_path)[kernels.PART]).splitlines()
    assert (
        "vectors of 16 (AVX-512) | 0.85 (0.82 to 0.90) | 18.0 / 21.0 | same bits | 3 |" in rows[2]
    )
    assert " of 8 (AVX2) | 0.90 (0.86 to 1.00) | 19.0 / 21.0 | 2e-07 apart | 3 |" in rows[3]


def test_two_at_a_time_are_told_by_their_ratios(tmp_path, monkeypatch):
    """Each core has each of them as often as the other; ratios are of one turn."""
    asked = []

    def measured(contender, place, images, shards, prefix):
        asked.append((contender.shown, place.output.name, prefix[-1]))
        return {"cpu_ms": 20.0 if contender.shown == "ours, float32" else 25.0}

    monkeypatch.setattr(duel, "measure", measured)
    place = throughput.Place(tmp_path)
    names = ("ours_f32", "tfdata_f32")
    turns = [duel.duel(names, cores, place, (5, 50)) for cores in ((0, 1), (1, 0))]
    assert turns == [[20, 25], [20, 25]]
    assert len({into for _, into, _ in asked[:2]}) == 2
    assert len(set(asked)) == 4
    of = ran(1)[0]["of"]
    runs = {"ours_f32 / tfdata_f32": [{"cpu_ms": a, "other_cpu_ms": b, "of": of} for a, b in turns]}
    row = duel.table(runs).splitlines()[2]
    assert "ours, float32 / tf.data + frozen, float32 | 0.80 (0.80 to 0.80) |" in row
