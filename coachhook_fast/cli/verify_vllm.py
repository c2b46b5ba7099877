"""`coachhook verify-vllm`: compare vLLM with transformers on this machine."""

from __future__ import annotations

import argparse
import subprocess
from typing import TYPE_CHECKING, Any

from coachhook_fast.cli.common import Report, add_edits, add_model, load_model
from coachhook_fast.integrations.vllm_modes import MODES, certain_tokens, disagreements, run_mode

if TYPE_CHECKING:
    from rich.console import Console

NAME = "verify-vllm"
HELP = "Check that vLLM, with the plugin, gives the edited model's tokens as transformers does (fp32, greedy)."
EXAMPLES = """examples:
  coachhook verify-vllm --model ./model --edits edits/
  coachhook verify-vllm --model ./model --edits edits/ --mode eager --mode compiled

The exit code is 0 where every mode gives transformers' tokens, 1 where one differs, fails, or none could be run.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser, dtype=False)
    add_edits(parser, required=True)
    parser.add_argument(
        "--mode", action="append", choices=sorted(MODES), help="one mode; may be repeated (default: all)"
    )


def run(arguments: argparse.Namespace) -> Report:
    import importlib.util

    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:  # without origin: some folder of that name
        raise ValueError("vLLM is not installed in this environment: pip install 'coachhook-fast[vllm]'")
    from coachhook_fast.hooks.load_edits import load_edits
    from coachhook_fast.request import prompt_ids

    arguments.dtype = "float32"
    model, tokenizer = load_model(arguments)
    load_edits(model, arguments.edits)
    batches = model.coachhook.edit_set.batches
    prompts = [prompt_ids(tokenizer, request.text) for batch in batches for request in batch.requests][:64]
    if not prompts:
        raise ValueError(f"the edit set in {arguments.edits} has no edits to check")
    certain = [certain_tokens(model, ids) for ids in prompts]
    rows: list[dict[str, Any]] = []
    for mode in arguments.mode or MODES:
        row: dict[str, Any] = {"mode": mode, "prompts": len(prompts), "tokens": sum(map(len, certain))}
        rows.append(row)
        if mode == "tensor parallel" and (skipped := _unshareable(model.config)):
            row["skipped"] = skipped
            continue
        try:
            report, _ = run_mode(mode, str(model.config._name_or_path), str(arguments.edits), prompts)
            row["different"] = sorted(
                {*disagreements(report["first"], certain), *disagreements(report["again"], certain)}
            )
        except (RuntimeError, subprocess.SubprocessError) as error:  # it failed, or ran past its time
            row["error"] = str(error)
    compared = [row for row in rows if "skipped" not in row]
    agree = bool(compared) and all(row.get("different") == [] for row in compared)

    def show(console: Console) -> None:
        for row in rows:
            if "skipped" in row:
                verdict = f"skipped, {row['skipped']}"
            elif "error" in row:
                verdict = row["error"].splitlines()[0]
            else:
                verdict = f"prompts {row['different']} differ" if row["different"] else "equal"
            console.print(f"{row['mode']}: {row['tokens']} tokens of {row['prompts']} prompts: {verdict}", markup=False)

    return Report({"agree": agree, "modes": rows}, show, code=0 if agree else 1)


def _unshareable(config: Any) -> str:
    """Why two ranks cannot share the model's heads, "" where they can."""
    heads = config.num_attention_heads
    return f"{heads} attention heads cannot be shared by two ranks" if heads % 2 else ""
