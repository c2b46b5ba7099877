"""`coachhook bench serving`: tokens per second of an edited SmolLM2 beside the unedited one, and the published hook's.

`ratio` is tokens/s edited ÷ unedited. Candidates share their weights and run in turns; `paired_ratio`, the median of
the turns' own ratios, feels least of what else the machine does. vLLM is measured too where COACHHOOK_VLLM_PYTHON, or
.venv-vllm in the working folder, has it: two processes for each side. COACHHOOK_BENCH_EDITS names an edit set for
SmolLM2; without it 30 edits are made once and kept in the cache folder.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coachhook_fast.bench import rows as common
from coachhook_fast.edits.manifest import MANIFEST
from coachhook_fast.hooks.layer import HookLinear
from coachhook_fast.hooks.load_edits import load_edits
from coachhook_fast.hooks.shared_weights import shared_weight_copy
from coachhook_fast.models.loading import cache_dir, load_model
from coachhook_fast.request import EditRequest

EDITS = 30
NEW_TOKENS = 32
TURNS = 12
BATCHES = (1, 8)
PROMPTS = (
    "The river rises in the hills north of the town and",
    "In the spring of 1874 the first bridge was built of timber;",
    "My favourite book is about a sailor who",
    "Water boils at a temperature of",
    "The capital of France is",
    "When the railway came, the old market",
    "A good loaf of bread needs flour, water and",
    "The orchestra tuned its instruments while",
)


class PublishedLayer(nn.Module):
    """bench/baselines/published_hook.py in a down-projection's place."""

    def __init__(self, hook: HookLinear) -> None:
        super().__init__()
        weight, bias = hook.weight.detach(), hook.bias
        self.hook = common.baseline("published_hook").PublishedHook(weight, bias, hook.get_delta_weight(), 2.2)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.hook(x)
        return found


def edits_folder() -> Path:
    """Of 30 edits for SmolLM2, made here if there are none."""
    given = os.environ.get("COACHHOOK_BENCH_EDITS")
    folder = Path(given) if given else cache_dir() / "bench" / f"smollm2-{EDITS}"
    if not (folder / MANIFEST).is_file():
        from coachhook_fast.editing.editor import Editor

        model, tokenizer = load_model("smollm2", dtype="float32")
        editor = Editor(model, tokenizer)
        names = [f"{first} {last}" for first in ("Ada", "Bruno", "Clara") for last in _LAST]
        crafts = ("baker", "pilot", "judge", "miner", "tailor")
        requests = [
            EditRequest("{} works as a", name, crafts[index % len(crafts)]) for index, name in enumerate(names[:EDITS])
        ]
        for start in range(0, EDITS, 10):
            editor.edit(requests[start : start + 10])
        editor.save_pretrained(folder)
    return folder


_LAST = ("Vale", "Ostrow", "Quill", "Brandt", "Marsh", "Nilsen", "Okafor", "Pereira", "Rask", "Sato")


