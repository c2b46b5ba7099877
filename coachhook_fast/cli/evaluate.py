"""`coachhook eval`: how good an edit set is."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coachhook_fast import files
from coachhook_fast.cli import common
from coachhook_fast.cli.common import Report

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from coachhook_fast.evaluate import BaseAnswers, Evaluation, HeldOut
    from coachhook_fast.evaluate.datasets import EditRecord

NAME = "eval"
HELP = "Score an edited model on facts: whether they are said, and what else of their subjects and of others moved."
EXAMPLES = """examples:
  coachhook eval --model smollm2 --edits edits/ --facts examples/facts.jsonl
  coachhook eval --model smollm2 --edits cf/ --facts counterfact-edit.json --limit 30 --csv cf.csv --markdown cf.md
  coachhook eval --model smollm2 --edits cf/ --facts counterfact-edit.json --limit 30 \\
      --metrics accuracy,generation,fluency --perplexity wikitext2-valid.raw --json
  coachhook eval --model smollm2 --edits cf/ --facts counterfact-edit.json --kinds counterfact-edit-kinds.jsonl \\
      --metrics accuracy,specificity,leak,passing,repeats,said
  coachhook eval --model smollm2 --facts examples/facts.jsonl        # the unedited model

docs/evaluation.md defines each metric. The unedited model's answers are computed once and kept in the cache.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model(parser)
    common.add_edits(parser, required=False)
    common.add_facts(parser)
    add, positive = parser.add_argument, common.positive
    help_metrics = (
        "of accuracy, probability, generation, specificity (these by default), leak, passing, repeats, said, fluency, "
        "drift, or all"
    )
    add("--metrics", type=common.names, metavar="A,B,..", help=help_metrics)
    help_kinds = "says of each fact what its rephrase prompts ask, where --facts mixes paraphrases with others"
    add("--kinds", type=Path, metavar="FILE", help=help_kinds)
    add("--passing", type=positive, metavar="N", help="passing: texts a fact (default 5 of 20)")
    add("--perplexity", type=Path, metavar="FILE", help="held-out text; measures base and edited model")
    add("--window", type=positive, default=1024, metavar="N", help="its tokens a window (default 1024)")
    add("--stride", type=positive, metavar="N", help="tokens between windows (default: the window)")
    add("--max-tokens", type=positive, default=20_000, metavar="N", help="tokens of it to use (default 20000)")
    add("--tasks", type=common.names, default=[], metavar="A,B,..", help="lm-eval tasks (extra lm-eval)")
    add("--ungated", action="store_true", help="let the edits act on every token, as if there were no gate")
    add("--base", type=Path, metavar="FILE", help="keep the base model's answers here, not in the cache")
    add("--batch-tokens", type=positive, metavar="N", help="most tokens in one forward pass")
    add("--csv", type=Path, metavar="FILE", help="write a line a fact")
    add("--markdown", type=Path, metavar="FILE", help="write the summary as a table")
    add("--details", action="store_true", help="every fact's scores, in the table or in --json")


def run(arguments: argparse.Namespace) -> Report:
    if arguments.ungated and arguments.edits is None:
        raise ValueError("--ungated needs --edits: without edits there is no gate to lift")
    from coachhook_fast.evaluate.harness import check_installed, run_tasks

    if arguments.tasks:  # what could fail after an hour's work is looked at before it
        check_installed()
    for file in (arguments.csv, arguments.markdown):
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.open("a").close()
    held_out = _held_out(arguments)
    records, skipped = common.load_records(arguments)
    model, tokenizer = common.load_model(arguments)
    from coachhook_fast.evaluate import DEFAULT_METRICS, METRICS, evaluate
    from coachhook_fast.evaluate.passing import DEFAULT_PASSING
    from coachhook_fast.evaluate.scoring import DEFAULT_BATCH_TOKENS
    from coachhook_fast.hooks.load_edits import load_edits

    if arguments.edits is not None:
        load_edits(model, arguments.edits)
    if arguments.ungated:
        model.coachhook.set_modes(["always"] * len(model.coachhook.hooks))
    batch_tokens = arguments.batch_tokens or DEFAULT_BATCH_TOKENS
    base, path = _base_answers(arguments, model, tokenizer, records, batch_tokens)
    evaluation = evaluate(
        model,
        tokenizer,
        records,
        base=base,
        metrics=METRICS if arguments.metrics == ["all"] else arguments.metrics or DEFAULT_METRICS,
        passing=arguments.passing or DEFAULT_PASSING,
        held_out=held_out,
        batch_tokens=batch_tokens,
        progress=True,
    )
    _keep(base, path, arguments)  # with the base's texts and perplexity
    if arguments.tasks:
        evaluation.tasks = run_tasks(model, tokenizer, arguments.tasks)
    if arguments.csv is not None:
        arguments.csv.write_text(evaluation.to_csv(), encoding="utf-8")
    if arguments.markdown is not None:
        arguments.markdown.write_text(evaluation.to_markdown(), encoding="utf-8")
    data = {**evaluation.to_dict(details=arguments.details), "skipped": len(skipped)}
    return Report(data, lambda console: _show(console, evaluation, arguments.details))


