"""An overview as one HTML page that needs nothing else: no script, no address, no font."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from formats.overview import Overview, Vectors
from formats.timing import advice

_ROWS = 12  # of a table of most frequent values
_BARS = 24
_WIDE = 30  # times the least value: a histogram by powers tells more
# Okabe and Ito's, which the colour-blind tell apart; grey for all others.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#f0e442")
_OTHER = "#999999"
_Cell = str | tuple[str, str]  # HTML, or its class and HTML
_STYLE = """
:root { color-scheme: light dark; --ink: #222; --paper: #fff; --line: #8884; --bar: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --ink: #ddd; --paper: #16181c; --bar: #56b4e9; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; } th { white-space: nowrap; }
th, td { text-align: left; padding: .15rem .9rem .15rem 0;
  border-bottom: 1px solid var(--line); vertical-align: top; overflow-wrap: anywhere; }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.counts { display: flex; flex-wrap: wrap; gap: 2.5rem; } .counts b { display: block;
  font-size: 1.7rem; font-variant-numeric: tabular-nums; }
.side { display: flex; flex-wrap: wrap; gap: 2.5rem; } svg { max-width: 100%; height: auto; }
text { fill: var(--ink); font-size: 11px; } .bar { fill: var(--bar); }
.axis { stroke: var(--line); } small, .muted { opacity: .75; }
.dot { display: inline-block; width: .7em; height: .7em;
  border-radius: 50%; margin-right: .3em; } p.key { margin: .2rem 0; }
"""


def page(output: str, overview: Overview) -> str:
    """The page of `overview`, which is of `output`; every text in it is escaped."""
    manifest = overview.manifest
    parts = [
        f"<h1>{escape(output)}</h1>",
        _head(manifest),
        _failures(overview),
        _time(manifest["timing"], manifest.get("options", {}), manifest["model"]["outputs"])
        if manifest.get("timing", {}).get("images")
        else "",
        _pictures(overview),
        *(_vectors(name, found) for name, found in overview.vectors.items()),
        _classes(overview),
        _map(overview),
        _alike(overview),
        _made_by(manifest),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(output)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(filter(None, parts))
        + "\n</body></html>\n"
    )


# ---------------------------------------------------------------- sections


def _head(manifest: Mapping[str, Any]) -> str:
    counts, run = manifest["counts"], manifest["run"]
    of = manifest.get("judged") or counts  # a run that was not published keeps its failures alone
    share = of["failures"] / of["images"] if of["images"] else 0.0
    told = {
        "images": f"{counts['images']:,}",
        "features": f"{counts['features']:,}",
        "failures": f"{counts['failures']:,}",
        "failed": f"{share:.2%}",
    }
    big = "".join(f"<div><b>{value}</b>{name}</div>" for name, value in told.items())
    new = ", ".join(f"{run[name]:,} {name}" for name in ("images", "failures", "skipped"))
    size = sum(entry["bytes"] for entry in manifest["files"])
    line = (
        f"run {manifest['run_id']}, {manifest['status']}; of this run {new}; "
        f"data files: {len(manifest['files']):,}, {_bytes(size)}"
    )
    warnings = "".join(f"<p>{escape(text)}</p>" for text in manifest.get("warnings", ()))
    return f'<div class="counts">{big}</div><p class="muted">{escape(line)}</p>{warnings}'


def _failures(overview: Overview) -> str:
    reasons = overview.manifest["failures_by"]
    if not reasons:
        return ""
    whole = sum(reasons.values())
    rows: list[list[_Cell]] = []
    for reason, count in sorted(reasons.items(), key=lambda item: (-item[1], item[0])):
        examples = "".join(
            f'<p class="key">{escape(key)}<br><small>{escape(message)}</small></p>'
            for key, message in overview.examples.get(reason, ())
        )
        rows.append([escape(reason), _number(count), _number(f"{count / whole:.1%}"), examples])
    return "<h2>Failures</h2>" + _table(["reason", "images", "share", "such as"], rows)


def _time(timing: Mapping[str, Any], options: Mapping[str, Any], outputs: Mapping[str, int]) -> str:
    steps = {name: timing[f"{name}_ms"] / 1000 for name in ("read", "wait", "inference")}
    rest = max(0.0, timing["carry_ms"] / 1000 - sum(steps.values()))
    shown = {
        "reading": steps["read"],
        "waiting for decoded pictures": steps["wait"],
        "in the model": steps["inference"],
        "writing and the rest": rest,
    }
    decode = timing["decode_ms"]
    fill = timing["batch_fill"]
    facts = [
        f"{timing['images']:,} pictures of {_bytes(timing['bytes'])} decoded, half of them in "
        f"{decode['p50']:g} ms and 95 % in {decode['p95']:g} ms",
        f"{timing['batches']:,} batches" + ("" if fill is None else f", {fill:.0%} full"),
        *([f"{timing['reused']:,} taken from equal pictures"] if timing.get("reused") else []),
        *([f"{timing['retries']:,} reads tried again"] if timing.get("retries") else []),
    ]
    vectors = len(options.get("outputs") or outputs)
    times = {f"{name} ms": count for name, count in decode["up_to"].items()}
    return (
        "<h2>Where the time went</h2>"
        f"<p>{escape(advice(timing, options, vectors) or '')}</p><div class='side'>"
        + _figure("seconds of the threads that carry images", _bars(shown, "{:,.1f}"))
        + _figure("pictures decoded in up to", _bars(times, "{:,.0f}"))
        + f"</div><p class='muted'>{escape('; '.join(facts))}</p>"
    )


def _pictures(overview: Overview) -> str:
    rows = overview.rows
    if not rows.num_rows:
        return ""
    width, height = (np.asarray(rows[name], dtype=np.float64) for name in ("width", "height"))
    figures = [
        _figure("megapixels", _histogram(width * height / 1e6)),
        _figure("width / height", _histogram(width / height)),
    ]
    labels = [label for label in rows["label"].to_pylist() if label is not None]
    if labels:
        figures.append(_figure("labels", _most(labels)))
    missing = rows.num_rows - len(labels)
    told = f"of {rows.num_rows:,} rows, evenly spread over all" + (
        f"; {missing:,} of them have no label" if labels and missing else ""
    )
    return f"<h2>Pictures</h2><p class='muted'>{told}</p><div class='side'>{''.join(figures)}</div>"


def _vectors(name: str, found: Vectors) -> str:
    still = (
        f"; <b>{found.still:,} of its dimensions are the same in all rows</b>"
        if found.still
        else ""
    )
    return (
        f"<h2>{escape(name.capitalize())}</h2><p class='muted'>width {found.width:,}; values "
        f"{found.mean:.4g} on average, standard deviation {found.deviation:.4g}{still}</p>"
        + _figure("length of the vector", _histogram(found.norms))
    )


def _classes(overview: Overview) -> str:
    return f"<h2>Highest class</h2>{_most(overview.classes)}" if overview.classes else ""


def _map(overview: Overview) -> str:
    if len(overview.places) < 3 or not overview.shown:
        return ""
    rows = overview.rows
    labels = rows["label"].to_pylist()
    counted = Counter(label for label in labels if label is not None).most_common(len(_COLOURS))
    often = (label for label, count in counted if count > 1)
    colours = dict(zip(often, _COLOURS, strict=False))
    low, high = overview.places.min(axis=0), overview.places.max(axis=0)
    placed = 10 + 580 * (overview.places - low) / np.where(high > low, high - low, 1)
    points = "".join(
        f'<circle cx="{x:.1f}" cy="{600 - y:.1f}" r="3" fill="{colours.get(label, _OTHER)}" '
        f'fill-opacity=".7"><title>{escape(key)}{_labelled(label)}</title></circle>'
        for (x, y), key, label in zip(placed, rows["key"].to_pylist(), labels, strict=True)
    )
    legend = " ".join(
        f'<span><i class="dot" style="background:{colour}"></i>{escape(str(label))}</span>'
        for label, colour in colours.items()
    )
    return (
        f"<h2>Map</h2><p class='muted'>the first two principal components of {overview.placed_by}, "
        f"{overview.shown:.0%} of its variance; a point tells its key</p><p>{legend}</p>"
        f'<svg viewBox="0 0 600 610" width="600" height="610" role="img" '
        f'aria-label="map of the sample">{points}</svg>'
    )


def _labelled(label: Any) -> str:
    return "" if label is None else f", {escape(str(label))}"


def _alike(overview: Overview) -> str:
    if not overview.alike:
        return ""
    rows: list[list[_Cell]] = [
        [_number(f"{cosine:.5f}"), escape(one), escape(other)]
        for cosine, one, other in overview.alike
    ]
    return (
        "<h2>Most alike</h2><p class='muted'>pairs of the sample by cosine of their "
        f"{overview.placed_by}, equal files apart</p>" + _table(["cosine", "one", "other"], rows)
    )


def _made_by(manifest: Mapping[str, Any]) -> str:
    rows: list[list[_Cell]] = [
        [f"{part}.{escape(str(name))}", escape(_text(value))]
        for part in ("model", "preprocessing", "options", "versions")
        for name, value in (manifest.get(part) or {}).items()
        if not (value is None or value is False or value == [])
    ]
    summary = "<summary>model, pixels, options, versions</summary>"
    return f"<h2>Made by</h2><details>{summary}{_table([], rows)}</details>"


# ---------------------------------------------------------------- pieces


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _bytes(size: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:,.0f} {unit}" if unit == "bytes" else f"{size:,.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"


def _number(value: Any) -> tuple[str, str]:
    return "n", f"{value:,}" if isinstance(value, int) else str(value)


def _table(names: Sequence[str], rows: Iterable[Sequence[_Cell]]) -> str:
    """A table of cells."""
    head = "".join(f"<th>{name}</th>" for name in names)
    body = "".join(
        "<tr>"
        + "".join(
            f"<td>{cell}</td>" if isinstance(cell, str) else f'<td class="{cell[0]}">{cell[1]}</td>'
            for cell in row
        )
        + "</tr>"
        for row in rows
    )
    return f"<table>{f'<tr>{head}</tr>' if names else ''}{body}</table>"


def _figure(title: str, drawn: str) -> str:
    return f"<figure style='margin:0'><figcaption>{title}</figcaption>{drawn}</figure>"


def _most(values: Sequence[Any]) -> str:
    """The most frequent of `values` as bars."""
    counted = Counter(map(str, values)).most_common()
    shown = dict(counted[:_ROWS])
    if left := counted[_ROWS:]:
        shown[f"{len(left):,} others"] = sum(count for _, count in left)
    return _bars(shown, "{:,.0f}")


def _bars(values: Mapping[str, float], form: str) -> str:
    """Horizontal bars, each with its name and value."""
    most = max(values.values(), default=0) or 1
    lines = []
    for at, (name, value) in enumerate(values.items()):
        y = 18 * at
        short = name if len(name) <= 28 else f"{name[:27]}…"
        lines.append(
            f'<text x="178" y="{y + 13}" text-anchor="end">{escape(short)}'
            f"<title>{escape(name)}</title></text>"
            f'<rect class="bar" x="185" y="{y + 3}" width="{170 * value / most:.1f}" height="12"/>'
            f'<text x="{190 + 170 * value / most:.1f}" y="{y + 13}">{form.format(value)}</text>'
        )
    height = 18 * len(values) + 4
    return f'<svg viewBox="0 0 440 {height}" width="440" height="{height}">{"".join(lines)}</svg>'


def _histogram(values: np.ndarray) -> str:
    """How many of `values` lie where, its ends and the median told; by powers where they are many.

    One value is told in words.
    """
    low, high = values.min(), values.max()
    if low == high:
        return f"<p>all of them {low:.4g}</p>"
    bins = max(1, min(_BARS, math.ceil(math.sqrt(len(values)))))
    powers = low > 0 and high / low > _WIDE
    edges = (np.geomspace if powers else np.linspace)(low, high, bins + 1)
    counts, _ = np.histogram(values, np.append(edges[:-1], high))
    wide = 400 / bins
    bars = "".join(
        f'<rect class="bar" x="{20 + at * wide:.1f}" y="{110 - 100 * count / counts.max():.1f}" '
        f'width="{max(1.0, wide - 2):.1f}" height="{100 * count / counts.max():.1f}">'
        f"<title>{edges[at]:.4g} to {edges[at + 1]:.4g}: {count:,}</title></rect>"
        for at, count in enumerate(counts.tolist())
    )
    told = (
        (20, "start", f"{edges[0]:.4g}"),
        (220, "middle", f"median {np.median(values):.4g}{', by powers' * bool(powers)}"),
        (420, "end", f"{edges[-1]:.4g}"),
    )
    words = "".join(
        f'<text x="{x}" y="126" text-anchor="{anchor}">{text}</text>' for x, anchor, text in told
    )
    return (
        f'<svg viewBox="0 0 440 130" width="440" height="130">{bars}'
        f'<line class="axis" x1="20" y1="110.5" x2="420" y2="110.5"/>{words}</svg>'
    )
