"""Target values v* = v0 + δ of a whole batch at once (METHOD.md section 2, step 1).

For each request, δ minimises

    mean over contexts of NLL(target | context + prompt) + kl_factor KL(p0 || pδ) + v_weight_decay ||δ|| / ||v0||²

What does not depend on δ is computed once: the blocks up to the last edited one, and in the blocks above it the keys
and values of all tokens before the lookup position, which act as a fixed cache. A step then runs the upper blocks over
the few tokens from the lookup position on, and the output head at the target positions only. Every request has its own
δ, Adam state, projection and stopping rule; a request that has converged leaves the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from coachhook_fast.config import EditConfig
from coachhook_fast.forward import PartialModel, TokenBatch, align_rows
from coachhook_fast.prefix_cache import PrefixCache
from coachhook_fast.progress import Bar
from coachhook_fast.request import TokenisedRequest


@dataclass(frozen=True)
class Target:
    """One request's target value.

    Attributes:
        value: v* [m]; loss: last loss; steps: Adam steps taken.
    """

    value: Tensor
    loss: float
    steps: int


def optimise(
    partial: PartialModel,
    last: int,
    batch: Sequence[TokenisedRequest],
    v0: Tensor,
    config: EditConfig,
    *,
    pad_id: int,
    whole_rows: bool,
    bar: Bar | None = None,
    keep: Callable[[int, Target], None] | None = None,
) -> list[Target]:
    """Target values of `batch`, in its order.

    Args:
        last: last edited block; δ is added to its output.
        v0: [m, n] clean outputs at the lookup positions (`keys.bare_outputs`).
        whole_rows: feed the last target token and all of "{subject} is a" too; only the `sequence` gate's statistics
            can tell the difference.
        bar: advanced by one a request; keep: called with index and target as soon as each is found.

    Raises:
        ValueError: a loss is not finite; the message names the request.
    """
    results: list[Target | None] = [None] * len(batch)
    order = sorted(range(len(batch)), key=lambda index: max(len(r.prompt) + len(r.target) for r in batch[index].rows))
    for group in _groups(order, batch, config.max_batch_tokens):
        rows = _Rows.build(partial, last, [batch[index] for index in group], pad_id, whole_rows)
        problem = _Problem(partial, last, rows, v0[:, group].T, config)
        for position, target in problem.solve():
            index = group[position]
            if not torch.isfinite(target.value).all() or target.loss != target.loss:
                raise ValueError(f"requests[{index}] has a loss of {target.loss}: {batch[index].request.text!r}")
            results[index] = target
            if keep is not None:
                keep(index, target)
            if bar is not None:
                bar.advance(1, f"loss {target.loss:.3f} after {target.steps} steps")
    return [target for target in results if target is not None]


@dataclass(frozen=True)
class _Rows:
    """The rows of some requests from the lookup position on, with all that comes before them as fixed tensors.

    Request i has rows i·R … i·R + R − 1: R − 1 contexts with prompt and target, and "{subject} is a" last.

    Attributes:
        hidden: [N, q, m] clean output of the last edited block from the lookup column on.
        cache: keys and values of the columns before, in the blocks above.
        request, row, column, targets, weights: [P], one entry a predicted target token: its request, the row within
            the request, the column that predicts it (0 is the lookup position), the token, and its share of the loss
            (1 / contexts / target tokens).
    """

    tokens: TokenBatch
    hidden: Tensor
    cache: PrefixCache
    rows_each: int
    request: Tensor
    row: Tensor
    column: Tensor
    targets: Tensor
    weights: Tensor

    @classmethod
    @torch.no_grad()
    def build(
        cls,
        partial: PartialModel,
        last: int,
        batch: Sequence[TokenisedRequest],
        pad_id: int,
        whole_rows: bool,
    ) -> _Rows:
        texts: list[list[int]] = []
        lookups: list[int] = []
        predictions: list[tuple[int, int, int, int]] = []
        weights: list[float] = []
        for position, tokens in enumerate(batch):
            for number, row in enumerate(tokens.rows):
                fed = row.target if whole_rows else row.target[:-1]
                texts.append([*row.prompt, *fed])
                lookups.append(row.lookup)
                first = len(row.prompt) - 1 - row.lookup
                predictions += [(position, number, first + i, token) for i, token in enumerate(row.target)]
                weights += [1.0 / len(tokens.rows) / len(row.target)] * len(row.target)
            texts.append(list(tokens.kl.prompt if whole_rows else tokens.kl.prompt[: tokens.kl.lookup + 1]))
            lookups.append(tokens.kl.lookup)
        padded = align_rows(texts, lookups, pad_id, partial.device)
        _, below = partial.run(padded.columns(0), until=last, outputs=[last])
        hidden = below.outputs[last]
        cache = PrefixCache.fill(partial, last, padded, hidden)
        request, row_number, column, targets = torch.tensor(predictions, device=partial.device).unbind(1)
        return cls(
            tokens=padded,
            hidden=hidden[:, padded.lookup :],
            cache=cache,
            rows_each=len(batch[0].rows) + 1,
            request=request,
            row=row_number,
            column=column,
            targets=targets,
            weights=torch.tensor(weights, dtype=torch.float64, device=partial.device),
        )

    def select(self, kept: Tensor) -> _Rows:
        """The rows of the requests `kept` (positions, ascending)."""
        rows = (kept[:, None] * self.rows_each + torch.arange(self.rows_each, device=kept.device)).flatten()
        renumbered = torch.full((int(self.request.max()) + 1,), -1, device=kept.device)
        renumbered[kept] = torch.arange(kept.numel(), device=kept.device)
        mine = renumbered[self.request] >= 0
        return replace(
            self,
            tokens=self.tokens.select(rows),
            hidden=self.hidden[rows],
            cache=self.cache.select(rows),
            request=renumbered[self.request][mine],
            row=self.row[mine],
            column=self.column[mine],
            targets=self.targets[mine],
            weights=self.weights[mine],
        )


class _Problem:
    """The optimisation of one group of requests."""

    def __init__(self, partial: PartialModel, last: int, rows: _Rows, v0: Tensor, config: EditConfig) -> None:
        self.partial = partial
        self.last = last
        self.rows = rows
        # δ and its optimiser live in fp32 at least, whatever the model computes in.
        self.v0 = v0.to(torch.promote_types(v0.dtype, torch.float32))
        self.config = config
        self.clean: Tensor | None = None  # [requests, V] log p0 at the KL rows

    def solve(self) -> list[tuple[int, Target]]:
        """(position in the group, target), in the order in which requests stop."""
        count = self.v0.shape[0]
        deltas = [torch.zeros_like(self.v0[i]).requires_grad_() for i in range(count)]
        adam = torch.optim.Adam(deltas, lr=self.config.v_lr)
        bound = self.config.clamp_norm_factor * self.v0.norm(dim=1)
        active = list(range(count))
        done: list[tuple[int, Target]] = []
        for step in range(self.config.v_num_grad_steps + 1):
            final = step == self.config.v_num_grad_steps
            stacked = torch.stack([deltas[i] for i in active])
            with torch.set_grad_enabled(not final):
                losses = self._losses(stacked, active)
            values = losses.detach().tolist()
            stopping = [final or not value >= self.config.v_loss_threshold for value in values]  # NaN stops too
            for i, value, stops in zip(active, values, stopping, strict=True):
                if stops:
                    done.append((i, Target(self.v0[i] + deltas[i].detach(), value, step)))
            if all(stopping):
                return done
            going = [i for i, stops in zip(active, stopping, strict=True) if not stops]
            adam.zero_grad(set_to_none=True)
            gradients = torch.autograd.grad(losses.sum(), [deltas[i] for i in going])
            for i, gradient in zip(going, gradients, strict=True):
                deltas[i].grad = gradient  # requests without one are passed over by Adam
            adam.step()
            with torch.no_grad():
                for i in going:
                    deltas[i] *= (bound[i] / deltas[i].norm().clamp(min=1e-30)).clamp(max=1.0)
            if len(going) < len(active):
                kept = torch.tensor([active.index(i) for i in going], device=self.v0.device)
                self.rows = self.rows.select(kept)
                if self.clean is not None:
                    self.clean = self.clean[kept]
                active = going
        raise AssertionError("unreachable: the last step stops every request")

    def _losses(self, delta: Tensor, active: list[int]) -> Tensor:
        """[active] losses for delta [active, m]."""
        rows = self.rows
        shift = delta.repeat_interleave(rows.rows_each, dim=0).to(rows.hidden.dtype)
        hidden = torch.cat([(rows.hidden[:, :1] + shift[:, None]), rows.hidden[:, 1:]], dim=1)
        kl_rows = torch.arange(len(active), device=delta.device) * rows.rows_each + rows.rows_each - 1
        at_rows = torch.cat([rows.request * rows.rows_each + rows.row, kl_rows])
        at_columns = torch.cat([rows.column, torch.zeros_like(kl_rows)])
        with self.partial.gathered_logits(at_rows, at_columns):
            result, _ = self.partial.run(
                rows.tokens.columns(rows.tokens.lookup),
                resume=(self.last, hidden),
                **rows.cache.options(),
            )
        logits = result.logits[0]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        log_p = logits[: rows.targets.numel()].log_softmax(-1)
        nll = -log_p.gather(1, rows.targets[:, None])[:, 0] * rows.weights.to(log_p.dtype)
        log_kl = logits[rows.targets.numel() :].log_softmax(-1)
        if self.clean is None:
            self.clean = log_kl.detach()
        kl = (self.clean.exp() * (self.clean - log_kl)).sum(-1)
        v0 = self.v0[active]
        decay = delta.norm(dim=1) / v0.norm(dim=1).square()
        total = torch.zeros(len(active), dtype=log_p.dtype, device=log_p.device).index_add(0, rows.request, nll)
        return total + self.config.kl_factor * kl + self.config.v_weight_decay * decay


def _groups(order: Sequence[int], batch: Sequence[TokenisedRequest], max_tokens: int) -> list[list[int]]:
    """Requests of like length together, at most `max_tokens` padded tokens a group (one request at least)."""
    groups: list[list[int]] = []
    before = after = 0
    for index in order:
        rows = batch[index].rows
        longer_before = max(before, *(row.lookup for row in rows))
        longer_after = max(after, *(len(row.prompt) + len(row.target) - row.lookup for row in rows))
        size = ((len(groups[-1]) if groups else 0) + 1) * (len(rows) + 1) * (longer_before + longer_after)
        if not groups or size > max_tokens:
            groups.append([])
            longer_before = max(row.lookup for row in rows)
            longer_after = max(len(row.prompt) + len(row.target) - row.lookup for row in rows)
        groups[-1].append(index)
        before, after = longer_before, longer_after
    return groups
