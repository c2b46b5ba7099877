"""Runs vLLM with an edit set in one of its modes and prints the tokens for each prompt: a process a mode.

    python -m coachhook_fast.integrations.vllm_modes '{"mode": "eager", "model": …, "edits": …, "prompts": [[…], …]}'

`coachhook verify-vllm` and tests/vllm compare them with transformers' (see `verify`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

NEW_TOKENS = 24
MARGIN = 1e-2  # a gap between the two best logits under which rounding may decide

MODES: dict[str, dict[str, Any]] = {
    "eager": {"enforce_eager": True, "enable_prefix_caching": False},
    "chunked and cached": {"enforce_eager": True, "max_num_batched_tokens": 64, "max_num_seqs": 8},
    "preempted": {
        "enforce_eager": True, "num_gpu_blocks_override": 14, "max_model_len": 384, "enable_prefix_caching": False,
    },
    "speculative": {
        "enforce_eager": True,
        "speculative_config": {
            "method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1,
        },
    },
    "compiled": {"enforce_eager": False},
    "tensor parallel": {"enforce_eager": True, "tensor_parallel_size": 2},
}  # fmt: skip


def certain_tokens(model: Any, ids: Sequence[int]) -> list[int]:
    """transformers' greedy tokens for one prompt, up to the first that rounding might change."""
    import torch

    made = model.generate(
        torch.tensor([list(ids)], device=model.device),
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64, device=model.device),
        max_new_tokens=NEW_TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True, eos_token_id=None,
    )  # fmt: skip
    tokens = made.sequences[0, len(ids) :].tolist()
    for step, logits in enumerate(made.logits):
        best = logits[0].float().topk(2).values
        if float(best[0] - best[1]) < MARGIN:
            return tokens[:step]
    return tokens


def run_mode(
    mode: str,
    model: str,
    edits: str,
    prompts: Sequence[Sequence[int]],
    *,
    swap_to: str = "",
    check_base: bool = True,
    timeout: float = 600.0,
) -> tuple[dict[str, Any], str]:
    """Starts a process in `mode`: its report and all that it printed. RuntimeError if it fails."""
    request = json.dumps(
        {
            "mode": mode,
            "model": model,
            "edits": edits,
            "prompts": prompts,
            "swap_to": swap_to,
            "reserve_rank": 32 if swap_to else 0,
            "check_base": check_base,
        }
    )
    done = subprocess.run(
        [sys.executable, "-m", "coachhook_fast.integrations.vllm_modes"],
        input=request, capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip
    printed = done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("REPORT ")]
    if done.returncode != 0 or not lines:
        raise RuntimeError(f"vLLM failed in mode {mode!r} (exit code {done.returncode}):\n{printed[-6000:]}")
    return json.loads(lines[-1].removeprefix("REPORT ")), printed


def disagreements(found: Sequence[Sequence[int]], certain: Sequence[Sequence[int]]) -> list[int]:
    """Numbers of the prompts whose tokens differ from transformers' certain ones."""
    return [
        number
        for number, (ours, theirs) in enumerate(zip(found, certain, strict=True))
        if list(ours[: len(theirs)]) != list(theirs)
    ]


def main() -> None:
    request = json.load(sys.stdin)
    options = {"max_model_len": 512, **MODES[request["mode"]]}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if options.get("tensor_parallel_size", 1) > 1:
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    else:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if request["swap_to"]:
        os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # swap_edits sends a function to the workers
    import vllm
    from vllm import LLM, SamplingParams

    if request["edits"]:
        edits = {
            "quant_method": "coachhook",
            "edit_set": request["edits"],
            "reserve_rank": request.get("reserve_rank", 0),
            "check_base": request.get("check_base", True),
        }
        options["hf_overrides"] = {"quantization_config": edits}
    llm = LLM(
        request["model"], dtype="float32", block_size=32, seed=0, disable_log_stats=False,
        **options,
    )  # fmt: skip
    sampling = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
    cached: list[int] = []

    def tokens() -> list[list[int]]:
        prompts: Any = [{"prompt_token_ids": ids} for ids in request["prompts"]]
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        cached.append(sum(output.num_cached_tokens or 0 for output in outputs))
        return [list(output.outputs[0].token_ids) for output in outputs]

    report: dict[str, Any] = {"vllm": vllm.__version__, "first": tokens(), "again": tokens()}
    if request["swap_to"]:
        from coachhook_fast.integrations.vllm import swap_edits

        swap_edits(llm, request["swap_to"])
        report["swapped"] = tokens()
        swap_edits(llm, request["edits"])
        report["back"] = tokens()
    report["cached"] = cached
    report["seconds"] = []
    for _ in range(request.get("repeat", 0)):
        begun = time.perf_counter()
        tokens()
        report["seconds"].append(time.perf_counter() - begun)
    values = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    report["metrics"] = {name: value for name, value in values.items() if isinstance(value, int)}
    print("REPORT " + json.dumps(report))


if __name__ == "__main__":
    main()
