"""Settings of the target values v*."""

from __future__ import annotations

from dataclasses import dataclass

from coachhook_fast.config.checks import as_tuple, check_flag, check_number, check_optional


@dataclass(frozen=True)
class TargetSettings:
    """How target values are found (docs/method.md section 2, step 1).

    Args:
        specific: target values by normalised descent instead of Adam, with further steps for targets that are not said,
            in later blocks (`later_layers`), inserted whole: edits change one fact and leave the rest of their subject
            alone (docs/experiments/specificity.md). None: unless `v_lr` is given; the paper's is False.
        v_lr: Adam's learning rate for the target values; None takes one a request (editing/targets/optimise.py). Not
            for `specific` ones.
        v_num_grad_steps: steps for a target value; at most four times as many for a `specific` one that is not said.
        v_weight_decay: weight of ||δ|| / ||v0||².
        v_loss_threshold: a request whose loss is below it stops.
        clamp_norm_factor: bound on ||δ|| / ||v0||.
        kl_factor: weight of KL(p0 || pδ) at the subject's last token of "{subject} is a".
        keep_factor: weight of KL(p0 || pδ) at the end of the prompts to keep, those of a request and those that are
            found, mean over them.
        found_paraphrases: a request with fewer paraphrases of its own gets so many from those that are known of its
            question (editing/targets/wordings.py); found_keep: prompts to keep that are found for every request. None:
            3 and 12 where edits are `specific`, else none.
        continuation_factor: weight of KL(p0 || pδ) at the target's last token after the bare prompt: the text goes on
            as it would have instead of repeating the target. It costs reliability where targets are long
            (docs/experiments/drift.md), so it is off, as in the paper.
        context_seeds: beginnings from which the model writes the context texts.
        context_tokens: tokens generated after each beginning.
        subject_templates: further contexts, texts with one slot `{}` for the subject in the place of the prompt; () is
            the paper's way (docs/experiments/generality.md).
    """

    specific: bool | None = None
    v_lr: float | None = None
    v_num_grad_steps: int = 15
    v_weight_decay: float = 0.5
    v_loss_threshold: float = 0.02
    clamp_norm_factor: float = 3.0
    kl_factor: float = 0.0625
    keep_factor: float = 6.0
    found_paraphrases: int | None = None
    found_keep: int | None = None
    continuation_factor: float = 0.0
    context_seeds: tuple[str, ...] = ("The",)
    context_tokens: int = 10
    subject_templates: tuple[str, ...] = ()

    def _check_targets(self) -> None:
        for name in ("context_seeds", "subject_templates"):
            as_tuple(self, name)
            if getattr(self, name) is None:
                raise TypeError(f"{name} must be a list, got None")
        check_flag("specific", self.specific)
        check_optional("v_lr", self.v_lr, above=0.0)
        if self.specific and self.v_lr is not None:
            raise ValueError(f"v_lr is Adam's rate, which specific edits have no use for, got {self.v_lr}")
        check_number("v_num_grad_steps", self.v_num_grad_steps, least=1, integer=True)
        check_number("clamp_norm_factor", self.clamp_norm_factor, above=0.0)
        for name in ("v_weight_decay", "v_loss_threshold", "kl_factor", "keep_factor", "continuation_factor"):
            check_number(name, getattr(self, name), least=0.0)
        for name in ("found_paraphrases", "found_keep"):
            check_optional(name, getattr(self, name), least=0, integer=True)
        check_number("context_tokens", self.context_tokens, least=1, integer=True)
        if not all(isinstance(seed, str) and seed for seed in self.context_seeds):
            raise ValueError(f"context_seeds must be non-empty strings, got {self.context_seeds}")
        if not all(isinstance(text, str) and text.count("{}") == 1 for text in self.subject_templates):
            raise ValueError(f"subject_templates must be texts with one slot '{{}}' each, got {self.subject_templates}")