def run() -> list[common.Row]:
    folder = edits_folder()
    base, tokenizer = load_model("smollm2", dtype="float32")
    base.generation_config.eos_token_id = None  # type: ignore[union-attr] # all runs to the same length
    edited, published = shared_weight_copy(base), shared_weight_copy(base)
    load_edits(edited, folder)
    load_edits(published, folder)
    handle: Any = published.coachhook
    layers = {layer: PublishedLayer(hook) for layer, hook in zip(handle.layers, handle.hooks, strict=True)}
    layout, count = handle.layout, handle.edit_set.num_edits
    handle.unload()
    for layer, module in layers.items():
        parent, _, name = layout.rewrite_module_tmp.format(layer).rpartition(".")
        setattr(published.get_submodule(parent), name, module)
    checked = _agrees_without_cache(edited, tokenizer)
    ranks = [hook.delta.rank for hook in edited.coachhook.hooks]  # type: ignore[union-attr,operator]
    weights = sum(parameter.numel() for parameter in base.parameters())
    floor = 1.0 + sum(ranks) * edited.coachhook.hooks[0].in_features / weights  # type: ignore[union-attr,operator,index]
    found = []
    for batch in BATCHES:
        inputs = _inputs(tokenizer, batch)
        runs = [_generate(model, inputs) for model in (base, edited, published)]
        for once in runs:
            once()
        unedited, ours, theirs = common.in_turns(runs, TURNS)
        for work, seconds, right in (("HookLinear", ours, checked), ("published hook", theirs, True)):
            found.append(
                common.row(
                    f"generate(), {work}, {count} edits, batch {batch}", "unedited model", seconds, unedited,
                    floor_seconds=floor * statistics.median(unedited), checked=right, dtype=torch.float32,
                    shape=f"SmolLM2-135M, rank {max(ranks)}, {NEW_TOKENS} new tokens",
                    tokens_per_second=batch * NEW_TOKENS / statistics.median(seconds),
                    paired_ratio=statistics.median(a / b for a, b in zip(unedited, seconds, strict=True)),
                )
            )  # fmt: skip
    return found + _vllm_rows(folder, tokenizer, floor, max(ranks), count)


def _inputs(tokenizer: Any, batch: int) -> dict[str, Tensor]:
    tokenizer.padding_side = "left"
    return dict(tokenizer(list(PROMPTS[:batch]), padding=True, return_tensors="pt"))


def _generate(model: Any, inputs: dict[str, Tensor]) -> Callable[[], Tensor]:
    return lambda: model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)


def _agrees_without_cache(model: Any, tokenizer: Any) -> bool:
    """The batch's tokens with the cache are those without it, and the edits fire on an edited prompt."""
    inputs = _inputs(tokenizer, 4)
    cached = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    plain = model.generate(**inputs, max_new_tokens=8, do_sample=False, use_cache=False)
    request = model.coachhook.edit_set.batches[0].requests[0]
    ids = tokenizer(request.text, return_tensors="pt").input_ids
    with torch.no_grad():
        edited = model(ids).logits
        with model.coachhook.disabled():
            base = model(ids).logits
    return bool(torch.equal(cached, plain)) and not torch.equal(edited, base)


def _vllm_rows(folder: Path, tokenizer: Any, floor: float, rank: int, edits: int) -> list[common.Row]:
    python = Path(os.environ.get("COACHHOOK_VLLM_PYTHON", ".venv-vllm/bin/python"))
    if not python.is_file():
        return []
    model = str(cache_dir() / "models" / "smollm2-135m-instruct")
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    edited = str(folder.resolve())
    seconds: dict[str, list[float]] = {"": [], edited: []}
    for side in ("", edited, edited, ""):  # a machine that slows down evenly slows both alike
        request = {"mode": "eager", "model": model, "edits": side, "prompts": prompts, "swap_to": "", "repeat": TURNS}
        done = subprocess.run(
            [str(python), "-m", "coachhook_fast.integrations.vllm_modes"],
            input=json.dumps(request), capture_output=True, text=True, check=True,
        )  # fmt: skip
        line = next(line for line in done.stdout.splitlines() if line.startswith("REPORT "))
        report = json.loads(line.removeprefix("REPORT "))
        seconds[side] += report["seconds"]
        if side:
            served = report
    checked = served["first"] == served["again"]
    return [
        common.row(
            f"vLLM {served['vllm']} eager, HookLinear, {edits} edits, batch {len(PROMPTS)}", "unedited model",
            seconds[edited], seconds[""], floor_seconds=floor * statistics.median(seconds[""]), checked=checked,
            dtype=torch.float32, shape=f"SmolLM2-135M, rank {rank}, 24 new tokens",
            tokens_per_second=len(PROMPTS) * 24 / statistics.median(seconds[edited]),
        )
    ]  # fmt: skip
