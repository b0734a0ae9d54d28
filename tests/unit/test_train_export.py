"""The exported directory: weights gathered one by one, files of a limited size, and the card of the run."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pyarrow as pa
import pyarrow.fs
import pytest
import torch
import torch.distributed as dist
from huggingface_hub import ModelCard
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from alpaca_ray.artifacts import RunDirectory, begin_stage
from alpaca_ray.config import RunConfig
from alpaca_ray.models import load_model, load_tokenizer
from alpaca_ray.prompts import alpaca_prompt
from alpaca_ray.schema import EXAMPLE_SCHEMA
from alpaca_ray.settings import load_config
from alpaca_ray.train import card, export
from alpaca_ray.train.encoding import ENCODED_SCHEMA, REJECT_SCHEMA
from alpaca_ray.train.model import make_mesh

IDS = torch.arange(3, 40)[None]  # (1, T)


@pytest.fixture(scope="module", autouse=True)
def group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def sharded(tiny_model: Path) -> PreTrainedModel:
    plain = load_model(str(tiny_model), "float32")
    fully_shard(plain, mesh=make_mesh("cpu", 1))
    return plain


class Watched(export.Whole):
    """Remembers what was gathered."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.asked: list[str] = []

    def __getitem__(self, name: str) -> torch.Tensor:
        self.asked.append(name)
        return super().__getitem__(name)


def test_sharded_weights_are_gathered_once_each_and_load_in_plain_transformers(
    sharded: PreTrainedModel, tiny_model: Path, tmp_path: Path
) -> None:
    weights = Watched(sharded.state_dict(), True)
    export.write(weights, sharded.config, load_tokenizer(str(tiny_model)), "float32", tmp_path)

    assert sorted(weights.asked) == sorted(sharded.state_dict().keys() - {"lm_head.weight"})  # tied to the embedding
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(plain(IDS).logits, load_model(str(tiny_model), "float32")(IDS).logits)


def test_a_rank_that_does_not_write_asks_for_the_same_in_the_same_order(
    sharded: PreTrainedModel, tiny_model: Path, tmp_path: Path
) -> None:
    """Each gathering is a collective: another order on another rank would hang the export."""
    tokenizer = load_tokenizer(str(tiny_model))
    writer, other = Watched(sharded.state_dict(), True), Watched(sharded.state_dict(), False)
    export.write(writer, sharded.config, tokenizer, "float32", tmp_path)
    export.write(other, sharded.config, tokenizer, "float32", None)
    assert other.asked == writer.asked
    assert other["model.norm.weight"].is_meta


def test_large_models_come_in_files_of_limited_size(sharded: PreTrainedModel, tiny_model: Path, tmp_path: Path) -> None:
    plain = export.skeleton(sharded.config, "bfloat16")
    export.write_weights(export.Whole(sharded.state_dict(), True), plain, tmp_path, "20KB")
    plain.config.save_pretrained(tmp_path)

    files = sorted(tmp_path.glob("*.safetensors"))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(files) > 1
    assert all(path.stat().st_size < 22_000 for path in files)
    assert set(index["weight_map"].values()) == {path.name for path in files}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = load_model(str(tiny_model), "bfloat16")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), expected.parameters(), strict=True))


def test_generation_stops_at_the_token_that_answers_end_with(
    sharded: PreTrainedModel, tiny_model: Path, tmp_path: Path
) -> None:
    export.write(
        export.Whole(sharded.state_dict(), True), sharded.config, load_tokenizer(str(tiny_model)), "float32", tmp_path
    )
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path)
    with torch.no_grad():  # a head that always answers the end
        model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
        model.lm_head.bias = torch.nn.Parameter(torch.nn.functional.one_hot(torch.tensor(2), 259).float())
    chat = [{"role": "user", "content": "Say 1"}]
    ids = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)["input_ids"]
    answer = model.generate(ids, max_new_tokens=8)[0, ids.shape[1] :]

    assert answer.tolist() == [tokenizer.eos_token_id]
    assert tokenizer.decode(ids[0]) == alpaca_prompt("Say 1")


def test_the_card_is_no_part_of_what_the_model_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    before = export.directory_hash(tmp_path)
    for name in export.CARD_FILES:
        (tmp_path / name).write_text("took 3 h")
    assert export.directory_hash(tmp_path) == before
    (tmp_path / "config.json").write_text("{ }")
    assert export.directory_hash(tmp_path) != before


