"""What a finished run of the stage leaves behind for its report, datasheet and Croissant file, and figures from it."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from alpaca_ray.config import GenerateConfig

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class FileInfo:
    """A file as it lies beside the report."""

    size_bytes: int
    sha256: str  # of its bytes, hexadecimal


@dataclass(frozen=True)
class Record:
    """A run. `completions` has COMPLETION_SCHEMA and a column `round` (int64), one row a request, failures included.

    `counts` has requests, failed, kept, rejected, prompt_tokens, completion_tokens, usd and reasons, as the manifest.
    `files` has dataset.parquet and alpaca_data.json, and may have more.
    """

    run_name: str
    config: GenerateConfig
    config_hash: str
    num_seed_tasks: int
    seed_tasks_hash: str
    dataset: pa.Table  # DATASET_SCHEMA
    rejects: pa.Table  # REJECT_SCHEMA
    completions: pa.Table
    counts: Mapping[str, Any]
    repaid: int  # requests in flight at a crash that were paid for again
    started_at: float  # Unix time, s
    finished_at: float
    files: Mapping[str, FileInfo]


@dataclass(frozen=True)
class Yield:
    """What each round gave; entry i is that of round i."""

    kept: Counts
    rejected: Counts
    answered: Counts  # requests
    failed: Counts  # requests


@dataclass(frozen=True)
class Timeline:
    """What was answered when, in bins of equal length; times count from the first request."""

    edges_s: NDArray[np.float64]  # one more than there are bins
    requests_per_minute: NDArray[np.float64]
    tokens_per_minute: NDArray[np.float64]  # prompts and completions
    usd: NDArray[np.float64]  # spent until each edge


def yield_by_round(record: Record) -> Yield:
    """Tasks and requests of each round; a task belongs to the round of its request."""
    rounds = np.asarray(record.completions["round"], dtype=np.int64)
    failed = np.asarray(pc.is_null(record.completions["text"]), dtype=bool)
    size = int(rounds.max(initial=-1)) + 1
    return Yield(
        kept=_tasks_by_round(record.dataset, record.completions, size),
        rejected=_tasks_by_round(record.rejects, record.completions, size),
        answered=np.bincount(rounds[~failed], minlength=size),
        failed=np.bincount(rounds[failed], minlength=size),
    )


def nearest_scores(dataset: pa.Table) -> NDArray[np.float64]:
    """The highest ROUGE-L of each row that has any; empty where similarity was switched off."""
    similar = dataset["most_similar"].combine_chunks()
    parents = np.asarray(pc.list_parent_indices(similar), dtype=np.int64)
    scores = np.asarray(pc.struct_field(pc.list_flatten(similar), "rouge_l"), dtype=np.float64)
    highest = np.full(len(dataset), -1.0)
    np.maximum.at(highest, parents, scores)
    return highest[highest >= 0]


def timeline(completions: pa.Table, max_bins: int) -> Timeline | None:
    """From the first request to the last answer, in bins of at least a second; None where no times are known."""
    done = completions.filter(pc.greater(completions["finished_at"], 0))
    if not len(done):
        return None
    ended = np.asarray(done["finished_at"], dtype=np.float64)
    started = float((ended - np.asarray(done["latency_s"])).min())
    span_s = max(float(ended.max()) - started, 1.0)
    edges = np.linspace(0, span_s, int(min(max_bins, span_s)) + 1)
    # clipped: a rounding error must not put the last answer behind the last edge
    place = np.clip(np.searchsorted(edges, ended - started, side="right") - 1, 0, len(edges) - 2)

    def total(weights: NDArray[Any] | None) -> NDArray[np.float64]:
        return np.bincount(place, weights, minlength=len(edges) - 1).astype(np.float64)

    minutes = span_s / (len(edges) - 1) / 60
    tokens = np.asarray(done["prompt_tokens"]) + np.asarray(done["completion_tokens"])
    usd = np.concatenate([[0.0], np.cumsum(total(np.asarray(done["usd"])))])
    return Timeline(edges, total(None) / minutes, total(tokens) / minutes, usd)


def num_words(texts: pa.ChunkedArray) -> Counts:
    """Of each text, words separated by white space."""
    return np.asarray(pc.count_substring_regex(texts, r"\S+"), dtype=np.int64)


def models(record: Record) -> dict[str, int]:
    """Which models answered, as the server names them, with the number of requests."""
    named = record.completions.filter(pc.is_valid(record.completions["text"]))["model"]
    return _counted(named)


def errors(record: Record) -> dict[str, int]:
    """Failed requests by the name of their error."""
    return _counted(record.completions.filter(pc.is_null(record.completions["text"]))["error"])


def prompt_versions(record: Record) -> list[str]:
    """The versions of the prompt that the rows came from."""
    return sorted(str(name) for name in pc.unique(record.dataset["prompt_version"]).to_pylist())


def _counted(names: pa.ChunkedArray) -> dict[str, int]:
    return dict(Counter(name if name is not None else "not named" for name in names.to_pylist()).most_common())


def _tasks_by_round(tasks: pa.Table, completions: pa.Table, size: int) -> Counts:
    where = pc.index_in(tasks["request"], value_set=completions["request"].combine_chunks())
    return np.bincount(np.asarray(completions["round"].take(where), dtype=np.int64), minlength=size)
