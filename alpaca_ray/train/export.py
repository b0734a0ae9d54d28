"""The trained model as a plain Hugging Face directory: safetensors, tokenizer, chat template, generation config."""

import copy
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from alpaca_ray.prompts import alpaca_chat_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def write(
    weights: dict[str, Tensor],
    config: PreTrainedConfig,
    tokenizer: "PreTrainedTokenizerBase",
    dtype: str,
    directory: Path,
) -> None:
    """Write gathered weights in `dtype` ("float32" or "bfloat16"), with all that `from_pretrained` needs.

    The chat template is Alpaca's, since the model knows no other prompt, and generation ends at the token that the
    answers ended with.
    """
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = copy.deepcopy(config)
    config.use_cache = True  # off while training; generation is slow without
    config.update(ends)
    plain = _assemble(weights, config, getattr(torch, dtype))
    plain.generation_config = GenerationConfig(**ends)  # type: ignore[no-untyped-call]
    plain.save_pretrained(directory)
    tokenizer.chat_template = alpaca_chat_template(adds_bos(tokenizer))
    tokenizer.save_pretrained(directory)


def _assemble(weights: dict[str, Tensor], config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    # A fresh model around the gathered weights: the sharded one would gather them all a second time to save them.
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    model.load_state_dict({name: weight.to(dtype) for name, weight in weights.items()}, assign=True)
    model.tie_weights()
    return model


def adds_bos(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether plain text gets a beginning-of-sequence token, as with Llama's tokenizer."""
    ids: list[int] = tokenizer("x").input_ids
    return tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id


def directory_hash(directory: Path) -> str:
    """SHA-256 over the names and contents of all files below, first 16 digits."""
    digest = hashlib.sha256()
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.relative_to(directory).as_posix()} {content}\n".encode())
    return digest.hexdigest()[:16]
