"""The main job, from a bare machine: edit a real model in consecutive batches, save, and load in a new process.

make demo        (or: python examples/demo.py --help)
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
METRICS = ("accuracy", "specificity", "leak", "passing", "repeats")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="hub name, folder, GGUF file, or smollm2 (default)")
    parser.add_argument("--facts", type=Path, default=HERE / "facts.jsonl", help="records to edit")
    parser.add_argument("--batch-size", type=int, default=4, help="edits a batch (default 4)")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for the edit set")
    parser.add_argument("--answers", action="store_true", help=argparse.SUPPRESS)  # the second process
    arguments = parser.parse_args()
    if arguments.answers:
        return _answers_of_a_fresh_process(arguments)
    return _demo(arguments)


def _demo(arguments: argparse.Namespace) -> int:
    from coachhook_fast import Editor, load_model
    from coachhook_fast.evaluate import evaluate
    from coachhook_fast.evaluate.datasets import read_records

    console = Console()
    started = time.monotonic()
    console.print(f"[bold]Loading {arguments.model}[/] (the first time it is converted from GGUF)")
    model, tokenizer = load_model(arguments.model)
    records = read_records(arguments.facts)
    before = _complete_all(model, tokenizer, records)
    base_weights = {name: value.clone() for name, value in model.named_parameters()}

    console.print("[bold]Key statistics[/] of the edited layers, over text that the model writes itself (cached)")
    editor = Editor(model, tokenizer)
    editor.collect_statistics(max_tokens=4_096)  # enough for a demonstration; the default is 10 tokens a key dimension
    size = arguments.batch_size
    batches = [records[start : start + size] for start in range(0, len(records), size)]
    for number, batch in enumerate(batches, start=1):
        console.print(f"[bold]Batch {number} of {len(batches)}[/]: {len(batch)} edits")
        editor.edit([record.request for record in batch])

    after = _complete_all(model, tokenizer, records)
    _show(console, records, before, after)
    result = evaluate(model, tokenizer, records, metrics=METRICS).summary()
    names = ("reliability", "paraphrase", "same_subject", "leak", "leak_passing", "locality", "repeats", "fact_score")
    scores = {name: result[name] for name in names}
    console.print("  ".join(f"[bold]{name}[/] {value:.3f}" for name, value in scores.items()))

    weights = dict(model.named_parameters())
    untouched = all(bool((weights[name] == value).all()) for name, value in base_weights.items())
    console.print(f"base weights untouched, bit for bit: [bold]{untouched}[/]")

    editor.save_pretrained(arguments.out, overwrite=True)  # an earlier demo's
    size_kib = sum(path.stat().st_size for path in arguments.out.iterdir()) / 1024
    console.print(f"saved {editor.edit_set.num_edits} edits to {arguments.out} ({size_kib:,.0f} KiB)")
    reloaded = _in_a_new_process(arguments)
    same = reloaded == after
    console.print(f"a new process with a fresh base model gives the same answers: [bold]{same}[/]")
    console.print(f"{time.monotonic() - started:.0f} s in all")
    return 0 if same and untouched else 1


def _prompts(record) -> list[tuple[str, str]]:  # type: ignore[no-untyped-def]
    """Kind and text: the edit prompt, a paraphrase, two other facts of the subject, and a neighbour."""
    others = [("same subject", fact.prompt) for fact in record.same_subject[:2]]
    edit = (f"edit -> {record.request.target_new}", record.request.text)
    return [edit, ("paraphrase", record.paraphrases[0]), *others, ("neighbour", record.locality_prompts[0])]


def _complete_all(model, tokenizer, records) -> list[list[str]]:  # type: ignore[no-untyped-def]
    """Completions of each record's `_prompts`."""
    from coachhook_fast.evaluate import complete

    prompts = [prompt for record in records for _, prompt in _prompts(record)]
    texts = iter(complete(model, tokenizer, prompts, max_new_tokens=5))
    return [[next(texts) for _ in _prompts(record)] for record in records]


def _show(console: Console, records, before: list[list[str]], after: list[list[str]]) -> None:  # type: ignore[no-untyped-def]
    title = "what should change (green where it does), and what should not (green where it did not)"
    table = Table("prompt", "before", "after", title=title, title_justify="left")
    for record, old, new in zip(records, before, after, strict=True):
        for (kind, prompt), first, second in zip(_prompts(record), old, new, strict=True):
            changes = kind.startswith("edit") or kind == "paraphrase"
            right = record.request.target_new in second if changes else first == second
            table.add_row(
                f"[dim]{kind}:[/] {prompt}", first.strip(), f"[{'green' if right else 'yellow'}]{second.strip()}[/]"
            )
        table.add_section()
    console.print(table)


def _in_a_new_process(arguments: argparse.Namespace) -> list[list[str]]:
    command = [
        sys.executable, str(Path(__file__).resolve()), "--answers", "--model", arguments.model,
        "--facts", str(arguments.facts), "--out", str(arguments.out),
    ]  # fmt: skip
    answered = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return list(json.loads(answered.stdout.splitlines()[-1]))


def _answers_of_a_fresh_process(arguments: argparse.Namespace) -> int:
    from coachhook_fast import load_edits, load_model
    from coachhook_fast.evaluate.datasets import read_records

    model, tokenizer = load_model(arguments.model)
    load_edits(model, arguments.out)
    print(json.dumps(_complete_all(model, tokenizer, read_records(arguments.facts))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
