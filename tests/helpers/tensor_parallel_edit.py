"""Edits a model that two ranks share out, and one process the whole of it: run by test_tensor_parallel.py."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from tiny import exact_norms, tiny_facts, tiny_texts, tiny_tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from coachhook_fast import EditConfig, Editor, EditRequest, load_edits
from coachhook_fast.evaluate.inspect import inspect_prompt

GATES = ("calibrated", "sequence")
PROMPT = "These days the home of Ada Vale is the city of"


def run(folder: Path, model: nn.Module, gate: str) -> dict[str, Tensor]:
    """Statistics, edits, a rollback, gates, logits, texts and loaded edits of `model`, saved in `folder`."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    tokenizer = tiny_tokenizer()
    config = EditConfig(
        layers=(1, 2), v_num_grad_steps=4, context_tokens=3, context_seeds=("The",), threshold_keys=64, gate=gate,
        stats_sequence_length=32, max_batch_tokens=128, mom2_update_weight=5.0, hard_negatives=2,
        threshold_relative=gate == "calibrated", round_robin=2 if gate == "calibrated" else 1,
    )  # fmt: skip
    editor = Editor(model, tokenizer, config)
    tensors: dict[str, Tensor] = {}
    statistics = editor.collect_statistics(tiny_texts(12), progress=False)
    tensors |= {f"moment.{layer}": moment for layer, moment in statistics.moments.items()}
    requests = [EditRequest(**fact) for fact in tiny_facts(8)]
    editor.edit(requests[:5], progress=False)
    last = editor.edit(requests[5:], progress=False)
    tensors |= _seen(model, tokenizer, "both")
    edits = folder / f"edits-{gate}"
    if not dist.is_initialized() or dist.get_rank() == 0:
        editor.save_pretrained(edits)
    editor.rollback(last.id)
    tensors |= _seen(model, tokenizer, "one")
    with editor.disabled():
        tensors |= _seen(model, tokenizer, "none")
    editor.unload()
    if dist.is_initialized():
        dist.barrier()
    load_edits(model, edits)
    tensors |= _seen(model, tokenizer, "loaded")
    return tensors


def _seen(model: Any, tokenizer: Any, name: str) -> dict[str, Tensor]:
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    inspection = inspect_prompt(model, tokenizer, PROMPT)
    with torch.no_grad():
        seen = {
            f"{name}.logits": model(ids).logits,
            f"{name}.text": model.generate(ids, max_new_tokens=6, do_sample=False),
            f"{name}.norm": inspection.norm,
            f"{name}.fire": inspection.fire,
        }
        if model.coachhook.hooks[0].gate == "calibrated":
            with model.coachhook.select(["default", None]):
                seen[f"{name}.rows"] = model(ids.expand(2, -1)).logits
    return {key: value.contiguous() for key, value in seen.items()}


def load(folder: Path, **options: Any) -> Any:
    """The model saved in `folder`, in fp64 throughout."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64, **options).eval()
    exact_norms(model)
    return model


if __name__ == "__main__":
    from transformers.distributed import DistributedConfig

    dist.init_process_group("gloo")
    folder = Path(sys.argv[1])
    for gate in GATES:
        model = load(folder, distributed_config=DistributedConfig(tp_plan="auto"))
        save_file(run(folder, model, gate), folder / f"{gate}{dist.get_rank()}.safetensors")
    dist.destroy_process_group()
