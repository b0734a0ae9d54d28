"""The trained model as a plain Hugging Face directory: safetensors, tokenizer, chat template, generation config."""

import copy
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from alpaca_ray import models
from alpaca_ray.config import TrainConfig
from alpaca_ray.prompts import alpaca_chat_template
from alpaca_ray.train import lora, tensor_file
from alpaca_ray.train.strategy import Strategy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_SHARD_SIZE = "5GB"  # of a file, as in transformers; memory holds one tensor, however large the file
CARD_FILES = ("README.md", "losses.svg")


def write_trained(state: Strategy, config: TrainConfig, directory: Path | None) -> None:
    """Write the model that is trained, its adapters merged; every rank must call it, all but one with `directory` None.

    That one is rank 0, the only one with values.
    """
    weights = state.weights()
    plain = lora.Merged(weights, config.lora) if config.lora else weights
    write(plain, state.model.config, models.load_tokenizer(config.base_model), config.export_dtype, directory)


def write(
    weights: Mapping[str, Tensor],
    config: PreTrainedConfig,
    tokenizer: "PreTrainedTokenizerBase",
    dtype: str,
    directory: Path | None,
) -> None:
    """Write the weights in `dtype` ("float32" or "bfloat16"), with all that `from_pretrained` needs.

    `directory` None: ask for the weights in the same order, which a sharded model's `Weights` need, and write nothing.
    The chat template is Alpaca's, since the model knows no other prompt, and generation ends at the token that the
    answers ended with.
    """
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = copy.deepcopy(config)
    config.use_cache = True  # off while training; generation is slow without
    config.update(ends)
    plain = skeleton(config, dtype)
    write_weights(weights, plain, directory, MAX_SHARD_SIZE)
    if directory is None:
        return
    plain.config.save_pretrained(directory)
    GenerationConfig(**ends).save_pretrained(directory)  # type: ignore[no-untyped-call]
    tokenizer.chat_template = alpaca_chat_template(adds_bos(tokenizer))
    tokenizer.save_pretrained(directory)


def adds_bos(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether plain text gets a beginning-of-sequence token, as with Llama's tokenizer."""
    ids: list[int] = tokenizer("x").input_ids
    return tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id


def directory_hash(directory: Path) -> str:
    """SHA-256 over the names and contents of all files below but the model card's, first 16 digits.

    The card tells how the run went, its times included: the same weights trained twice are the same model.
    """
    digest = hashlib.sha256()
    for path in sorted(p for p in directory.rglob("*") if p.is_file() and p.name not in CARD_FILES):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.relative_to(directory).as_posix()} {content}\n".encode())
    return digest.hexdigest()[:16]


def skeleton(config: PreTrainedConfig, dtype: str) -> PreTrainedModel:
    """The model without weights (on the meta device): names, shapes, which of them are tied."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))  # type: ignore[no-untyped-call]
    model.config.architectures = [type(model).__name__]
    model.config.dtype = getattr(torch, dtype)
    return model


def write_weights(
    weights: Mapping[str, Tensor], plain: PreTrainedModel, directory: Path | None, max_shard_size: str
) -> None:
    """Files of at most `max_shard_size` ("5GB"), with an index where there are several; `directory` as for `write`."""
    tied = plain.all_tied_weights_keys  # from_pretrained ties them again
    shapes = {name: tensor for name, tensor in plain.state_dict().items() if name not in tied}
    assert shapes.keys() == weights.keys() - tied.keys(), "the weights have other names than the config's model"
    split = split_torch_state_dict_into_shards(shapes, max_shard_size=max_shard_size)
    for file_name, names in split.filename_to_tensors.items():
        chosen = {name: shapes[name] for name in names}
        if directory is None:
            for name in names:
                _ = weights[name]  # a collective
        else:
            directory.mkdir(parents=True, exist_ok=True)
            _write_file(directory / file_name, chosen, weights)
    if directory is not None and split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_file(path: Path, shapes: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    with tensor_file.create(path, tensor_file.header(shapes)) as add:
        for name, shape in shapes.items():
            add(tensor_file.raw(weights[name].to(shape.dtype)))
