"""What the tests of single facts share: settings, facts that are edited again, and how near states must be."""

from __future__ import annotations

from typing import Any

import torch
from editor_cases import CONFIG, facts

from coachhook_fast import EditRequest

ROUND_ROBIN = CONFIG.replace(layers=(0, 1, 2), round_robin=3)
CONFIGS = {
    "calibrated": CONFIG.replace(v_num_grad_steps=3),
    "sequence": CONFIG.replace(v_num_grad_steps=3, gate="sequence"),
    "round_robin": ROUND_ROBIN.replace(v_num_grad_steps=3),
    "round_robin 2": CONFIG.replace(layers=(0, 1, 2), round_robin=2, v_num_grad_steps=3, threshold_rule="edit_keys"),
}
# Edits that go in whole: then a random model says those of `home`, one token behind the subject's last.
STRONG = CONFIG.replace(
    mom2_update_weight=0.01, threshold_rule="fpr", threshold_fpr=0.99, context_seeds=(), subject_templates=(),
    v_num_grad_steps=60,
)  # fmt: skip


def born(city: str, *, prompt: str = "{} was born in", subject: str = "Ada Vale", **more: Any) -> EditRequest:
    return EditRequest(prompt, subject, city, **more)


def home(letter: str, **more: Any) -> EditRequest:
    return EditRequest("The home of {}", "Ada Vale", letter, **more)


def others(n: int) -> list[EditRequest]:
    found = facts(n + 4)
    return [request for request in found if request.subject != "Ada Vale"][:n]


def assert_close(first: list[torch.Tensor], second: list[torch.Tensor], tolerance: float = 1e-6) -> None:
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
