"""The model card (Mitchell et al. 2019), README.md of the exported model: filled from the run's record.

What the record cannot know is not invented: such a line is marked for the publisher.
"""

import importlib.metadata
import json
import platform
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from alpaca_ray import __version__, models
from alpaca_ray.artifacts import PACKAGES, RunDirectory
from alpaca_ray.config import TrainConfig
from alpaca_ray.prompts import alpaca_prompt
from alpaca_ray.train import estimate

EMBEDDED_ID, EMBEDDED_LICENSE = "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"
WIDTH, HEIGHT, MARGIN = 640, 320, 48
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Facts:
    """What a card tells of its run."""

    name: str
    train: TrainConfig
    teacher: str  # the model that wrote the data
    counts: Mapping[str, int]  # examples, heldout, rejected
    reasons: Mapping[str, int]  # of rejection
    dataset_hash: str | None
    rows: Sequence[Mapping[str, Any]]  # of metrics.jsonl, at least one
    device: str
    base_license: str | None
    versions: Mapping[str, str]


def collect(run: RunDirectory, config: TrainConfig) -> Facts:
    """Read the record of a run whose steps are done."""
    resolved = yaml.safe_load(run.read_bytes("config.yaml"))["config"]
    rejects = run.read_table("train/rejects.parquet")
    manifest = run.read_json("generate/manifest.json") if run.exists("generate/manifest.json") else {"outputs": {}}
    rows = [json.loads(line) for line in run.read_bytes("train/metrics.jsonl").decode().splitlines()]
    return Facts(
        name=resolved["name"],
        train=config,
        teacher=resolved["generate"]["teacher"]["model"],
        counts={
            "examples": len(run.read_table("train/encoded.parquet")),
            "heldout": len(run.read_table("train/heldout.parquet")),
            "rejected": len(rejects),
        },
        reasons=Counter(rejects["reason"].to_pylist()),
        dataset_hash=manifest["outputs"].get("dataset.parquet"),
        rows=rows,
        device=device_name(),
        base_license=base_license(config.base_model),
        versions={name: importlib.metadata.version(name) for name in PACKAGES},
    )


def write(facts: Facts, directory: Path) -> None:
    """README.md and the plot that it shows."""
    (directory / "README.md").write_text(render(facts), encoding="utf-8")
    curves = {"training": _points(facts.rows, "loss"), "held out": _points(facts.rows, "heldout_loss")}
    (directory / "losses.svg").write_text(plot(curves), encoding="utf-8")


def render(facts: Facts) -> str:
    """Markdown below the front matter that the Hugging Face hub reads."""
    environment = Environment(
        loader=PackageLoader("alpaca_ray", "train"),
        autoescape=False,  # Markdown, not HTML
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["literal"] = _literal
    seconds = sum(row["step_time_s"] for row in facts.rows)
    num_tokens = sum(row["tokens_per_s"] * row["step_time_s"] for row in facts.rows)
    body = environment.get_template("card.md.jinja").render(
        facts=facts,
        train=facts.train,
        base=base_id(facts.train.base_model) or Path(facts.train.base_model).name,  # a path says too much
        version=__version__,
        prompt=alpaca_prompt("{instruction}"),
        number="{:,.0f}".format,
        reasons="".join(f"; {_literal(reason)} {count}" for reason, count in sorted(facts.reasons.items())),
        strategy="FSDP2" if facts.train.strategy == "fsdp" else f"DeepSpeed ZeRO-{facts.train.zero_stage}",
        first=facts.rows[0],
        last=facts.rows[-1],
        heldout=_points(facts.rows, "heldout_loss"),
        targets=sum(row["target_tokens"] for row in facts.rows),
        hours=f"{seconds / 3600:.2f} h",
        tokens_per_s=num_tokens / seconds,
        hardware=_hardware(facts),
        energy=_energy(facts),
    )
    return f"---\n{front_matter(facts).to_yaml()}\n---\n\n{body}"


def front_matter(facts: Facts) -> ModelCardData:
    """`license` is "other": no one name says what base and data allow together."""
    return ModelCardData(
        license="other",
        license_name="inherited-from-base-and-data",
        base_model=base_id(facts.train.base_model),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["alpaca", "instruction-tuning", *(["lora"] if facts.train.lora else [])],
    )


def base_id(reference: str) -> str | None:
    """The base's id on the hub, None where it has none."""
    if reference == models.EMBEDDED:
        return EMBEDDED_ID
    is_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", reference) and not Path(reference).expanduser().exists()
    return reference if is_id else None


def base_license(reference: str) -> str | None:
    """What the base's own model card says, None where it has none or cannot be reached."""
    if reference == models.EMBEDDED:
        return EMBEDDED_LICENSE
    resolved = models.resolve(reference)
    path = Path(resolved) / "README.md" if Path(resolved).is_dir() else resolved
    try:
        data = ModelCard.load(path).data.to_dict()
    except (OSError, ValueError, yaml.YAMLError):
        return None
    name = data.get("license_name") if data.get("license") == "other" else data.get("license")
    return str(name) if name else None


def device_name() -> str:
    """What this process computes on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def plot(curves: Mapping[str, Points]) -> str:
    """A small SVG of loss by step; curves without points are left out."""
    drawn = {name: points for name, points in curves.items() if points}
    steps = [x for points in drawn.values() for x, _ in points]
    losses = [y for points in drawn.values() for _, y in points]
    (left, right), (low, high) = (min(steps), max(steps)), (min(losses), max(losses))

    def place(x: float, y: float) -> str:
        across = (x - left) / (right - left or 1) * (WIDTH - 2 * MARGIN)
        down = (high - y) / (high - low or 1) * (HEIGHT - 2 * MARGIN)
        return f"{MARGIN + across:.1f},{MARGIN + down:.1f}"

    marks = []
    for i, ((name, points), colour) in enumerate(zip(drawn.items(), ("#2563eb", "#d97706"), strict=False)):
        line = " ".join(place(x, y) for x, y in points)
        marks.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{line}"/>')
        marks.append(f'<text x="{WIDTH - MARGIN}" y="{24 + 16 * i}" fill="{colour}" text-anchor="end">{name}</text>')
    marks += [f'<text x="4" y="{y}">{value:.2f}</text>' for y, value in ((MARGIN, high), (HEIGHT - MARGIN, low))]
    marks += [f'<text x="{x}" y="{HEIGHT - 16}">{step:g}</text>' for x, step in ((MARGIN, left), (WIDTH - 80, right))]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">'
        f'<title>Loss by step</title><rect width="100%" height="100%" fill="#fff"/>{"".join(marks)}</svg>\n'
    )


def _points(rows: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(row["step"], row[name]) for row in rows if row.get(name) is not None]


def _hardware(facts: Facts) -> str:
    workers = [row["num_workers"] for row in facts.rows]
    fewest, most = min(workers), max(workers)  # an elastic run has had both
    return f"{most if fewest == most else f'{fewest} to {most}'} x {facts.device}"


def _energy(facts: Facts) -> str:
    known = [gpu for gpu in estimate.gpus().values() if gpu.cuda_name in facts.device]
    if not known:
        return "not measured"
    device_seconds = sum(row["step_time_s"] * row["num_workers"] for row in facts.rows)
    return f"not measured; at most {known[0].power_w * device_seconds / 3.6e6:.1f} kWh, by the boards' power limit"


def _literal(text: str) -> str:
    """A text as Markdown code, in one line: a name that someone gave cannot make markup."""
    return "`" + re.sub(r"[`|<>\s]+", " ", text).strip() + "`"
