"""lm-eval tasks on the model as it stands, edits included; needs the extra `coachhook-fast[lm-eval]`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def check_installed() -> None:
    """ValueError where lm-eval is not there."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ValueError("lm-eval tasks need lm-eval: pip install 'coachhook-fast[lm-eval]'") from error


def run_tasks(
    model: Any, tokenizer: Any, tasks: Sequence[str], *, limit: int | None = None, batch_size: int = 8
) -> dict[str, Any]:
    """Results of lm-eval `tasks` by name.

    Args:
        model: a causal LM with its hooks as they are set; it is passed on as an object, so nothing is loaded
            again.
        tasks: names that lm-eval knows, such as "lambada_openai"; their data are downloaded by lm-eval.
        limit: use only the first examples of each task.

    Raises:
        ValueError: tasks is empty, or lm-eval is not installed.
    """
    if not tasks:
        raise ValueError("tasks is empty: name one lm-eval task or more")
    check_installed()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    return simple_evaluate(model=wrapped, tasks=list(tasks), limit=limit)["results"]