def finished_run(tmp_path: Path, **train: object) -> tuple[RunDirectory, RunConfig]:
    options = [f"--train.{name.replace('_', '-')}={value}" for name, value in train.items()]
    config = load_config(["--recipe=tiny_cpu", "--name=my-run", "--generate.teacher.model=a`|b", *options])
    run = RunDirectory(pyarrow.fs.LocalFileSystem(), str(tmp_path / "run"))
    begin_stage(run, config, "generate", {}).finish({}, {"dataset.parquet": "0123456789abcdef"})
    begin_stage(run, config, "train", {})
    run.write_table("train/encoded.parquet", pa.Table.from_pylist([{"id": f"{i}"} for i in range(11)], ENCODED_SCHEMA))
    run.write_table("train/heldout.parquet", pa.Table.from_pylist([{"id": "x"}] * 2, EXAMPLE_SCHEMA))
    run.write_table("train/rejects.parquet", pa.Table.from_pylist([{"reason": "too_long"}] * 3, REJECT_SCHEMA))
    same = {"learning_rate": 1e-4, "grad_norm": 1.0, "target_tokens": 100, "tokens_per_s": 50.0, "step_time_s": 4.0}
    rows: list[dict[str, Any]] = [{"step": i, "loss": 3.0 - i / 10, "num_workers": 2, **same} for i in range(1, 7)]
    for row in rows[1::2]:
        row["heldout_loss"] = 2.9 - row["step"] / 10
    run.write_bytes("train/metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    return run, config


def test_the_card_tells_the_run(tmp_path: Path) -> None:
    run, config = finished_run(tmp_path)
    card.write(card.collect(run, config.train), tmp_path)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    parsed = ModelCard.load(tmp_path / "README.md")

    assert re.findall(r"^## (.*)", text, re.MULTILINE) == [
        "Intended use", "Use", "Training data", "Training procedure", "Results", "Hardware, time, energy", "Limits",
        "Licence",
    ]  # fmt: skip
    assert parsed.data.to_dict() == {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "library_name": "transformers",
        "license": "other",
        "license_name": "inherited-from-base-and-data",
        "pipeline_tag": "text-generation",
        "tags": ["alpaca", "instruction-tuning"],
    }
    for fact in (
        "| examples trained on | 11 |", "| held out | 2 |", "3; `too_long` 3", "0123456789abcdef",
        "| 2.9000 | 2.4000 |", "| 2.7000 | 2.3000 |", "2 x CPU", "not measured",
        "apache-2.0", "fp32 masters, float32 compute", "| 600 |",
        alpaca_prompt("{instruction}"),
    ):  # fmt: skip
        assert fact in text
    assert "`a b`" in text  # a name that someone gave makes no table
    assert "| epochs, steps | 2, 6 |" in text


def test_the_plot_has_a_line_for_each_loss(tmp_path: Path) -> None:
    run, config = finished_run(tmp_path)
    card.write(card.collect(run, config.train), tmp_path)
    root = ElementTree.parse(tmp_path / "losses.svg").getroot()
    lines = [e.attrib["points"].split() for e in root.iter("{http://www.w3.org/2000/svg}polyline")]
    assert [len(points) for points in lines] == [6, 3]
    ys = [float(point.split(",")[1]) for point in lines[0]]
    assert ys == sorted(ys)  # falling losses go down the picture


def test_a_local_base_is_named_without_its_path_and_gives_its_licence(tmp_path: Path, tiny_model: Path) -> None:
    base = tmp_path / "secret-place" / "my-base"
    base.parent.mkdir()
    base.symlink_to(tiny_model)
    copy = tmp_path / "licensed"
    copy.mkdir()
    for path in tiny_model.iterdir():
        (copy / path.name).symlink_to(path)
    (copy / "README.md").write_text("---\nlicense: mit\n---\n")
    run, config = finished_run(tmp_path, base_model=base)
    text = card.render(card.collect(run, config.train))
    assert "`my-base`" in text
    assert "secret-place" not in text
    assert ModelCard(text).data.get("base_model") is None
    assert "not stated where it was loaded from" in text
    assert card.base_license(str(copy)) == "mit"
