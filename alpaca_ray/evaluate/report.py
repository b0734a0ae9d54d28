"""The page for people: the losses on top, then every instruction with both models' answers side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

SETS = {"heldout": "Held-out examples", "reference": "Reference answers"}


def render(run_name: str, scores: Mapping[str, Any], responses: Sequence[Mapping[str, Any]]) -> str:
    """One self-contained HTML page. What models wrote is escaped, and the page's policy forbids scripts."""
    environment = Environment(
        loader=PackageLoader("alpaca_ray", "evaluate"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    template = environment.get_template("report.html.jinja")
    return template.render(run_name=run_name, scores=scores, sets=SETS, responses=responses)
