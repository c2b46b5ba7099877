"""vLLM: a plugin that serves a model with an edit set (`calibrated` gate).

    vllm serve MODEL --hf-overrides '{"quantization_config": {"quant_method": "coachhook", "edit_set": "edits/"}}'

The same entry in the model folder's config.json ships the edits with the model. The hook is a linear method of vLLM:
it is built with the layer, before KV cache sizing and compilation, keeps the layer's type, and its tensors are
preallocated buffers, so that CUDA graphs replay it and `swap_edits` exchanges contents only. The gate keeps no state,
so chunked prefill, prefix caching, preemption and speculation need nothing from it.

Under tensor parallelism the down-projection is row-parallel: each rank holds the columns of B of its own part of the
key. c = B k is summed over the ranks (r floats a token) for the norm; the correction is each rank's own share of U c,
which the layer's all-reduce adds up with the projection.

Imported by vLLM only, through the entry point `vllm.general_plugins`, in every process.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config_or_none
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.linear import WEIGHT_LOADER_V2_SUPPORTED as _V2
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    RowParallelLinear,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import (
    _CUSTOMIZED_METHOD_TO_QUANT_CONFIG,
    get_quantization_config,
    register_quantization_config,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from coachhook_fast.edits import store
from coachhook_fast.edits.delta import LowRankDelta
from coachhook_fast.edits.manifest import read_manifest, version_of
from coachhook_fast.integrations.vllm_buffers import check_room, write_edits
from coachhook_fast.models.architectures import LAYOUTS
from coachhook_fast.models.loading import checkpoint_fingerprint
from coachhook_fast.ops import gated_linear as ops
from coachhook_fast.ops.reference.gated_linear import relative_limit
from coachhook_fast.ops.sketch import make_sketch

METHOD = "coachhook"
TESTED_VERSIONS = ("0.31", "0.32")
_SETTINGS = {"quant_method", "edit_set", "base_quantization", "reserve_rank", "check_base", "edit_set_version"}

logger = logging.getLogger("vllm.coachhook")


def register() -> None:
    """The plugin's entry point: cheap, and harmless when called again.

    vLLM only logs what a plugin raises; with COACHHOOK_STRICT=1 an untested vLLM version ends the process instead.
    """
    import vllm

    if METHOD not in _CUSTOMIZED_METHOD_TO_QUANT_CONFIG:
        register_quantization_config(METHOD)(EditedConfig)
    if not vllm.__version__.startswith(TESTED_VERSIONS):
        message = f"coachhook: tested with vLLM {', '.join(TESTED_VERSIONS)}, this is {vllm.__version__}"
        if os.environ.get("COACHHOOK_STRICT") == "1":
            raise SystemExit(message)
        logger.warning("%s; `coachhook verify-vllm` checks it on this machine", message)


class EditedConfig(QuantizationConfig):
    """What `quantization_config` says, read and checked.

    Attributes:
        folder: of the edit set; a relative path is looked for in the model's folder first.
        base: the config of an already quantised base model; None for a plain one.
        reserve_rank: ranks to leave room for, so that `swap_edits` can bring a larger edit set.
        check_base: compare the checkpoint with the base model that the edits were made for.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        unknown = sorted(set(settings) - _SETTINGS)
        if unknown:
            raise ValueError(f"quantization_config of {METHOD}: unknown keys {unknown}, known are {sorted(_SETTINGS)}")
        if not settings.get("edit_set"):
            raise ValueError(f"quantization_config of {METHOD} must name the folder of the edit set: edit_set=...")
        self.folder = Path(settings["edit_set"])
        self.reserve_rank = int(settings.get("reserve_rank", 0))
        self.check_base = bool(settings.get("check_base", True))
        self.base: QuantizationConfig | None = None
        if settings.get("base_quantization"):
            below = settings["base_quantization"]
            self.base = get_quantization_config(below["quant_method"]).from_config(below)
        self.template = ""
        self.positions: dict[int, int] = {}
        self._attached: set[int] = set()
        self._complete = False
        self._deltas: list[tuple[LowRankDelta, float]] | None = None
        self.digest = ""
        self.frame: dict[str, Any] = {}

    # ---------------------------------------------------------------- what vLLM asks of a config

    def get_name(self) -> Any:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        if self.base is not None:
            return self.base.get_supported_act_dtypes()
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> EditedConfig:
        return cls(config)

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Finds the edit set and checks it against the model; ValueError stops the start."""
        inside = Path(model_name) / self.folder
        self.folder = inside if not self.folder.is_absolute() and inside.is_dir() else self.folder
        manifest = read_manifest(self.folder)
        self.digest = version_of(manifest)
        config = manifest["config"]
        if config["gate"] != "calibrated":
            raise ValueError(
                f"the edit set in {self.folder} has the {config['gate']} gate, which needs whole sequences; vLLM cuts "
                "them: edit with gate='calibrated'"
            )
        if hf_config is not None:
            self._check_model(model_name, hf_config, manifest)
            # The compile cache's key holds the model's config: another edit set must be another key.
            settings = getattr(hf_config, "quantization_config", None)
            if isinstance(settings, dict):
                settings["edit_set_version"] = self.digest
        self.frame = frame_of(manifest)
        self.positions = {layer: position for position, layer in enumerate(config["layers"])}

    def _check_model(self, model_name: str, hf_config: Any, manifest: dict[str, Any]) -> None:
        config, text_config = manifest["config"], hf_config.get_text_config()
        model_type = text_config.model_type
        self.template = config["rewrite_module_tmp"] or ""
        if not self.template:
            if model_type not in LAYOUTS:
                raise ValueError(f"the edit set names no modules and architecture {model_type!r} is not known")
            self.template = LAYOUTS[model_type].rewrite_module_tmp
        count = text_config.num_hidden_layers
        outside = [layer for layer in config["layers"] if layer >= count]
        if outside:
            raise ValueError(f"the edit set edits layers {outside}, but {model_name} has blocks 0 to {count - 1}")
        if not self.check_base:
            return
        found = checkpoint_fingerprint(model_name, hf_config)
        if found is None:
            message = "coachhook: whether the edits were made for %s was not checked: its safetensors are not here, or"
            message += " name its parameters in a way of their own"
            logger.warning(message, model_name)
        elif found != manifest["model"]:
            raise ValueError(
                f"the edit set in {self.folder} belongs to another base model: it was made for fingerprint "
                f'{manifest["model"]}, {model_name} has {found} ("check_base": false skips this, for converted copies)'
            )

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        method = self.base.get_quant_method(layer, prefix) if self.base is not None else None
        if not isinstance(layer, LinearBase):
            return method
        method = method or UnquantizedLinearMethod()
        position = self._position(prefix)
        if position is not None:
            if not isinstance(layer, RowParallelLinear):
                raise ValueError(f"coachhook: {prefix} is a {type(layer).__name__}, expected a RowParallelLinear")
            _refuse_kv_transfer()
            self._attached.add(position)
            delta, threshold = self._edits()[position]
            edited = EditedLinearMethodV2 if type(method).__name__ in _V2 else EditedLinearMethod
            method = edited(method, prefix, position, delta, threshold, self.reserve_rank, self.frame)
        # Loading ends with a call for each layer: the place to notice that an edited layer was never built.
        original = method.process_weights_after_loading

        def process_weights_after_loading(layer: nn.Module) -> None:
            self._check_complete()
            original(layer)

        method.process_weights_after_loading = process_weights_after_loading  # type: ignore[method-assign]
        return method

    # ---------------------------------------------------------------- our own

    def _position(self, prefix: str) -> int | None:
        for layer, position in self.positions.items():
            # Templates name modules as transformers does; vLLM may put a prefix of its own before them.
            if prefix == self.template.format(layer) or prefix.endswith("." + self.template.format(layer)):
                return position
        return None

    def _edits(self) -> list[tuple[LowRankDelta, float]]:
        if self._deltas is None:
            self._deltas = store.load_weights(self.folder)
        return self._deltas

    def _check_complete(self) -> None:
        """Once, when loading ends: every edited block of this rank has its edits."""
        if self._complete:
            return
        expected = set(self.positions.values()) if _pipeline_size() == 1 else self._attached
        missing = sorted(expected - self._attached)
        if missing:
            names = [self.template.format(layer) for layer, at in self.positions.items() if at in missing]
            raise ValueError(f"the edit set does not fit the model: vLLM built no layers {names}")
        self._complete = True
        self._deltas = None  # the layers hold their shards
        # A warning, so that it shows at vLLM's quieter log levels too.
        logger.warning("coachhook: edited %d layers, edit set %s", len(self._attached), self.digest)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_deltas": None}


def frame_of(manifest: dict[str, Any]) -> dict[str, Any]:
    """What an edit set must share with the one that vLLM was started with, to be served in its place."""
    config = manifest["config"]
    return {
        "model": manifest["model"],
        "gate": config["gate"],
        "threshold_relative": bool(config.get("threshold_relative")),
        "layers": list(config["layers"]),
        "rewrite_module_tmp": config.get("rewrite_module_tmp"),
    }


class EditedLinearMethod(LinearMethodBase):
    """The base's linear method, and the gated edits of one layer on top."""

    def __init__(
        self,
        base: Any,
        prefix: str,
        position: int,
        delta: LowRankDelta,
        threshold: float,
        reserve_rank: int,
        frame: dict[str, Any],
    ) -> None:
        self.base = base
        self.prefix = prefix
        self.position = position
        self.reserve_rank = reserve_rank
        self.frame = frame
        self.relative = bool(frame["threshold_relative"])  # the threshold is compared with ||Delta k|| / ||k||
        self._edits: tuple[LowRankDelta, float] | None = (delta, threshold)

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        assert self._edits is not None
        delta, threshold = self._edits
        if (delta.out_features, delta.in_features) != (output_size, input_size):
            raise ValueError(
                f"the edit set does not fit the model: {self.prefix} is [{output_size}, {input_size}], the edits are "
                f"[{delta.out_features}, {delta.in_features}]"
            )
        self.base.create_weights(
            layer, input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype,
            **extra_weight_attrs,
        )  # fmt: skip
        rank = max(delta.B.shape[0], 1)
        if delta.U is not None:
            rank = max(rank, self.reserve_rank)
        B = torch.zeros(rank, input_size_per_partition, dtype=params_dtype)
        layer.register_buffer("coachhook_B", B, persistent=False)
        U = None if delta.U is None else torch.zeros(output_size, rank, dtype=params_dtype)
        layer.register_buffer("coachhook_U", U, persistent=False)
        layer.register_buffer("coachhook_threshold", torch.zeros((), dtype=torch.float32), persistent=False)
        layer.register_buffer("coachhook_sketch", None, persistent=False)
        write_edits(layer, delta, threshold)
        if get_tensor_model_parallel_world_size() == 1:
            # A sketch pays at ranks where most tokens should not be measured in full; its size is the rank's.
            layer.coachhook_sketch = make_sketch(layer.coachhook_B, 1e-9)  # type: ignore[arg-type,assignment]
        self._edits = None

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.base.process_weights_after_loading(layer)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        out = self.base.apply(layer, x, bias)
        B, U, threshold = layer.coachhook_B, layer.coachhook_U, layer.coachhook_threshold
        if layer.tp_size == 1:
            gate = "relative" if self.relative else "calibrated"
            return ops.gated_delta(out, x, U, B, threshold, layer.coachhook_sketch, gate)[0]
        c = x.float() @ B.float().T
        if not self.relative:
            fire = torch.linalg.vector_norm(tensor_model_parallel_all_reduce(c), dim=-1) >= threshold
        else:  # the rank's share of ||k||² goes along
            together = torch.cat([c, ops.key_length(x).square()[..., None]], dim=-1)
            c, squares = tensor_model_parallel_all_reduce(together).split([c.shape[-1], 1], dim=-1)
            fire = torch.linalg.vector_norm(c, dim=-1) >= relative_limit(squares[..., 0].sqrt(), threshold)
        return ops.correct(out, x, U, B, fire)


