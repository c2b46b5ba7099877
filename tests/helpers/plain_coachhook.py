"""CoachHooK once more, as plainly as it can be said: the oracle of tests/editing/test_parity.py.

Written from docs/method.md, independent of the package: shares no line with it, imports nothing from it. One
request at a time, one context at a time, whole sequences through the whole model; no cache, no batch, no
padding, no low rank, no factor that is carried on. Each edited layer has its dense hook weight `Wh`, and `C`
is a dense matrix given to torch.linalg.solve. Meant for tiny fp64 models, and slow even there.

The symbols are docs/method.md's: m model width, d key width, n requests of a batch, L edited layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# model_type -> (the list of blocks, the down-projection within a block)
PLACES = {
    "gpt2": ("transformer.h", "mlp.c_proj"),
    "gptj": ("transformer.h", "mlp.fc_out"),
    "gpt_neox": ("gpt_neox.layers", "mlp.dense_4h_to_h"),
    "llama": ("model.layers", "mlp.down_proj"),
    "mistral": ("model.layers", "mlp.down_proj"),
    "qwen2": ("model.layers", "mlp.down_proj"),
    "qwen3": ("model.layers", "mlp.down_proj"),
    "phi3": ("model.layers", "mlp.down_proj"),
}

BASE, TEMPORARY, VALIDATED = "base", "temporary", "validated"


def z_scores(norms: Tensor) -> Tensor:  # norms [n] -> [n]
    """The paper's z of every token within its sequence, with the unbiased std. One token has none: NaN."""
    std = norms.std() if len(norms) > 1 else norms.new_tensor(math.nan)  # torch says NaN too, and warns
    return (norms - norms.mean()) / std


