"""What a finished run leaves: the dataset, its papers, and the manifest, which says that all of it is there."""

import hashlib
import time
from typing import Any

import pyarrow as pa

from alpaca_ray.artifacts import Stage, table_hash
from alpaca_ray.config import config_hash
from alpaca_ray.generate.croissant import croissant
from alpaca_ray.generate.datasheet import datasheet
from alpaca_ray.generate.harvest import Harvest
from alpaca_ray.generate.record import FileInfo, Record
from alpaca_ray.generate.report import render_report
from alpaca_ray.generate.similarity import similarity_report
from alpaca_ray.provider.journal import Journal
from alpaca_ray.schema import COMPLETION_SCHEMA, DATASET_SCHEMA, REJECT_SCHEMA

Rows = list[dict[str, Any]]


def write_outputs(stage: Stage, harvest: Harvest, completions: Rows, journal: Journal) -> None:
    """Write all but the rejects, which are there already. `completions`: rows of COMPLETION_SCHEMA and `round`."""
    run = stage.run
    dataset = pa.Table.from_pylist(_similar_rows(harvest), schema=DATASET_SCHEMA)
    run.write_table(stage.path("dataset.parquet"), dataset)
    run.write_json(stage.path("alpaca_data.json"), dataset.select(["instruction", "input", "output"]).to_pylist())
    record = _record(stage, harvest, dataset, completions, journal)
    run.write_bytes(stage.path("report.html"), render_report(record).encode())
    run.write_bytes(stage.path("datasheet.md"), datasheet(record).encode())
    run.write_json(stage.path("croissant.json"), croissant(record))
    stage.finish(record.counts, {"dataset.parquet": table_hash(dataset)})


def _similar_rows(harvest: Harvest) -> Rows:
    """The kept rows, with the metadata that Alpaca keeps of each where it is asked for."""
    if not harvest.config.similarity:
        return harvest.kept
    report = similarity_report(
        [row["instruction"] for row in harvest.kept], [seed.instruction for seed in harvest.seeds]
    )
    return [
        row
        | {
            "most_similar": [{"instruction": text, "rouge_l": score} for text, score in similar.most_similar],
            "mean_rouge_l": similar.mean_rouge_l,
        }
        for row, similar in zip(harvest.kept, report, strict=True)
    ]


def _record(stage: Stage, harvest: Harvest, dataset: pa.Table, completions: Rows, journal: Journal) -> Record:
    """What the report and the papers are filled from."""
    journal.refresh()
    repaid = len(journal.in_flight())
    schema = COMPLETION_SCHEMA.append(pa.field("round", pa.int64()))
    return Record(
        run_name=stage.config.name,
        config=harvest.config,
        config_hash=config_hash(harvest.config),
        num_seed_tasks=len(harvest.seeds),
        seed_tasks_hash=stage.inputs["seed_tasks"],
        dataset=dataset,
        rejects=pa.Table.from_pylist(harvest.rejects, schema=REJECT_SCHEMA),
        completions=pa.Table.from_pylist(completions, schema=schema),
        counts={
            "requests": len(completions),
            "failed": sum(row["text"] is None for row in completions),
            "kept": len(harvest.kept),
            "rejected": len(harvest.rejects),
            "prompt_tokens": sum(row["prompt_tokens"] for row in completions),
            "completion_tokens": sum(row["completion_tokens"] for row in completions),
            "usd": round(journal.spent.usd, 6),
            "repaid": repaid,
            "reasons": harvest.counted(),
        },
        repaid=repaid,
        started_at=min((row["finished_at"] for row in completions), default=stage.started_s),
        finished_at=time.time(),
        files={name: _file_info(stage, name) for name in ("dataset.parquet", "alpaca_data.json", "rejects.parquet")},
    )


def _file_info(stage: Stage, name: str) -> FileInfo:
    """Size and hash of a file as it was written."""
    data = stage.run.read_bytes(stage.path(name))
    return FileInfo(len(data), hashlib.sha256(data).hexdigest())
