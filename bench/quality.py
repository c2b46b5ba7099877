"""What methods do to a model over many consecutive edits: one command makes the whole table.

    python bench/quality.py --facts counterfact-edit.json --corpus wikitext2-test.raw --held-out wikitext2-valid.raw \\
        --at 10,30,100 --out bench/results/quality-smollm2

For every method the facts are edited in consecutive batches; at the chosen counts all edits so far are evaluated with
the weights of that moment. State is saved after every batch and the table after every evaluation: a run that was
stopped goes on where it was, and ends with the same numbers. `docs/quality.md` reads the table.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from quality_methods import METHODS, Method, Ours, Runner
from quality_records import HALVES, choose, facts_key, give
from quality_table import COLUMNS, SCORES, cell, write, write_table

from coachhook_fast import EditConfig, load_model
from coachhook_fast.config import number_in
from coachhook_fast.evaluate import METRICS, BaseAnswers, HeldOut, evaluate
from coachhook_fast.evaluate.base import records_hash
from coachhook_fast.evaluate.datasets import EditRecord, read_records
from coachhook_fast.evaluate.passing import DEFAULT_PASSING
from coachhook_fast.models.loading import cache_dir
from coachhook_fast.progress import track


@dataclass(frozen=True)
class Plan:
    """What every method of a table shares.

    Attributes:
        model: name for `load_model`; config: settings of all methods; records: facts in the order of editing.
        at: edit counts at which all edits so far are evaluated, ascending; work: folder of saved states.
        metrics, passing: as for `evaluate`.
    """

    model: str
    config: EditConfig
    records: Sequence[EditRecord]
    batch_size: int
    at: tuple[int, ...]
    corpus: Path | None
    held_out: HeldOut | None
    work: Path
    metrics: tuple[str, ...] = tuple(name for name in METRICS if name != "fluency")
    passing: int = DEFAULT_PASSING

    @property
    def held_out_key(self) -> str | None:
        return None if self.held_out is None else self.held_out.key

    def run_key(self, method: Method) -> str:
        """Name of the method's saved state: equal settings and facts, equal state."""
        settings = self.config.replace(**dict(method.settings)).to_dict()
        corpus = None if self.corpus is None else hashlib.sha256(self.corpus.read_bytes()).hexdigest()
        facts = facts_key(self.records)
        text = json.dumps([self.model, settings, self.batch_size, corpus, facts], sort_keys=True, default=str)
        return f"{method.name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def run(method: Method, plan: Plan, on_row: Callable[[dict[str, Any]], None]) -> None:
    """Edits and evaluates one method, and calls `on_row` with every evaluation, stored or new.

    Where only the text for perplexity is another than a stored row's, only perplexity is measured again; where a
    stored row lacks a metric, all are.
    """
    rows = _Rows(plan.work / "rows" / f"{plan.run_key(method)}-{method.gate}.json")
    missing = [count for count in plan.at if not rows.has_scores(count, plan) or not rows.has_text(count, plan)]
    for count in plan.at:
        if count not in missing:
            row = rows.by_count[count]
            if row["commit"] != _commit():
                note = f"{method.title} at {count}: measured at commit {row['commit']}; another --work measures anew"
                print(note, file=sys.stderr)
            on_row(row)
    if not missing:
        return
    model, tokenizer = load_model(plan.model)
    bases = {count: _base(model, tokenizer, plan, count) for count in missing}
    runner = method.make(model, tokenizer, plan.config.replace(**dict(method.settings)), plan.corpus)
    try:
        states = plan.work / plan.run_key(method)
        for count in missing:
            seconds = _edit_up_to(count, runner, plan, states, method.title)
            scored = rows.has_scores(count, plan)
            found = _evaluate(method, model, tokenizer, plan, count, bases[count], () if scored else plan.metrics)
            bases[count].save(_base_path(plan, count))  # with what the unedited model wrote
            for base in bases.values():
                base.written |= bases[count].written
            if scored:
                row = rows.by_count[count]
            else:
                row = _row(method, model, plan, count, found)
                if isinstance(runner, Ours):
                    row["layers"] = [a | b for a, b in zip(row["layers"], runner.separation(), strict=True)]
                row["seconds_per_edit"] = round(seconds / count, 3)
            tokens = None if plan.held_out is None else plan.held_out.max_tokens
            row |= {"perplexity_ratio": found["perplexity_ratio"], "held_out_tokens": tokens}
            on_row(rows.add(count, row | {"held_out": plan.held_out_key, "command": _command()}))
    finally:
        runner.unload()


