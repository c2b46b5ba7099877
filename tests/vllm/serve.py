"""Runs vLLM on SmolLM2 in one mode and prints the tokens for each prompt as JSON; test_vllm.py starts one a mode."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

MODES: dict[str, dict[str, Any]] = {
    "eager": {"enforce_eager": True, "enable_prefix_caching": False},
    "chunked": {
        "enforce_eager": True,
        "max_num_batched_tokens": 64,
        "max_num_seqs": 8,
        "enable_chunked_prefill": True,
        "enable_prefix_caching": True,
    },
    "preempted": {"enforce_eager": True, "num_gpu_blocks_override": 14, "enable_prefix_caching": False},
    "speculative": {
        "enforce_eager": True,
        "speculative_config": {
            "method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1,
        },
    },
    "compiled": {"enforce_eager": False},
    "tensor_parallel": {"enforce_eager": True, "tensor_parallel_size": 2},
}  # fmt: skip


def main(mode: str, folder: Path) -> None:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # for swap_edits, whose function goes to the workers
    options = dict(MODES[mode])
    if options.get("tensor_parallel_size", 1) > 1:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
    else:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    edits = {"quant_method": "coachhook", "edit_set": str(folder / "edits-a"), "reserve_rank": 32}
    llm = LLM(
        str(folder / "model"), dtype="float32", max_model_len=512, block_size=32, seed=0, disable_log_stats=False,
        hf_overrides={"quantization_config": edits}, **options,
    )  # fmt: skip
    prompts = json.loads((folder / "expected.json").read_text())["prompts"]
    sampling = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)

    def tokens() -> list[list[int]]:
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
        cached.append(sum(output.num_cached_tokens or 0 for output in outputs))
        return [list(output.outputs[0].token_ids) for output in outputs]

    cached: list[int] = []
    report: dict[str, Any] = {"a": tokens()}
    if mode in ("chunked", "tensor_parallel", "compiled"):
        report["again"] = tokens()
        from coachhook_fast.integrations.vllm import swap_edits

        swap_edits(llm, folder / "edits-b")
        report["b"] = tokens()
        swap_edits(llm, folder / "edits-a")
        report["back"] = tokens()
    report["cached"] = cached
    report["metrics"] = {
        metric.name: metric.value for metric in llm.get_metrics() if isinstance(getattr(metric, "value", None), int)
    }
    print("REPORT " + json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
