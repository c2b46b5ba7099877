"""A question as a tokenizer's chat template writes it, and where an answer to it ends. Imports nothing of ours."""

from __future__ import annotations

from typing import Any


def chat_text(tokenizer: Any, question: str) -> str | None:
    """The text of a user who asks `question`, up to where the assistant begins; None without a chat template."""
    if getattr(tokenizer, "chat_template", None) is None:
        return None
    turns = [{"role": "user", "content": question}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def answer_bounds(tokenizer: Any) -> tuple[str, str] | None:
    """What a chat template writes right before an answer and right behind it ("<|im_start|>assistant\\n" and
    "<|im_end|>"); None without a template, or where the two cannot be told from the question and the answer."""
    begun = chat_text(tokenizer, "Q")
    if begun is None:
        return None
    turns = [{"role": "user", "content": "Q"}]
    asked = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=False))
    turns.append({"role": "assistant", "content": "A"})
    answered = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=False))
    before, behind = begun.removeprefix(asked), answered.removeprefix(f"{begun}A").strip()
    if before in ("", begun) or not answered.startswith(f"{begun}A") or not behind:
        return None
    return before, behind
