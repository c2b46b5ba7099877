"""Edits a tiny model on every rank and saves what rank 0 has: run by test_distributed.py under torchrun's variables."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from tiny import tiny_facts, tiny_model, tiny_texts, tiny_tokenizer

from coachhook_fast import EditConfig, Editor, EditRequest


def run(out: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    config = EditConfig(
        layers=(1, 2), v_num_grad_steps=4, context_tokens=3, context_seeds=("The",), threshold_keys=64,
        stats_sequence_length=32, max_batch_tokens=128, mom2_update_weight=5.0,
    )  # fmt: skip
    editor = Editor(tiny_model("llama", dtype=torch.float64), tiny_tokenizer(), config)
    statistics = editor.collect_statistics(tiny_texts(12), progress=False)
    editor.edit([EditRequest(**fact) for fact in tiny_facts(5)], progress=False)
    tensors = {f"moment.{layer}": moment for layer, moment in statistics.moments.items()}
    for index, hook in enumerate(editor.hooks):
        tensors[f"delta.{index}"] = hook.get_delta_weight().contiguous()
        tensors[f"threshold.{index}"] = torch.tensor(hook.threshold, dtype=torch.float64)
    tensors["tokens"] = torch.tensor(statistics.tokens)
    save_file(tensors, out)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    run(Path(sys.argv[1]) / f"rank{dist.get_rank()}.safetensors")
    dist.destroy_process_group()
