"""How the requests of a batch went in, and the warning about those that did not."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from coachhook_fast.config import EditConfig
from coachhook_fast.editing.answers import Answer
from coachhook_fast.editing.targets.optimise import Target
from coachhook_fast.edits.edit_set import EditOutcome
from coachhook_fast.request import TokenisedRequest

# An edit with more than this share of its residual left at the end did not go in.
RESIDUAL_LEFT_LIMIT = 0.5


class EditWarning(UserWarning):
    """An edit did not go in as it should."""


class NotSaidError(ValueError):
    """A batch that was to be said is not; nothing was changed."""


def check_said(outcomes: Sequence[EditOutcome]) -> None:
    """NotSaidError naming the requests whose target the model did not say in the bare prompt."""
    silent = [
        f"{outcome.request.text!r} -> {outcome.request.target_new!r} (the model answers {outcome.answer!r})"
        for outcome in outcomes
        if not outcome.said
    ]
    if silent:
        raise NotSaidError(f"{len(silent)} of {len(outcomes)} edits are not said: {'; '.join(silent)}")


def outcomes_of(
    batch: Sequence[TokenisedRequest],
    targets: Sequence[Target],
    v0: Tensor,
    after: Tensor,
    leverages: Tensor,
    answers: Sequence[Sequence[Answer]],
    tokenizer: Any,
) -> tuple[EditOutcome, ...]:
    """One outcome a request; v0 and after [m, n]: the last edited block's output before the batch and with its final
    hooks and thresholds; leverages s [L, n]; answers to the bare prompt and then to the paraphrases."""
    values = torch.stack([target.value for target in targets], dim=1)
    wanted = (values - v0).norm(dim=0)
    # Where nothing was wanted the fact was held already.
    left = torch.where(wanted > 0, (values - after.to(values)).norm(dim=0) / wanted, 0.0)
    return tuple(
        EditOutcome(
            tokens.request,
            target.loss,
            target.steps,
            tuple(leverage),
            remaining,
            tokens.in_context_only,
            said=said[0].is_target,
            answer=tokenizer.decode(said[0].tokens),
            said_paraphrases=sum(answer.is_target for answer in said[1:]) / len(said[1:]) if said[1:] else None,
        )
        for tokens, target, leverage, remaining, said in zip(
            batch, targets, leverages.T.tolist(), left.tolist(), answers, strict=True
        )
    )


# What lets more subjects through, by the rule that set τ.
_REMEDIES = {
    "edit_keys": "lower threshold_edit_share, or raise threshold_fpr where ordinary text stands as high",
    "zscore": "lower threshold_z",
    "fpr": "raise threshold_fpr",
}


def warn_of_weak(outcomes: Sequence[EditOutcome], config: EditConfig) -> None:
    """One EditWarning for each request with more than RESIDUAL_LEFT_LIMIT left, or that holds in context only."""
    remedy = "lower alpha" if config.gate == "sequence" else _REMEDIES[config.threshold_rule]
    if config.gate == "calibrated" and config.round_robin == 1:
        remedy += "; a model holds more edits where batches edit layers in round-robin (round_robin)"
    for outcome in outcomes:
        if outcome.in_context_only:
            warnings.warn(
                f"edit {outcome.request.text!r} -> {outcome.request.target_new!r} holds only where text precedes the "
                f"subject: {outcome.request.subject!r} ends at the model's attention sink in the bare prompt, where "
                "all subjects look alike (docs/experiments/sinks.md); begin prompts with other text or a BOS token",
                EditWarning,
                stacklevel=3,
            )
        if config.specific and outcome.said is False and outcome.residual_left <= RESIDUAL_LEFT_LIMIT:
            warnings.warn(
                f"edit {outcome.request.text!r} -> {outcome.request.target_new!r} is not said: the model answers "
                f"{outcome.answer!r} after {outcome.steps} steps (more: v_num_grad_steps; {outcome.loss:.2f} is "
                "left of its loss, of which prompts to keep are a part: keep_factor)",
                EditWarning,
                stacklevel=3,
            )
        if outcome.residual_left > RESIDUAL_LEFT_LIMIT:
            leverages = ", ".join(f"{s:.2f}" for s in outcome.leverage)
            warnings.warn(
                f"edit {outcome.request.text!r} -> {outcome.request.target_new!r} did not go in: "
                f"{outcome.residual_left:.0%} of its residual is left. Leverage s a layer: {leverages} (it "
                "takes s / (1 + s): where s is small, lower mom2_update_weight); where s is large the gate keeps the "
                f"subject out (coachhook inspect shows it): {remedy}",
                EditWarning,
                stacklevel=3,
            )
