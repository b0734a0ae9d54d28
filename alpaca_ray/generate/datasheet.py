"""The datasheet (Gebru et al. 2021, Datasheets for Datasets): all their questions, answered from the run's record.

What the record cannot know is not invented: such an answer is a marked line for the publisher to fill.
"""

import re

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from alpaca_ray import __version__
from alpaca_ray.generate import record as figures
from alpaca_ray.generate.charts import number
from alpaca_ray.generate.record import Record
from alpaca_ray.generate.report import listed, shown, utc


def datasheet(record: Record) -> str:
    """Markdown. Names that a server gave stand as literals: they cannot make markup."""
    environment = Environment(
        loader=PackageLoader("alpaca_ray", "generate"),
        autoescape=False,  # Markdown, not HTML
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"number": number, "literal": literal, "utc": utc}
    words = {name: figures.num_words(record.dataset[name]) for name in ("instruction", "input", "output")}
    return environment.get_template("datasheet.md.jinja").render(
        record=record,
        counts=record.counts,
        config=record.config,
        version=__version__,
        models=list(figures.models(record)),
        prompt_versions=figures.prompt_versions(record),
        errors=listed(figures.errors(record)),
        reasons=listed(record.counts["reasons"]),
        median_words={name: int(np.median(of_it[of_it > 0])) if of_it.any() else 0 for name, of_it in words.items()},
        num_without_input=int((words["input"] == 0).sum()),
        nearest=figures.nearest_scores(record.dataset),
    )


def literal(text: str) -> str:
    """A text as Markdown code, in one line."""
    return "`" + re.sub(r"[`|<>\s]+", " ", shown(text)).strip() + "`"
