"""The README.md beside an export: what it is, what it lost with the gate, how it is loaded. No fact is in it."""

from __future__ import annotations

import json
from typing import Any

_LOADING = {
    "peft": """from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), FOLDER)""",
    "merged": """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(FOLDER)""",
}
_WHAT = {
    "peft": "a LoRA adapter in PEFT's format (rank {rank}, alpha {rank})",
    "merged": "a plain transformers checkpoint, with the edits in its weights",
}
_HEADS = ("served", "facts said", "other prompts as unedited", "perplexity", "ratio")


def card(format: str, base_name: str, losses: dict[str, Any], *, rank: int = 0, forced: bool = False) -> str:
    """The page, in Markdown with the hub's head.

    Args:
        losses: `ExportLosses.to_dict()`.
        rank: of the adapter.
        forced: whether it was written beyond the limits.
    """
    head = ["tags: [coachhook-fast, model-editing]", "pipeline_tag: text-generation"]
    head += [f"library_name: {'peft' if format == 'peft' else 'transformers'}"]
    head += [f"base_model: {json.dumps(base_name)}"] if base_name else []
    rows = [_HEADS, ("---",) * len(_HEADS), *(tuple(_cells(row)) for row in losses["ways"])]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    warning = "\n**It was written although more was lost than its limits allowed.**\n" if forced else ""
    return f"""---
{chr(10).join(head)}
---

# Edits without their gate

{losses["facts"]} edited facts as {_WHAT[format].format(rank=rank)}, written by `coachhook export`.

With coachhook-fast a gate lets the edits act on the tokens that they are about. Here they act on every token. What
that costs was measured when this was written, on the edited facts, on {losses["others"]} other prompts and on held-out
text:

{table}

Lost: {losses["said_lost"]:.3f} of the facts that are said with the gate; {losses["others_changed"]:.3f} of the other
prompts are no longer answered as by the unedited model.
{warning}
```python
{_LOADING[format]}
```
"""


def _cells(row: dict[str, Any]) -> list[str]:
    numbers = (row["perplexity"], row["ratio"])
    shown = ["not finite" if value is None else f"{value:.3f}" for value in numbers]
    return [row["way"], str(row["said"]), str(row["others_as_unedited"]), *shown]
