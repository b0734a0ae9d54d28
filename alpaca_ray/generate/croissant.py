"""The dataset in Croissant 1.0 with its RAI extension (MLCommons): JSON-LD that loaders and catalogues understand.

It stands beside the files it describes and names them by relative paths, so that it works wherever the directory lies.
What only a publisher can say (datePublished, url, publisher) is left out, not invented.
"""

import datetime
from typing import Any

from alpaca_ray import __version__
from alpaca_ray.generate import record as figures
from alpaca_ray.generate.record import Record

COLUMNS = {
    "id": ("sc:Text", "Unique within the dataset: the request and the position in its answer."),
    "instruction": ("sc:Text", "What is asked."),
    "input": ("sc:Text", "What the instruction is about; empty where it says it all."),
    "output": ("sc:Text", "The answer."),
    "request": ("sc:Integer", "The number of the request that gave the row."),
    "position": ("sc:Integer", "Its place among the tasks of that answer, from 0."),
    "model": ("sc:Text", "The model that answered, as the provider names it."),
    "prompt_version": ("sc:Text", "The version of the prompt."),
    "seed_tasks": ("sc:Text", "Ids of the seed tasks in the prompt."),
    "mean_rouge_l": ("sc:Float", "The mean ROUGE-L of the instruction to the seeds and all rows kept before."),
}
NEAREST_COLUMNS = {
    "instruction": ("sc:Text", "One of the most similar instructions among the seeds and the rows kept before."),
    "rouge_l": ("sc:Float", "Its ROUGE-L F-measure to the instruction of the row."),
}
REPEATED = frozenset({"seed_tasks"})
ALPACA_COLUMNS = ("instruction", "input", "output")
ENCODINGS = {".parquet": "application/x-parquet", ".json": "application/json"}

CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    **{
        name: f"cr:{name}"
        for name in (
            "citeAs", "column", "equivalentProperty", "extract", "field", "fileObject", "fileProperty", "fileSet",
            "format", "includes", "isLiveDataset", "jsonPath", "key", "md5", "parentField", "path", "recordSet",
            "references", "regex", "repeated", "replace", "samplingRate", "separator", "source", "subField",
            "transform",
        )
    },
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "rai": "http://mlcommons.org/croissant/RAI/",
    "sc": "https://schema.org/",
}  # fmt: skip


def croissant(record: Record) -> dict[str, Any]:
    """The JSON-LD document. Raises KeyError if `record.files` lacks dataset.parquet or alpaca_data.json."""
    made = datetime.datetime.fromtimestamp(record.finished_at, datetime.UTC)
    return {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": ["http://mlcommons.org/croissant/1.0", "http://mlcommons.org/croissant/RAI/1.0"],
        "name": record.run_name,
        "description": _description(record),
        "license": (
            "To be stated by the publisher. The terms of the teacher's provider apply to what the teacher wrote; "
            "see datasheet.md."
        ),
        "citeAs": (
            f"@misc{{{record.run_name}, title = {{{record.run_name}: generated instructions}}, year = {{{made.year}}}, "
            f"note = {{made with alpaca-ray {__version__}, config {record.config_hash}}}}}"
        ),
        "version": "1.0.0",
        "dateCreated": made.date().isoformat(),
        "inLanguage": "en",
        "keywords": ["instruction tuning", "self-instruct", "synthetic data"],
        "isLiveDataset": False,
        "distribution": [_file_object(record, name) for name in ("dataset.parquet", "alpaca_data.json")],
        "recordSet": [_rows(record.config.similarity), _alpaca_rows()],
        **_responsible_ai(record),
    }


def _description(record: Record) -> str:
    return (
        f"{record.counts['kept']} instructions with inputs and answers, written by {_models(record)} after the manner "
        f"of self-instruct (Wang et al. 2023) and Stanford Alpaca from {record.num_seed_tasks} seed tasks."
    )


def _models(record: Record) -> str:
    return ", ".join(figures.models(record)) or record.config.teacher.model


