"""`coachhook bench targets` on a GPU: target values of random models of real sizes, which need no files.

The models are made on the GPU, the requests of random tokens at realistic lengths. The baseline is slow, so it works on
the first `SAMPLE` requests; every answer is checked before it is timed.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPTJConfig, GPTJForCausalLM, LlamaConfig, LlamaForCausalLM

from coachhook_fast.bench.rows import Row, baseline, once
from coachhook_fast.bench.rows import row as make_row
from coachhook_fast.bench.workload import gemm_rate, needed_flops
from coachhook_fast.config import EditConfig
from coachhook_fast.editing.keys import bare_outputs
from coachhook_fast.editing.targets.optimise import Target, optimise
from coachhook_fast.models.architectures import layout_of
from coachhook_fast.models.passes.forward import PartialModel, frozen
from coachhook_fast.request import EditRequest, TokenisedRequest, TokenRow

SAMPLE = 2
# Six rows a request and 25 steps, as published. A random model hardly listens to one token: a wider ball.
_CONFIG = EditConfig.paper(gate="calibrated", clamp_norm_factor=4.0)


@dataclass(frozen=True)
class _Case:
    name: str
    kind: type[nn.Module]
    config: Any
    dtype: torch.dtype
    last: int  # last edited block
    count: int  # requests


def _cases() -> list[_Case]:
    smollm2 = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, tie_word_embeddings=True, max_position_embeddings=2048,
    )  # fmt: skip
    gptj = GPTJConfig(n_embd=4096, n_layer=28, n_head=16, n_inner=16384, vocab_size=50400)
    return [
        _Case("SmolLM2-135M's shape", LlamaForCausalLM, smollm2, torch.float32, 8, 20),
        _Case("GPT-J's shape", GPTJForCausalLM, gptj, torch.bfloat16, 8, 100),
    ]


def run(device: str = "cuda") -> list[Row]:
    """Rows "target values" of each model against one request at a time, and of the small one against steps that are
    launched one by one."""
    rows: list[Row] = []
    for case in _cases():
        rows += _rows(case, device)
    return rows


def random_requests(count: int, vocabulary: int, *, seed: int = 0) -> list[TokenisedRequest]:
    """Requests of random tokens: prompts of 6 to 12 tokens with a subject of 2 to 4, targets of 2 or 3, bare and after
    five contexts of 5 to 20 tokens. The subject opens every other prompt."""
    rng = random.Random(seed)

    def text(length: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, vocabulary) for _ in range(length))

    contexts = [text(rng.randint(5, 20)) for _ in range(5)]
    batch = []
    for number in range(count):
        subject, before = text(rng.randint(2, 4)), text(number % 2 * rng.randint(1, 3))
        prompt = before + subject
        prompt += text(rng.randint(max(1, 6 - len(prompt)), 12 - len(prompt)))
        target, lookup = text(rng.randint(2, 3)), len(before) + len(subject) - 1
        rows = [TokenRow(context + prompt, target, len(context) + lookup) for context in (*contexts, ())]
        kl = TokenRow(subject + text(2), (), len(subject) - 1)
        batch.append(TokenisedRequest(EditRequest("{} is", f"subject {number}", "so"), tuple(rows), kl))
    return batch


def _rows(case: _Case, device: str) -> list[Row]:
    _say(f"{case.name}: making the model")
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = case.kind(case.config)
    model = model.to(case.dtype).eval()
    partial, last = PartialModel(model, layout_of(model)), case.last
    batch = random_requests(case.count, case.config.vocab_size)
    few = batch[:SAMPLE]
    plain, block = baseline("one_at_a_time"), partial.blocks[last]
    with frozen(model):
        v0 = bare_outputs(partial, last, batch, pad_id=0, max_tokens=_CONFIG.pass_tokens)

        def ours(requests: Sequence[TokenisedRequest], graphs: bool) -> tuple[float, list[Target]]:
            found: list[Target] = []
            start = v0[:, : len(requests)]
            seconds = once(
                lambda: found.extend(
                    optimise(partial, last, requests, start, _CONFIG, pad_id=0, whole_rows=False, graphs=graphs)
                )
            )
            _say(f"{case.name}: {len(requests)} requests, graphs {graphs}: {seconds:.2f} s, "
                 f"{sum(f.steps for f in found) / len(found):.1f} steps, loss {found[0].loss:.3f}")  # fmt: skip
            return seconds, found

        _, sampled = ours(few, True)  # compiles and warms what the timed calls use
        expected: list[tuple[Tensor, int]] = []
        plain.target_value(model, block, few[0], _CONFIG.replace(v_num_grad_steps=1), 0)
        theirs = once(lambda: expected.extend(plain.target_value(model, block, t, _CONFIG, 0) for t in few))
        _say(f"{case.name}: one at a time, {SAMPLE} requests: {theirs:.2f} s")
        checks = _checked(partial, block, few, v0, sampled, expected)
        _say(f"{case.name}: {checks}")
        rate = gemm_rate(4096, case.config.hidden_size, 4 * case.config.hidden_size, device=device, dtype=case.dtype)
        seconds, found = ours(batch, True)
        floor = needed_flops(partial, last, batch, found) / rate
        shape = f"{case.name} with random weights, {case.count} requests, 6 contexts, last edited block {last}"
        shared = {"dtype": case.dtype, "shape": shape, "floor_seconds": floor / case.count, **checks}
        rows = [
            make_row(
                "target values, an edit", "one request at a time, whole model, whole sequence",
                [seconds / case.count], [theirs / SAMPLE], edits_a_second=case.count / seconds,
                steps=sum(f.steps for f in found) / case.count, baseline_requests=SAMPLE, **shared,
            )
        ]  # fmt: skip
        if case.dtype == torch.float32:  # a large model's steps are long beside their launches
            launched, alike = ours(batch, False)
            pairs = zip(found, alike, strict=True)
            difference = max(float((f.value - g.value).norm() / g.value.norm()) for f, g in pairs)
            shared["largest_difference"], shared["checked"] = difference, checks["checked"] and difference < 1e-4
            rows.append(
                make_row(
                    "target values, an edit, steps as CUDA graphs", "the same steps, launched one by one",
                    [seconds / case.count], [launched / case.count], **shared,
                )
            )  # fmt: skip
    for made in rows:
        _say(f"{made['work']}: {made['seconds'] * 1e3:.1f} ms, {made['ratio']:.1f} times, checked {made['checked']}")
    return rows


def _checked(
    partial: PartialModel,
    block: nn.Module,
    batch: Sequence[TokenisedRequest],
    v0: Tensor,
    found: Sequence[Target],
    expected: Sequence[tuple[Tensor, int]],
) -> dict[str, Any]:
    """fp32: the same values and steps. bf16 rounds the two ways' gradients differently, which Adam's first steps turn
    into another path: there the targets must gain as much likelihood."""
    difference = max(float((f.value - v).norm() / v.norm()) for f, (v, _) in zip(found, expected, strict=True))
    checks: dict[str, Any] = {"largest_difference": difference}
    if v0.dtype == torch.float32:
        same = all(f.steps == steps for f, (_, steps) in zip(found, expected, strict=True))
        return {**checks, "checked": difference < 1e-4 and same}
    losses = [
        tuple(_nll(partial.model, block, tokens, delta) for delta in (None, target.value - clean, value - clean))
        for tokens, clean, target, (value, _) in zip(batch, v0.T.float(), found, expected, strict=False)
    ]
    shares = [(before - ours) / (before - theirs) for before, ours, theirs in losses]
    checked = all(0.9 < share < 1.1 for share in shares)
    return {**checks, "nll": losses, "gain_over_baseline": shares, "checked": checked}


@torch.no_grad()
def _nll(model: Any, block: nn.Module, tokens: TokenisedRequest, delta: Tensor | None) -> float:
    """Mean NLL of the target over the request's rows, with `delta` added to the block's output at the lookup."""
    total = 0.0
    for row in tokens.rows:
        handle = block.register_forward_hook(_adding(delta, row.lookup))
        try:
            logits = model(torch.tensor([row.prompt + row.target], device=model.device), use_cache=False).logits[0]
        finally:
            handle.remove()
        answer = torch.tensor(row.target, device=model.device)
        total += float(nn.functional.cross_entropy(logits[len(row.prompt) - 1 : -1].float(), answer))
    return total / len(tokens.rows)


def _adding(delta: Tensor | None, place: int) -> Any:
    def add(_: nn.Module, __: Any, output: Any) -> Any:
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        if delta is not None:
            hidden[0, place] += delta.to(hidden.dtype)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    return add


def _say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)
