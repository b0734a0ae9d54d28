"""A tiny random Llama with a byte-level tokenizer, made in a second and loaded like any other model."""

import string
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<unk>", "<s>", "</s>")
READABLE = [*string.ascii_letters, *string.digits, ".", "Ġ", "Ċ"]  # the last two are the byte level's space and newline


def write_tiny_model(
    directory: Path,
    seed: int = 0,
    alphabet: Iterable[str] | None = None,
    max_length: int = 2048,
    ends: bool = True,
    *,
    head_dim: int = 8,
) -> Path:
    """Save the model and its tokenizer to `directory` and return it. Vocabulary: 3 special tokens, 256 bytes.

    What it says is seldom UTF-8, so its text has other tokens than it said; not so with `alphabet` READABLE. It says
    its end of sequence as often as any token, and goes on behind it where it never `ends`.
    """
    tokens = sorted(alphabet or pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *tokens])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = {"unk_token": "<unk>", "bos_token": "<s>"} | ({"eos_token": "</s>"} if ends else {})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)  # type: ignore[no-untyped-call]
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=head_dim,
            max_position_embeddings=max_length,
            bos_token_id=1,
            eos_token_id=2 if ends else None,
            tie_word_embeddings=True,
        )
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