def _file_object(record: Record, name: str) -> dict[str, Any]:
    file = record.files[name]
    return {
        "@type": "cr:FileObject",
        "@id": name,
        "name": name,
        "contentUrl": name,
        "contentSize": f"{file.size_bytes} B",
        "encodingFormat": ENCODINGS[name[name.index(".") :]],
        "sha256": file.sha256,
    }


def _rows(similarity: bool) -> dict[str, Any]:
    """Without `similarity` the two columns that it fills are null throughout, and are left out."""
    names = [name for name in COLUMNS if similarity or name != "mean_rouge_l"]
    fields = [_field(f"rows/{name}", COLUMNS[name], "dataset.parquet", {"extract": {"column": name}}) for name in names]
    return {
        "@type": "cr:RecordSet",
        "@id": "rows",
        "name": "rows",
        "description": "All rows, each with where it came from.",
        "key": {"@id": "rows/id"},
        "field": [*fields, _most_similar()] if similarity else fields,
    }


def _most_similar() -> dict[str, Any]:
    parts = [
        _field(
            f"rows/most_similar/{name}",
            what,
            "dataset.parquet",
            {"extract": {"column": "most_similar"}, "transform": {"jsonPath": f"$[*].{name}"}},
        )
        for name, what in NEAREST_COLUMNS.items()
    ]
    return {
        "@type": "cr:Field",
        "@id": "rows/most_similar",
        "name": "most_similar",
        "description": "The nearest instructions, the nearest first.",
        "repeated": True,
        "subField": parts,
    }


def _alpaca_rows() -> dict[str, Any]:
    return {
        "@type": "cr:RecordSet",
        "@id": "alpaca_data",
        "name": "alpaca_data",
        "description": "The same rows in the format of Stanford Alpaca.",
        "field": [
            _field(f"alpaca_data/{name}", COLUMNS[name], "alpaca_data.json", {"extract": {"jsonPath": f"$[*].{name}"}})
            for name in ALPACA_COLUMNS
        ],
    }


def _field(id: str, what: tuple[str, str], file: str, source: dict[str, Any]) -> dict[str, Any]:
    """`what`: the type and the description. The name is the last part of the id."""
    name = id.rpartition("/")[2]
    return {
        "@type": "cr:Field",
        "@id": id,
        "name": name,
        "description": what[1],
        "dataType": what[0],
        **({"repeated": True} if name in REPEATED else {}),
        "source": {"fileObject": {"@id": file}, **source},
    }


def _responsible_ai(record: Record) -> dict[str, Any]:
    times = (datetime.datetime.fromtimestamp(s, datetime.UTC) for s in (record.started_at, record.finished_at))
    counts, config = record.counts, record.config
    skipped = f" Switched off in this run: {', '.join(config.skip_filters)}." if config.skip_filters else ""
    return {
        "rai:dataCollection": (
            f"{counts['requests']} requests to a language model, each with {config.num_examples_per_prompt} seed tasks "
            f"as examples; {counts['failed']} of them failed and gave no rows."
        ),
        "rai:dataCollectionType": "Web API",
        "rai:dataCollectionTimeframe": [time.replace(tzinfo=None).isoformat(timespec="seconds") for time in times],
        "rai:dataCollectionRawData": "Every answer is kept under completions/, every rejected task in rejects.parquet.",
        "rai:dataPreprocessingProtocol": [
            "Answers are split into tasks; a task that does not parse, or was cut, is rejected.",
            f"Filters by rules reject tasks and name the reason.{skipped}",
            f"An instruction whose ROUGE-L F-measure to a seed or an earlier row is above {config.novelty_threshold:g} "
            "is rejected as a duplicate.",
        ],
        "rai:dataLimitations": [
            "The answers are those of a model and unchecked: they may be wrong.",
            "ROUGE-L finds instructions that share words, not those that mean the same.",
        ],
        "rai:dataBiases": ["Rows inherit the biases of the teacher, and of the seed tasks that its prompts quote."],
        "rai:dataUseCases": ["Fine-tuning a language model to follow instructions.", "Research on generated data."],
        "rai:personalSensitiveInformation": [
            "None was asked for. A model may still write names, addresses or numbers that belong to someone."
        ],
        "rai:dataSocialImpact": "A model trained on these rows takes over the faults of its teacher.",
    }
