"""The generated parts of README.md and docs/SCALE.md: `python -m pipeline.readme` writes them anew,
a test compares.

A part stands between `<!-- generated: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from pipeline import models, options, plan, report, verify

README = Path(__file__).parents[1] / "README.md"
SCALE = README.with_name("docs") / "SCALE.md"
_PART = re.compile(r"(<!-- generated: (?P<name>\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def parts() -> dict[str, str]:
    """Name to text of every generated part."""
    return {
        "options": options.options_table(),
        "extract_help": _block(options.parser().format_help()),
        "models_help": _block(models.parser().format_help()),
        "verify_help": _block(verify.parser().format_help()),
        "report_help": _block(report.parser().format_help()),
        "plan_help": _block(plan.parser().format_help()),
        "scale": plan.scale_table(),
    }


def _block(text: str) -> str:
    return f"```text\n{text.rstrip()}\n```"


def rendered(text: str) -> str:
    """`text` with its generated parts as they should be. KeyError for a part nobody makes."""
    made = parts()
    return _PART.sub(lambda found: f"{found[1]}{made[found['name']]}\n{found[3]}", text)


if __name__ == "__main__":
    argparse.ArgumentParser(
        description="The generated parts of README.md and docs/SCALE.md, written anew."
    ).parse_args()
    for document in (README, SCALE):
        document.write_text(rendered(document.read_text()))