def _held_out(arguments: argparse.Namespace) -> HeldOut | None:
    if arguments.perplexity is None:
        return None
    from coachhook_fast.evaluate import HeldOut

    try:
        text = files.read_text(arguments.perplexity, most=files.MOST_FACTS)
    except ValueError as error:
        raise ValueError(f"--perplexity {error}") from error
    return HeldOut(text, arguments.window, arguments.stride, arguments.max_tokens)


def _base_answers(
    arguments: argparse.Namespace, model: Any, tokenizer: Any, records: Sequence[EditRecord], batch_tokens: int
) -> tuple[BaseAnswers, Path]:
    """The base model's answers, from their file or computed, and the file."""
    from coachhook_fast.evaluate import BaseAnswers
    from coachhook_fast.evaluate.base import model_key, records_hash
    from coachhook_fast.models.caches import is_there
    from coachhook_fast.models.loading import cache_dir

    name = f"{model_key(model)}-{records_hash(records)}.json"
    path = arguments.base or cache_dir() / "base-answers" / name
    if is_there(path):
        try:
            return BaseAnswers.load(path), path
        except ValueError as error:
            if arguments.base is not None:
                raise
            common.note(f"{error}: they are computed anew")
    base = BaseAnswers.collect(model, tokenizer, records, batch_tokens=batch_tokens, progress=True)
    _keep(base, path, arguments)
    return base, path


def _keep(base: BaseAnswers, path: Path, arguments: argparse.Namespace) -> None:
    """In the file that was asked for, or in the cache if that can be."""
    from coachhook_fast.models.caches import if_possible

    if arguments.base is not None:
        base.save(path)
    else:
        with if_possible():
            base.save(path)


# Narrow heads, so that all metrics stand side by side.
_HEADS = {
    "reliability": "relia-\nbility",
    "paraphrase": "para-\nphrase",
    "paraphrase_same_question": "p., same\nquestion",
    "same_subject": "same\nsubject",
    "leak": "leak",
    "leak_passing": "in pass-\ning",
    "portability": "porta-\nbility",
    "repeats": "re-\npeats",
    "said": "said",
    "said_paraphrase": "s., para-\nphrase",
    "said_question": "s., ques-\ntion",
    "said_chat": "s., chat",
    "generality": "gener-\nality",
    "locality": "local-\nity",
    "locality_unedited": "unedi-\nted",
    "generation": "gener-\nation",
    "generation_rephrase": "gen. re-\nphrase",
    "efficacy": "effi-\ncacy",
    "rome_paraphrase": "ROME's\nparaphr.",
    "neighbourhood": "neigh-\nbourh.",
    "fluency": "flu-\nency",
    "drift": "drift",
    "completion": "comple-\ntion",
}


def _show(console: Console, evaluation: Evaluation, details: bool) -> None:
    from rich.table import Table

    from coachhook_fast.cli.terminal import cell
    from coachhook_fast.evaluate.result import AVERAGED, format_number

    if details:
        columns = [*AVERAGED, "completion"]
        shown = [name for name in columns if any(getattr(one, name) is not None for one in evaluation.records)]
        table = Table()
        table.add_column("subject", overflow="fold")
        for name in shown:
            table.add_column(_HEADS[name], justify="right", overflow="fold")
        for record in evaluation.records:
            values = [getattr(record, name) for name in shown]
            cells = [value if isinstance(value, str) else format_number(value) for value in values]
            table.add_row(*map(cell, [record.subject, *cells]))
        console.print(table)
    summary = Table(title=f"{len(evaluation.records)} edits", title_justify="left")
    summary.add_column("metric")
    summary.add_column("value", justify="right")
    for name, value in evaluation.summary().items():
        if isinstance(value, (int, float)) and name != "edits":
            summary.add_row(name.replace("_", " "), format_number(value))
    for name, value in evaluation.kinds().items():
        summary.add_row(cell(name), format_number(value))
    console.print(summary)
    for task, results in evaluation.tasks.items():
        console.print(f"{task}: {results}", markup=False)
