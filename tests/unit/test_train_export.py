"""The exported directory: weights gathered one by one, files of a limited size, and the card of the run."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pyarrow as pa
import pyarrow.fs
import pytest
import torch
import torch.distributed as dist
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from alpaca_ray.artifacts import RunDirectory, begin_stage
from alpaca_ray.config import RunConfig, TrainConfig
from alpaca_ray.models import load_model, load_tokenizer
from alpaca_ray.prompts import alpaca_prompt
from alpaca_ray.schema import EXAMPLE_SCHEMA, Example
from alpaca_ray.settings import load_config
from alpaca_ray.train import card, export, loop, model
from alpaca_ray.train.encoding import ENCODED_SCHEMA, REJECT_SCHEMA, Encoded, encode
from alpaca_ray.train.fsdp import Fsdp
from alpaca_ray.train.strategy import Weights


@pytest.fixture(scope="module", autouse=True)
def group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def config_for(directory: Path, **values: object) -> TrainConfig:
    return TrainConfig.model_validate({"base_model": str(directory), "compute_dtype": "float32"} | values)


def build(config: TrainConfig) -> Fsdp:
    return Fsdp(model.load(config), config, model.make_mesh("cpu", 1))


@pytest.fixture
def state(tiny_model: Path) -> Fsdp:
    return build(config_for(tiny_model))


def watched(state: Fsdp, asked: list[str], *, has_values: bool = True) -> Weights:
    """The weights, and in `asked` the names of those that were made whole."""
    weights = state.weights()

    def whole(name: str) -> torch.Tensor:
        asked.append(name)
        return weights[name]

    return Weights(weights, whole, has_values=has_values)


def test_each_weight_is_gathered_once(state: Fsdp, tiny_model: Path, tmp_path: Path) -> None:
    asked: list[str] = []
    export.write(watched(state, asked), state.model.config, load_tokenizer(str(tiny_model)), "float32", tmp_path)
    assert sorted(asked) == sorted(state.model.state_dict().keys() - {"lm_head.weight"})  # tied to the embedding


def test_a_rank_that_does_not_write_asks_for_the_same_in_the_same_order(
    state: Fsdp, tiny_model: Path, tmp_path: Path
) -> None:
    """Each gathering is a collective: another order on another rank would hang the export."""
    tokenizer, first, other = load_tokenizer(str(tiny_model)), list[str](), list[str]()
    export.write(watched(state, first), state.model.config, tokenizer, "float32", tmp_path)
    without_values = watched(state, other, has_values=False)
    export.write(without_values, state.model.config, tokenizer, "float32", None)
    assert other == first
    assert without_values["model.norm.weight"].is_meta


def test_large_models_come_in_files_of_limited_size(state: Fsdp, tiny_model: Path, tmp_path: Path) -> None:
    plain = export.skeleton(state.model.config, "bfloat16")
    export.write_weights(state.weights(), plain, tmp_path, "20KB")
    plain.config.save_pretrained(tmp_path)

    files = sorted(tmp_path.glob("*.safetensors"))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(files) > 1
    assert all(path.stat().st_size < 22_000 for path in files)
    assert set(index["weight_map"].values()) == {path.name for path in files}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = load_model(str(tiny_model), "bfloat16")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), expected.parameters(), strict=True))


DEMONSTRATIONS = {
    "Name a fruit": "Fig", "Name a bird": "An owl.", "Count to 3": "1, 2, 3", "Add 2 and 2": "4", "Say hello": "Hello!",
    "Translate 'chat'": "cat\n(an animal)", "Spell 'ice'": "i-c-e", "Write an emoji": "\N{SNOWMAN}",
    "Name a colour": "Teal", "Close the tag <b>": "</b>", "Quote the end token": "It is </s>, no more.", "Sigh": "...",
}  # fmt: skip
MAX_NEW_TOKENS = 64


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Fsdp, Path]:
    """A model that has learnt its demonstrations by heart, and where it is exported."""
    target = tmp_path_factory.mktemp("exported")
    config = config_for(
        tiny_model, num_epochs=120, global_batch_size=len(DEMONSTRATIONS), micro_batch_size=4, learning_rate=1e-2
    )
    state, tokenizer, losses = build(config), load_tokenizer(str(tiny_model)), list[float]()
    examples = [Example(question, question, "", answer) for question, answer in DEMONSTRATIONS.items()]
    rows = [row for e in examples if isinstance(row := encode(e, tokenizer, "alpaca", 512), Encoded)]
    loop.train(state, rows, config, lambda row: losses.append(row.loss), lambda: None)
    assert losses[-1] < 0.05
    export.write_trained(state, config, target)
    return state, target


@pytest.mark.parametrize("question", DEMONSTRATIONS)
def test_plain_transformers_answers_as_trained_and_stops(trained: tuple[Fsdp, Path], question: str) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(trained[1])
    tokenizer: Any = AutoTokenizer.from_pretrained(trained[1])
    chat = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=MAX_NEW_TOKENS)[0, prompt["input_ids"].shape[1] :]

    assert tokenizer.decode(prompt["input_ids"][0]) == alpaca_prompt(question)
    assert answer[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(answer[:-1]) == DEMONSTRATIONS[question]
    assert len(answer) < MAX_NEW_TOKENS / 2


def test_plain_transformers_computes_the_trained_logits(trained: tuple[Fsdp, Path]) -> None:
    state, directory = trained
    plain: Any = AutoModelForCausalLM.from_pretrained(directory)
    ids = torch.arange(3, 40)[None]  # (1, T)
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, state.model(ids).logits)
    assert type(plain) is LlamaForCausalLM
    assert plain.config.use_cache
    assert plain.config.architectures == ["LlamaForCausalLM"]
    assert plain.config.eos_token_id == plain.generation_config.eos_token_id == 2


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


def test_the_card_counts_the_energy_of_each_worker_that_was_there(tmp_path: Path) -> None:
    """An elastic run: three steps on one GPU, three on four, an hour each; 400 W are the board's limit."""
    run, config = finished_run(tmp_path)
    facts = card.collect(run, config.train)
    rows = [{**row, "step_time_s": 3600.0, "num_workers": 1 if row["step"] <= 3 else 4} for row in facts.rows]
    text = card.render(replace(facts, rows=rows, device="NVIDIA A100-SXM4-80GB"))
    assert "| 1 to 4 x NVIDIA A100-SXM4-80GB |" in text
    assert "at most 6.0 kWh" in text  # 15 device hours
    assert "| 6.00 h |" in text


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
    (copy / "README.md").write_text("---\nlicense: [\n---\n")
    assert card.base_license(str(copy)) is None  # a base's broken card must not cost a trained model