@register_weight_loader_v2_supported_method
class EditedLinearMethodV2(EditedLinearMethod):
    """For bases whose parameters load themselves: vLLM goes by the method's name."""


class SwapEdits:
    """Exchanges a worker's edits, all or none; a class of its own, so that it travels to worker processes."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __call__(self, model: nn.Module) -> int:
        manifest, edits = read_manifest(Path(self.folder)), store.load_weights(Path(self.folder))
        layers: list[Any] = [
            layer for layer in model.modules() if isinstance(getattr(layer, "quant_method", None), EditedLinearMethod)
        ]
        for layer in layers:
            self._check(layer, frame_of(manifest), edits)
        for layer in layers:
            write_edits(layer, *edits[layer.quant_method.position])
        return len(layers)

    def _check(self, layer: Any, frame: dict[str, Any], edits: list[tuple[LowRankDelta, float]]) -> None:
        for name, served in layer.quant_method.frame.items():
            if frame[name] != served:
                raise ValueError(
                    f"the edit set in {self.folder} has {name} {frame[name]!r}, served are edits with {served!r}: "
                    "start vLLM with it"
                )
        check_room(layer, edits[layer.quant_method.position][0])


def swap_edits(llm: Any, folder: str | Path) -> None:
    """Serves another edit set from now on: contents of buffers only, no restart, no recompilation.

    Args:
        llm: a `vllm.LLM` with no request under way, started with an edit set of the same layers.

    Raises:
        ValueError: requests are under way, or the edits are for another base model, gate or other layers
            (`frame_of`), or do not fit the buffers; what was served before is served still.
    """
    version = version_of(read_manifest(Path(folder)))
    if not llm.reset_prefix_cache():
        raise ValueError("requests are under way: swap edits between requests")
    counts = llm.apply_model(SwapEdits(str(folder)))
    # Blocks of the old version can be there only if a request ran meanwhile; drop them too.
    if not llm.reset_prefix_cache():
        raise ValueError("a request ran during the swap: its answer mixes two versions; ask again")
    logger.warning("coachhook: swapped %s layers to edit set %s", json.dumps(counts), version)


def _pipeline_size() -> int:
    config = get_current_vllm_config_or_none()
    return 1 if config is None else config.parallel_config.pipeline_parallel_size


def _refuse_kv_transfer() -> None:
    """KV connectors share blocks between engines under keys that know the model, not its edits."""
    config = get_current_vllm_config_or_none()
    if config is not None and config.kv_transfer_config is not None:
        raise ValueError("coachhook: kv_transfer_config would let engines of other edit versions share KV blocks")
