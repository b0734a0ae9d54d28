"""The page for people: what a run kept, what it rejected and why, how new and how long the rows are, what it cost.

One file without scripts, fonts or images from elsewhere. What models wrote is escaped, and the page's policy forbids
scripts. Charts are inline SVG (charts.py), so its size depends on the number of bins, not of rows.
"""

import datetime
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray

from alpaca_ray import __version__
from alpaca_ray.generate import record as figures
from alpaca_ray.generate.charts import Caption, Layer, Tick, bars, clip, columns, even_ticks, line, number, sunburst
from alpaca_ray.generate.record import Record
from alpaca_ray.generate.verbs import Verbs, count_verbs

BLUE, ORANGE, RED = 0, 1, 2  # hues of kept, rejected, failed
MAX_COLUMNS = 48
SAMPLE_ROWS, SAMPLES_PER_REASON = 20, 3
MAX_SAMPLE_CHARACTERS = 700

# Control characters, and those that turn the direction of the text after them: they would garble the page.
_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_TIME_UNITS = ((2 * 3600, 3600, "hours"), (120, 60, "minutes"), (0, 1, "seconds"))  # from this span on, in s

Charts = list[Markup]


def render_report(record: Record) -> str:
    """The whole page as HTML. Some seconds of CPU at 52,000 rows, most of them for finding verbs and objects."""
    environment = Environment(
        loader=PackageLoader("alpaca_ray", "generate"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"number": number, "shown": shown}
    verbs = count_verbs(record.dataset["instruction"].to_pylist())
    return environment.get_template("report.html.jinja").render(
        record=record,
        facts=facts(record),
        yields=yield_charts(record),
        reasons=bars(_caption("reasons", "Rejects by reason"), record.counts["reasons"], ORANGE),
        rejects=reject_samples(record),
        nearest=nearest_chart(record),
        lengths=length_charts(record),
        verbs=verbs,
        sunburst=sunburst_chart(verbs),
        rates=rate_charts(record),
        rows=sample_rows(record),
    )


def shown(text: str) -> str:
    """A generated text as it may stand in a page: not too long, nothing unseen in it."""
    return _UNSEEN.sub("\ufffd", clip(text, MAX_SAMPLE_CHARACTERS))


def facts(record: Record) -> dict[str, str]:
    """Name -> value, for the table on top."""
    counts, config = record.counts, record.config
    cost = counts["usd"] / counts["kept"] if counts["kept"] else 0.0
    return {
        "Teacher": f"{config.teacher.model}, prompt style {config.prompt_style}",
        "Models that answered": listed(figures.models(record)),
        "Seed tasks": f"{record.num_seed_tasks} (content {record.seed_tasks_hash})",
        "Requests": f"{number(counts['requests'])}, {number(counts['failed'])} of them failed",
        "Failures by error": listed(figures.errors(record)),
        "Paid again after a crash": f"{number(record.repaid)} requests",
        "Tokens": f"{number(counts['prompt_tokens'])} in prompts, {number(counts['completion_tokens'])} in completions",
        "Cost": f"${counts['usd']:,.2f}, ${cost:.5f} a row",
        "Wall time": str(datetime.timedelta(seconds=round(record.finished_at - record.started_at))),
        "Started": utc(record.started_at),
        "Finished": utc(record.finished_at),
        "Config": record.config_hash,
        "Software": f"alpaca-ray {__version__}",
    }


def yield_charts(record: Record) -> Charts:
    """Tasks by round, tasks kept so far, requests by round."""
    found = figures.yield_by_round(record)
    if not len(found.kept):
        return []
    edges, ticks = _rounds(len(found.kept))

    def by_round(id: str, title: str, *layers: tuple[str, int, figures.Counts]) -> Markup:
        drawn = [Layer(name, hue, _merged(counts, edges)) for name, hue, counts in layers]
        return columns(_caption(id, title, "round"), edges, drawn, ticks)

    so_far = [0, *np.cumsum(found.kept).tolist()]
    goal = (float(record.config.num_instructions), "asked for")
    after = even_ticks(len(found.kept))
    return [
        by_round("tasks", "Tasks by round", ("kept", BLUE, found.kept), ("rejected", ORANGE, found.rejected)),
        line(_caption("kept", "Tasks kept so far", "rounds"), range(len(so_far)), so_far, after, goal),
        by_round("requests", "Requests by round", ("answered", BLUE, found.answered), ("failed", RED, found.failed)),
    ]


def reject_samples(record: Record) -> list[dict[str, Any]]:
    """For each reason its count and some texts, spread over the run."""
    groups = []
    for reason, count in record.counts["reasons"].items():
        of_it = record.rejects.filter(pc.equal(record.rejects["reason"], reason))
        rows = of_it.take(_spread(len(of_it), SAMPLES_PER_REASON)).to_pylist()
        groups.append({"reason": reason, "count": count, "rows": rows})
    return groups


def nearest_chart(record: Record) -> Markup:
    """How like its nearest neighbour each row is, and each duplicate was."""
    duplicates = record.rejects.filter(pc.equal(record.rejects["reason"], "duplicate"))["rouge_l"].drop_null()
    edges = np.linspace(0, 1, 41)
    layers = [
        Layer("kept", BLUE, np.histogram(figures.nearest_scores(record.dataset), edges)[0].tolist()),
        Layer("rejected as duplicate", ORANGE, np.histogram(np.asarray(duplicates), edges)[0].tolist()),
    ]
    threshold = record.config.novelty_threshold
    caption = _caption("nearest", "Likeness to the nearest neighbour", "ROUGE-L F")
    return columns(caption, edges.tolist(), layers, even_ticks(1), (threshold, f"threshold {threshold:g}"))


def length_charts(record: Record) -> Charts:
    """Words of the instructions, of the inputs that are not empty, and of the outputs."""
    return [_length_chart(name, figures.num_words(record.dataset[name])) for name in ("instruction", "input", "output")]


def _length_chart(name: str, num_words: figures.Counts) -> Markup:
    words = num_words[num_words > 0]
    median = f"median {np.median(words):.0f} words" if len(words) else "all empty"
    # the longest 1 % would stretch the axis: they stand in the last column
    width = max(1, round(float(np.percentile(words, 99)) / 24)) if len(words) else 1
    edges = [float(width * k) for k in range(26)]
    heights = np.histogram(np.minimum(words, edges[-1]), edges)[0].tolist()
    title = f"{name.capitalize()}: {median}, {number(len(words))} rows"
    caption = _caption(f"{name}-length", title, "words; the last column has all longer ones")
    return columns(caption, edges, [Layer("rows", BLUE, heights)], even_ticks(edges[-1]))


def sunburst_chart(verbs: Verbs) -> Markup | None:
    """The verbs and their objects; None where nothing was found."""
    if not verbs.pairs:
        return None
    title = f"The {len(verbs.pairs)} commonest verbs (inner ring) and their commonest objects (outer ring)"
    return sunburst(Caption("verbs", title, "The table below holds the same numbers."), verbs.pairs)


def rate_charts(record: Record) -> Charts:
    """Requests and tokens per minute, and dollars, from the first request to the last answer; none without times."""
    found = figures.timeline(record.completions, MAX_COLUMNS)
    if found is None:
        return []
    unit_s, unit = next((size, name) for least, size, name in _TIME_UNITS if found.edges_s[-1] >= least)
    edges = (found.edges_s / unit_s).tolist()
    ticks = even_ticks(edges[-1])

    def rate(what: str, per_minute: NDArray[np.float64]) -> Markup:
        caption = _caption(f"{what}-rate", f"{what.capitalize()} per minute", unit)
        return columns(caption, edges, [Layer(what, BLUE, per_minute.tolist())], ticks)

    limit = record.config.budget.max_usd
    # a limit far above what was spent would press the line to the floor
    goal = (limit, "limit") if limit is not None and limit <= 2 * found.usd[-1] else None
    return [
        rate("requests", found.requests_per_minute),
        rate("tokens", found.tokens_per_minute),
        line(_caption("cost", "US dollars so far", unit), edges, found.usd.tolist(), ticks, goal),
    ]


def sample_rows(record: Record) -> list[dict[str, Any]]:
    """Rows spread evenly over the dataset."""
    some = record.dataset.select(["id", "instruction", "input", "output", "model"])
    rows: list[dict[str, Any]] = some.take(_spread(len(some), SAMPLE_ROWS)).to_pylist()
    return rows


def _caption(id: str, title: str, x: str = "") -> Caption:
    return Caption(id, title, f"Over {x}; each mark carries its number." if x else "Each mark carries its number.", x)


def _rounds(count: int) -> tuple[list[float], list[Tick]]:
    """Edges and names of columns for so many rounds; several rounds share a column where there are many."""
    size = -(-count // MAX_COLUMNS)
    firsts = range(0, count, size)
    edges = [float(first) for first in firsts] + [float(firsts[-1] + size)]
    names = [str(first) if size == 1 else f"{first} to {min(first + size, count) - 1}" for first in firsts]
    return edges, [((a + b) / 2, name) for (a, b), name in zip(itertools.pairwise(edges), names, strict=True)]


def _merged(counts: figures.Counts, edges: Sequence[float]) -> list[float]:
    """Counts of the rounds in each column."""
    return [float(counts[int(a) : int(b)].sum()) for a, b in itertools.pairwise(edges)]


def _spread(size: int, at_most: int) -> pa.Array:
    """So many indices, evenly from first to last: no chance in it, and every part of the run is seen."""
    indices = {round(k * (size - 1) / max(1, at_most - 1)) for k in range(at_most)} if size else set()
    return pa.array(sorted(indices), pa.int64())


def listed(counts: Mapping[str, int]) -> str:
    """Names with their numbers, in one line; "none" where there are none."""
    return ", ".join(f"{shown(name)} ({number(count)})" for name, count in counts.items()) or "none"


def utc(unix_s: float) -> str:
    """A time as people read it."""
    return datetime.datetime.fromtimestamp(unix_s, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