def published_hook(base: Tensor, hooked: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The published validated hook for one whole sequence: base P and hooked O, both [n, m].

    Returns the output [n, m], and for each token ‖O - P‖, z and whether it took the hooked output [n].
    """
    norms = (hooked - base).norm(dim=-1)
    z = z_scores(norms)
    fire = z >= alpha
    outputs = base.clone()
    outputs[fire] = hooked[fire]
    return outputs, norms, z, fire


def project(delta: Tensor, bound: float) -> Tensor:
    """δ pulled back onto the ball ‖δ‖ <= bound."""
    norm = delta.norm()
    return delta * (bound / norm) if norm > bound else delta


def insertion(C: Tensor, K: Tensor) -> tuple[Tensor, Tensor]:
    """X = (C + KKᵀ)⁻¹K [d, n], and the leverage s = diag(KᵀC⁻¹K) [n] of each key."""
    X = torch.linalg.solve(C + K @ K.T, K)
    s = torch.diagonal(K.T @ torch.linalg.solve(C, K))
    return X, s


@dataclass
class Settings:
    """The numbers of a run. `gate` is "sequence" or "calibrated"; `rule` is "zscore", "fpr" or "edit_keys".

    Where `v_lr` is None, a request's rate is the share `v_share` of ‖v0‖, spread over m coordinates.
    """

    layers: Sequence[int]
    update_weight: float  # λ
    gate: str = "sequence"
    alpha: float = 2.2
    rule: str = "zscore"
    threshold_z: float = 4.0
    threshold_fpr: float = 1e-2
    threshold_edit_share: float = 0.7
    v_lr: float | None = 0.5
    v_share: float = 0.35
    steps: int = 20
    loss_threshold: float = 0.05
    weight_decay: float = 0.5
    clamp: float = 0.75
    kl_factor: float = 0.0625
    continuation_factor: float = 0.0
    seeds: Sequence[str] = ("The", "Therefore", "Because", "I", "You")
    templates: Sequence[str] = ()
    context_tokens: int = 10


@dataclass
class Pass:
    """What one forward pass over one sequence of n tokens showed. Lists have an entry per edited layer."""

    logits: Tensor  # [n, vocabulary]
    block: Tensor  # [n, m], output of the last edited block (before δ is added)
    keys: list[Tensor]  # [n, d]
    norms: list[Tensor]  # [n], ‖O - P‖
    z: list[Tensor]  # [n]
    fire: list[Tensor]  # [n] bool


@dataclass
class Batch:
    """All that one batch of edits computed; lists have an entry per edited layer."""

    V: Tensor  # [m, n]
    losses: list[float] = field(default_factory=list)  # last loss of each request
    steps: list[int] = field(default_factory=list)  # Adam steps that each request took
    K: list[Tensor] = field(default_factory=list)  # [d, n]
    R: list[Tensor] = field(default_factory=list)  # [m, n]
    X: list[Tensor] = field(default_factory=list)  # [d, n]
    s: list[Tensor] = field(default_factory=list)  # [n]
    delta: list[Tensor] = field(default_factory=list)  # [m, d], Wh - W0 after the batch
    thresholds: list[float] = field(default_factory=list)  # α or τ after the batch


class PlainCoachHook:
    """Edits `model` in consecutive batches. The model itself is never changed: hooks are put on per pass.

    Args:
        sequences: token ids of the corpus for E[kkᵀ] and the calibrated threshold; every token counts.
    """

    def __init__(self, model: Any, tokenizer: Any, settings: Settings, sequences: Sequence[Sequence[int]]) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        blocks, down = PLACES[model.config.model_type]
        self.blocks = list(model.get_submodule(blocks))
        self.places = [self.blocks[layer].get_submodule(down) for layer in settings.layers]
        self.W0 = [self._weight(module) for module in self.places]
        self.Wh = [weight.clone() for weight in self.W0]
        # Before the first batch Δ = 0: under `calibrated` no token may fire, under `sequence` none can (0/0).
        self.thresholds = [settings.alpha if settings.gate == "sequence" else math.inf] * len(self.places)
        self.contexts = [self._continue(seed) for seed in settings.seeds]
        self.corpus_keys = self._corpus_keys(sequences)
        self.edit_keys: list[list[Tensor]] = [[] for _ in self.places]  # of every edit so far, [d] each
        self.C = [settings.update_weight * (keys.T @ keys) / len(keys) for keys in self.corpus_keys]

    # ---------------------------------------------------------------- the model

    @staticmethod
    def _weight(module: Any) -> Tensor:
        """W0 [m, d]; GPT-2's Conv1D stores it transposed."""
        weight = module.weight.detach()
        return (weight.T if type(module).__name__ == "Conv1D" else weight).clone()

    def run(self, ids: Sequence[int], modes: Sequence[str] | str, *, delta: Tensor | None = None, at: int = -1) -> Pass:
        """One whole sequence through the whole model, with `modes` for each edited layer (one name: for all),
        and δ added to the last edited block's output at token `at`."""
        L = len(self.places)
        modes = [modes] * L if isinstance(modes, str) else list(modes)
        seen: dict[str, Any] = {"keys": [None] * L, "norms": [None] * L, "z": [None] * L, "fire": [None] * L}

        def make_hook(i: int) -> Any:
            def hook(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
                keys = args[0][0]
                bias = 0 if module.bias is None else module.bias
                # P is computed as O is: where Wh is W0 the two are equal bit for bit: M is 0, not noise.
                base, hooked = keys @ self.W0[i].T + bias, keys @ self.Wh[i].T + bias
                gated, norms, z, fire = self.gate(i, base, hooked)
                seen["keys"][i], seen["norms"][i], seen["z"][i], seen["fire"][i] = keys, norms, z, fire
                return {BASE: output[0], TEMPORARY: hooked, VALIDATED: gated}[modes[i]][None]

            return hook

        def last_block_hook(module: Any, args: tuple[Tensor, ...], output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            seen["block"] = hidden[0].clone()
            if delta is not None:
                hidden = hidden.clone()
                hidden[0, at] = hidden[0, at] + delta
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        handles = [place.register_forward_hook(make_hook(i)) for i, place in enumerate(self.places)]
        handles.append(self.blocks[self.settings.layers[-1]].register_forward_hook(last_block_hook))
        try:
            logits = self.model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
        finally:
            for handle in handles:
                handle.remove()
        return Pass(logits=logits, **seen)

    def gate(self, i: int, base: Tensor, hooked: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The validated hook of edited layer i."""
        outputs, norms, z, fire = published_hook(base, hooked, self.thresholds[i])
        if self.settings.gate == "calibrated":
            fire = norms >= self.thresholds[i]
            outputs = torch.where(fire[:, None], hooked, base)
        return outputs, norms, z, fire

    @torch.no_grad()
    def _continue(self, seed: str) -> str:
        """`seed` and what the un-edited model says next, greedily; on one line, without a slot's braces."""
        ids = list(self.tokenizer(seed)["input_ids"])
        for _ in range(self.settings.context_tokens):
            following = int(self.run(ids, BASE).logits[-1].argmax())
            if following == self.tokenizer.eos_token_id:
                break
            ids.append(following)
        text = str(self.tokenizer.decode(ids, skip_special_tokens=True))
        return " ".join(text.translate({ord("{"): " ", ord("}"): " "}).split())

    @torch.no_grad()
    def _corpus_keys(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """Keys of every corpus token in the un-edited model: [tokens, d] for each edited layer."""
        passes = [self.run(ids, BASE).keys for ids in sequences]
        return [torch.cat([keys[i] for keys in passes]) for i in range(len(self.places))]

    # ---------------------------------------------------------------- tokens

    def encode(self, prompt: str, target: str) -> tuple[list[int], list[int]]:
        """Ids of prompt and target: of the joint text where it begins with the prompt's ids, else of each."""
        prompt_ids = list(self.tokenizer(prompt)["input_ids"])
        joint = list(self.tokenizer(prompt + " " + target)["input_ids"])
        if joint[: len(prompt_ids)] == prompt_ids:
            return prompt_ids, joint[len(prompt_ids) :]
        return prompt_ids, list(self.tokenizer(" " + target, add_special_tokens=False)["input_ids"])

    def lookup(self, text: str, end: int) -> int:
        """Which token holds the byte before character `end`. Counts the bytes of the tokens one by one; in a
        byte-level vocabulary one character of a token's name is one byte. Needs no offsets."""
        wanted = len(text[:end].encode())
        seen = 0
        for index, token_id in enumerate(self.tokenizer(text)["input_ids"]):
            if token_id not in self.tokenizer.all_special_ids:
                seen += len(self.tokenizer.convert_ids_to_tokens(token_id))
            if seen >= wanted:
                return index
        raise AssertionError(f"{text!r} has fewer than {wanted} bytes of tokens")

    def rows(self, fact: dict[str, Any]) -> list[tuple[list[int], list[int], int]]:
        """(prompt ids, target ids, lookup index) under the contexts, in the templates and, last, bare."""
        prompts = [f"{context}. {fact['prompt']}" for context in self.contexts]
        rows = []
        for prompt in [*prompts, *self.settings.templates, fact["prompt"]]:
            before, after = prompt.split("{}")
            text = before + fact["subject"] + after
            lookup = self.lookup(text, len(before + fact["subject"]))
            rows.append((*self.encode(text, fact["target_new"]), lookup))
        return rows

    # ---------------------------------------------------------------- step 1: target values

    def target_value(self, fact: dict[str, Any]) -> tuple[Tensor, float, int]:
        """v* = v0 + δ [m], the last loss, and the number of Adam steps."""
        settings = self.settings
        rows = self.rows(fact)
        bare_ids, bare_target, bare_lookup = rows[-1]
        essence = f"{fact['subject']} is a"
        essence_ids = list(self.tokenizer(essence)["input_ids"])
        essence_lookup = self.lookup(essence, len(fact["subject"]))
        with torch.no_grad():
            v0 = self.run(bare_ids, VALIDATED).block[bare_lookup]
            log_p0 = self.run(essence_ids, VALIDATED).logits[essence_lookup].log_softmax(-1)
            following0 = self.run(bare_ids + bare_target, VALIDATED).logits[-1].log_softmax(-1)

        delta = torch.zeros_like(v0, requires_grad=True)
        rate = settings.v_lr or settings.v_share * v0.norm().item() / math.sqrt(len(v0))
        optimiser = torch.optim.Adam([delta], lr=rate)
        taken = 0
        for _ in range(settings.steps):
            nll = torch.zeros((), dtype=v0.dtype)
            for prompt, target, lookup in rows:
                logits = self.run(prompt + target, VALIDATED, delta=delta, at=lookup).logits
                log_p = logits[len(prompt) - 1 : -1].log_softmax(-1)
                nll = nll - log_p[range(len(target)), target].mean() / len(rows)
            following = logits[-1].log_softmax(-1)  # after the bare prompt and its target, the last row
            logits = self.run(essence_ids, VALIDATED, delta=delta, at=essence_lookup).logits
            log_p = logits[essence_lookup].log_softmax(-1)
            kl = (log_p0.exp() * (log_p0 - log_p)).sum()
            loss = nll + settings.kl_factor * kl + settings.weight_decay * delta.norm() / v0.norm() ** 2
            if settings.continuation_factor > 0:
                loss = loss + settings.continuation_factor * (following0.exp() * (following0 - following)).sum()
            if loss.item() < settings.loss_threshold:
                break
            optimiser.zero_grad()
            loss.backward(inputs=[delta])
            optimiser.step()
            taken += 1
            with torch.no_grad():
                delta.copy_(project(delta, settings.clamp * v0.norm().item()))
        return v0 + delta.detach(), loss.item(), taken

    # ---------------------------------------------------------------- steps 2 and 3

    @torch.no_grad()
    def keys_and_residual(self, i: int, fact: dict[str, Any], v: Tensor, modes: list[str]) -> tuple[Tensor, Tensor]:
        """The key of layer i [d] and what is still missing from the last edited block's output [m]."""
        passes = [(self.run(prompt, modes), lookup) for prompt, _, lookup in self.rows(fact)]
        *in_context, bare = [seen.keys[i][lookup] for seen, lookup in passes]
        seen, lookup = passes[-1]
        return bare / 2 + sum(in_context) / len(in_context) / 2, v - seen.block[lookup]

    def edit(self, facts: Sequence[dict[str, Any]]) -> Batch:
        """One batch of edits (keyword arguments of EditRequest)."""
        L = len(self.places)
        found = [self.target_value(fact) for fact in facts]
        batch = Batch(V=torch.stack([v for v, _, _ in found], dim=1))
        batch.losses, batch.steps = [loss for _, loss, _ in found], [steps for _, _, steps in found]
        for i in range(L):
            modes = [VALIDATED] * i + [TEMPORARY] * (L - i)
            columns = [self.keys_and_residual(i, fact, v, modes) for fact, v in zip(facts, batch.V.T, strict=True)]
            K = torch.stack([key for key, _ in columns], dim=1)
            R = torch.stack([residual for _, residual in columns], dim=1) / (L - i)
            X, s = insertion(self.C[i], K)
            self.Wh[i] = self.Wh[i] + R @ X.T
            self.C[i] = self.C[i] + K @ K.T
            self.edit_keys[i] += list(K.T)
            if self.settings.gate == "calibrated":
                self.thresholds[i] = self.calibrated_threshold(i)
            batch.K.append(K), batch.R.append(R), batch.X.append(X), batch.s.append(s)
        if self.settings.gate == "sequence":
            for i in range(L):
                self.thresholds[i] = min(self.thresholds[i], self.lowest_peak(i, facts))
        batch.delta = [Wh - W0 for Wh, W0 in zip(self.Wh, self.W0, strict=True)]
        batch.thresholds = list(self.thresholds)
        return batch

    def calibrated_threshold(self, i: int) -> float:
        """τ: mean + z·std of ‖Δk‖ over the corpus keys, or the value that `threshold_fpr` of them reach, or, between
        that and three times `threshold_z` std, the share `threshold_edit_share` of the way from mean to 5 % of the edit
        keys; where it is under threshold_z std, as much more of the way as leads there, to .85."""
        settings, delta = self.settings, self.Wh[i] - self.W0[i]
        norms = (self.corpus_keys[i] @ delta.T).norm(dim=-1)
        mean, std = float(norms.mean()), float(norms.std())
        if settings.rule == "zscore":
            return mean + settings.threshold_z * std
        passed = sorted(norms.tolist())[-max(1, round(settings.threshold_fpr * len(norms)))]
        if settings.rule == "fpr":
            return float(passed)
        own = sorted(float((delta @ key).norm()) for key in self.edit_keys[i])
        place = 0.05 * (len(own) - 1)
        low = own[int(place)] + (place - int(place)) * (own[min(int(place) + 1, len(own) - 1)] - own[int(place)])
        wished = mean + settings.threshold_edit_share * (low - mean)
        if wished < mean + settings.threshold_z * std and settings.threshold_edit_share < 0.85:
            wished = max(wished, min(mean + 0.85 * (low - mean), mean + settings.threshold_z * std))
        return max(float(passed), min(wished, mean + 3 * settings.threshold_z * std))

    @torch.no_grad()
    def lowest_peak(self, i: int, facts: Sequence[dict[str, Any]]) -> float:
        """The smallest peak of z in layer i over the batch; a request's peak is the lower of those of its
        prompt and of prompt + target, each in the fully gated model. A text of one token has no z."""
        peaks = [math.inf]
        for fact in facts:
            prompt, target, _ = self.rows(fact)[-1]
            for ids in (prompt, prompt + target):
                if len(ids) > 1:
                    peaks.append(float(self.run(ids, VALIDATED).z[i].max()))
        return min(peaks)