def _edit_up_to(count: int, runner: Runner, plan: Plan, states: Path, title: str) -> float:
    """Brings the model to `count` edits from the nearest saved state; seconds of editing behind it."""
    done, seconds = 0, 0.0
    for state in sorted(states.glob("*/done.json")):
        edits = int(state.parent.name)
        if done < edits <= count:
            done, seconds = edits, json.loads(state.read_text())["seconds"]
    if done:
        runner.restore(states / f"{done:06d}")
    kept = set(plan.at)
    with track(title, count, "edit", True) as bar:
        bar.advance(done)
        while done < count:
            batch = plan.records[done : min(done + plan.batch_size, count)]
            started = time.perf_counter()
            runner.edit([record.request for record in batch])
            seconds += time.perf_counter() - started
            before, done = done, done + len(batch)
            folder = states / f"{done:06d}"
            runner.save(folder)
            # Last, so that a folder without it is known to be half written.
            (folder / "done.json").write_text(json.dumps({"seconds": seconds}))
            if before and before not in kept:
                _remove(states / f"{before:06d}")
            bar.advance(len(batch))
    return seconds


def _evaluate(
    method: Method, model: Any, tokenizer: Any, plan: Plan, count: int, base: BaseAnswers, metrics: Sequence[str]
) -> dict[str, Any]:
    if method.ungated:
        model.coachhook.set_modes(["always"] * len(model.coachhook.hooks))
    found = evaluate(
        model, tokenizer, plan.records[:count],
        base=base, metrics=metrics, passing=plan.passing, held_out=plan.held_out, batch_tokens=2048,
    ).summary()  # fmt: skip
    if method.ungated:
        model.coachhook.enable()
    return found


def _row(method: Method, model: Any, plan: Plan, count: int, found: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"method": method.name, "gate": method.gate, "edits": count, "batch_size": plan.batch_size}
    row |= {name: found[name] for name in SCORES}
    row |= {"kinds": found.get("kinds", {}), "metrics": list(plan.metrics), "passing": plan.passing}
    row["evaluation_seconds"] = found["seconds"]
    row["layers"] = _layer_figures(model)
    row["settings"] = plan.config.replace(**dict(method.settings)).to_dict()
    return row | _provenance()


def _layer_figures(model: Any) -> list[dict[str, float]]:
    """||Δ|| / ||W0|| (Frobenius) and threshold of every hook."""
    figures: list[dict[str, float]] = []
    handle = getattr(model, "coachhook", None)
    if handle is None:
        return figures
    for hook in getattr(handle, "hooks", None) or handle.added:
        delta = hook.get_delta_weight() if hasattr(hook, "get_delta_weight") else hook.delta
        weight = hook.base.weight.detach()
        threshold = getattr(hook, "threshold", getattr(hook, "alpha", None))
        figures.append(
            {
                "delta_ratio": float(delta.float().norm() / weight.float().norm()),
                **({} if threshold is None else {"threshold": float(threshold)}),
            }
        )
    return figures


def _base(model: Any, tokenizer: Any, plan: Plan, count: int) -> BaseAnswers:
    """The unedited model's answers to the first `count` records, with its perplexity; kept in the work folder."""
    path = _base_path(plan, count)
    base = _load_base(path) or BaseAnswers.collect(model, tokenizer, plan.records[:count], batch_tokens=2048)
    for other in map(_load_base, sorted(path.parent.glob("*.json"))):
        if other is not None and other.model == base.model:  # what it says does not depend on the other records
            base.perplexity = other.perplexity | base.perplexity
            base.written = other.written | base.written
    if plan.held_out is not None and plan.held_out_key not in base.perplexity:
        base.perplexity[plan.held_out_key] = plan.held_out.perplexity(model, tokenizer, batch_tokens=2048)
    base.save(path)
    return base


def _base_path(plan: Plan, count: int) -> Path:
    return plan.work / "base" / f"{plan.model.replace('/', '_')}-{records_hash(plan.records[:count])}.json"


def _load_base(path: Path) -> BaseAnswers | None:
    """None where there is none that this version reads."""
    try:
        return BaseAnswers.load(path)
    except (FileNotFoundError, ValueError):
        return None


class _Rows:
    """The evaluations of one run on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        stored = json.loads(path.read_text()) if path.is_file() else {}
        self.by_count: dict[int, dict[str, Any]] = {int(count): row for count, row in stored.items()}

    def has_scores(self, count: int, plan: Plan) -> bool:
        """Whether `count` was evaluated by all of the plan's metrics."""
        row = self.by_count.get(count, {})
        return set(plan.metrics) <= set(row.get("metrics", ())) and row.get("passing") == plan.passing

    def has_text(self, count: int, plan: Plan) -> bool:
        """Whether its perplexity was measured on the plan's text."""
        return self.by_count.get(count, {}).get("held_out") == plan.held_out_key

    def add(self, count: int, row: dict[str, Any]) -> dict[str, Any]:
        """Keeps the row and answers it as it will be read again."""
        self.by_count[count] = json.loads(json.dumps(row))
        write(self.path, json.dumps(self.by_count))
        return self.by_count[count]


def _command() -> str:
    return shlex.join(["python", *sys.argv])


def _provenance() -> dict[str, Any]:
    return {
        "machine": f"{platform.machine()} {_cpu()}, {torch.get_num_threads()} threads",
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
        },
        "commit": _commit(),
    }  # fmt: skip


@functools.cache
def _commit() -> str | None:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def _cpu() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def _remove(folder: Path) -> None:
    (folder / "done.json").unlink(missing_ok=True)
    for file in folder.glob("*"):
        file.unlink()
    folder.rmdir()


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="smollm2", help="as for `coachhook` (default smollm2)")
    add("--facts", type=Path, required=True, metavar="FILE")
    add("--kinds", type=Path, metavar="FILE", help="says what the facts' rephrase prompts ask, as for `coachhook eval`")
    halves = ("all", *HALVES)
    add("--half", default="all", choices=halves, help="facts whose subject's sha256 is 1 (A) or 2 (B) mod 3")
    add("--form", default="all", choices=("all", "cloze", "question"), help="facts whose prompt is of this form")
    add("--strict", action="store_true", help="facts with two or more paraphrases and facts of the same subject")
    add("--seed", type=int, metavar="N", help="random order of the facts (default: the file's)")
    add("--skip", type=int, default=0, metavar="N", help="leave out the first N of these")
    add("--given", type=int, default=0, metavar="N", help="pass N paraphrases with each request; they are not scored")
    add("--corpus", type=Path, metavar="FILE", help="text for key statistics (default: the model's own)")
    add("--held-out", type=Path, metavar="FILE", help="text for perplexity")
    add("--held-out-tokens", type=int, default=120_000, metavar="N", help="of that text (default 120000)")
    add("--at", default="10,30,100", metavar="N,N,..", help="edit counts at which to evaluate")
    add("--batch-size", type=int, default=10, metavar="N")
    add("--metrics", default=",".join(Plan.metrics), metavar="A,B,..", help="as for `coachhook eval`")
    add("--passing", type=int, default=DEFAULT_PASSING, metavar="N", help="texts in passing, a fact")
    titles = [method.title for method in METHODS]
    add("--methods", default=",".join(titles), metavar="A,B,..", help=f"of {', '.join(titles)} (default: all)")
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="an EditConfig setting, for all methods")
    add("--work", type=Path, default=cache_dir() / "quality", metavar="DIR", help="saved states")
    add("--out", type=Path, required=True, metavar="STEM", help="writes STEM.json, STEM.csv, STEM.md, STEM.png")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = build_parser().parse_args(arguments)
    at = tuple(sorted({int(count) for count in options.at.split(",")}))
    wanted = options.methods.split(",")
    unknown = sorted(set(wanted) - {method.title for method in METHODS})
    if unknown or not at or at[0] < 1:
        raise SystemExit(f"--methods has unknown {unknown}" if unknown else f"--at must name counts >= 1, got {at}")
    for name in ("skip", "given"):
        if getattr(options, name) < 0:
            raise SystemExit(f"--{name} must be 0 or more, got {getattr(options, name)}")
    pairs = (one.partition("=") for one in options.set)
    settings = {name: number_in(yaml.safe_load(value)) for name, _, value in pairs}
    text = None if options.held_out is None else options.held_out.read_text(encoding="utf-8")
    chosen = choose(
        read_records(options.facts, kinds=options.kinds),
        half=options.half, form=options.form, strict=options.strict, seed=options.seed,
    )  # fmt: skip
    records = [give(record, options.given) for record in chosen[options.skip : options.skip + at[-1]]]
    if len(records) < at[-1]:
        raise SystemExit(f"--at asks for {at[-1]} edits, {options.facts} holds {len(records)} such facts behind --skip")
    plan = Plan(
        model=options.model,
        config=EditConfig.from_dict(settings),
        records=records,
        batch_size=options.batch_size,
        at=at,
        corpus=options.corpus,
        held_out=None if text is None else HeldOut(text, max_tokens=options.held_out_tokens),
        work=options.work,
        metrics=tuple(options.metrics.split(",")),
        passing=options.passing,
    )
    rows: list[dict[str, Any]] = []

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        write_table(rows, options.out)
        print("  ".join(f"{name} {cell(row.get(name))}" for name in COLUMNS), flush=True)

    for method in METHODS:
        if method.title in wanted:
            run(method, plan, keep)
    try:
        from quality_figures import draw
    except ImportError:
        print("no figures: pip install matplotlib", file=sys.stderr)
    else:
        draw(rows, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
