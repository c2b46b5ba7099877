"""What methods do to a model over many consecutive edits: one command makes the whole table.

    python bench/quality.py --facts counterfact-edit.json --corpus wikitext2-test.raw --held-out wikitext2-valid.raw \\
        --at 10,30,100 --out bench/results/quality-smollm2

For every method the facts are edited in consecutive batches; at the chosen counts all edits so far are evaluated with
the weights of that moment. State is saved after every batch and the table after every evaluation: a run that was
stopped goes on where it was, and ends with the same numbers. `docs/quality.md` reads the table.
"""

from __future__ import annotations

import argparse
import csv
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

from coachhook_fast import EditConfig, load_model
from coachhook_fast.config import number_in
from coachhook_fast.evaluate import BaseAnswers, HeldOut, evaluate
from coachhook_fast.evaluate.base import records_hash
from coachhook_fast.evaluate.datasets import EditRecord, read_records
from coachhook_fast.models.loading import cache_dir
from coachhook_fast.progress import track

COLUMNS = (
    "method", "gate", "edits", "batch_size", "reliability", "generality", "locality", "generation",
    "perplexity_ratio", "seconds_per_edit", "harmonic_mean", "drift", "locality_unedited",
    "held_out_tokens",
)  # fmt: skip
ROME = ("generation_rephrase", "efficacy", "paraphrase", "neighbourhood", "rome_score")


@dataclass(frozen=True)
class Plan:
    """What every method of a table shares.

    Attributes:
        model: name for `load_model`; config: settings of all methods; records: facts in the order of editing.
        at: edit counts at which all edits so far are evaluated, ascending; work: folder of saved states.
    """

    model: str
    config: EditConfig
    records: Sequence[EditRecord]
    batch_size: int
    at: tuple[int, ...]
    corpus: Path | None
    held_out: HeldOut | None
    work: Path
    metrics: tuple[str, ...] = ("accuracy", "probability", "generation", "drift")

    @property
    def held_out_key(self) -> str | None:
        return None if self.held_out is None else self.held_out.key

    def run_key(self, method: Method) -> str:
        """Name of the method's saved state: equal settings and facts, equal state."""
        settings = self.config.replace(**dict(method.settings)).to_dict()
        corpus = None if self.corpus is None else hashlib.sha256(self.corpus.read_bytes()).hexdigest()
        facts = [(r.request.text, r.request.subject, r.request.target_new) for r in self.records]
        text = json.dumps([self.model, settings, self.batch_size, corpus, facts], sort_keys=True, default=str)
        return f"{method.name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def run(method: Method, plan: Plan, on_row: Callable[[dict[str, Any]], None]) -> None:
    """Edits and evaluates one method, and calls `on_row` with every evaluation, stored or new.

    Where only the text for perplexity is another than a stored row's, only perplexity is measured again.
    """
    rows = _Rows(plan.work / "rows" / f"{plan.run_key(method)}-{method.gate}.json")
    missing = [count for count in plan.at if not rows.has(count, plan.held_out_key)]
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
            row = rows.by_count.get(count)
            found = _evaluate(method, model, tokenizer, plan, count, bases[count], () if row else plan.metrics)
            if row is None:
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
        base=base, metrics=metrics, held_out=plan.held_out, batch_tokens=2048,
    ).summary()  # fmt: skip
    if method.ungated:
        model.coachhook.enable()
    return found


def _row(method: Method, model: Any, plan: Plan, count: int, found: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"method": method.name, "gate": method.gate, "edits": count, "batch_size": plan.batch_size}
    names = ("reliability", "generality", "locality", "locality_unedited", "generation", "harmonic_mean", "drift")
    row |= {name: found[name] for name in (*names, *ROME)}
    row["layers"] = _layer_figures(model)
    row["settings"] = plan.config.replace(**dict(method.settings)).to_dict()
    return row | _provenance()


def _layer_figures(model: Any) -> list[dict[str, float]]:
    """||Δ|| / ||W0|| (Frobenius) and threshold of every hook."""
    figures = []
    for hook in getattr(model.coachhook, "hooks", None) or model.coachhook.added:
        delta = hook.get_delta_weight() if hasattr(hook, "get_delta_weight") else hook.delta
        weight = hook.base_layer.weight.detach()
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
    records = plan.records[:count]
    folder, name = plan.work / "base", plan.model.replace("/", "_")
    path = folder / f"{name}-{records_hash(records)}.json"
    stored = BaseAnswers.load(path) if path.is_file() else None
    base = stored or BaseAnswers.collect(model, tokenizer, records, batch_tokens=2048)
    if plan.held_out is not None and plan.held_out_key not in base.perplexity:
        for other in map(BaseAnswers.load, sorted(folder.glob("*.json"))):
            if other.model == base.model:
                base.perplexity = other.perplexity | base.perplexity
        if plan.held_out_key not in base.perplexity:
            base.perplexity[plan.held_out_key] = plan.held_out.perplexity(model, tokenizer, batch_tokens=2048)
        stored = None
    if stored is None:
        base.save(path)
    return base


class _Rows:
    """The evaluations of one run on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        stored = json.loads(path.read_text()) if path.is_file() else {}
        self.by_count: dict[int, dict[str, Any]] = {int(count): row for count, row in stored.items()}

    def has(self, count: int, held_out: str | None) -> bool:
        """Whether `count` was evaluated, and its perplexity on this text."""
        return count in self.by_count and self.by_count[count].get("held_out") == held_out

    def add(self, count: int, row: dict[str, Any]) -> dict[str, Any]:
        """Keeps the row and answers it as it will be read again."""
        self.by_count[count] = json.loads(json.dumps(row))
        _write(self.path, json.dumps(self.by_count))
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


def write_table(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """JSON, CSV and Markdown beside each other."""
    _write(out.with_suffix(".json"), json.dumps(list(rows), indent=1) + "\n")
    part = out.with_suffix(".csv.part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *ROME], extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    part.replace(out.with_suffix(".csv"))
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(_cell(row.get(name)) for name in COLUMNS) + " |" for row in rows]
    _write(out.with_suffix(".md"), "\n".join(lines) + "\n")


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


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
    add("--skip", type=int, default=0, metavar="N", help="leave out the first N facts")
    add("--corpus", type=Path, metavar="FILE", help="text for key statistics (default: the model's own)")
    add("--held-out", type=Path, metavar="FILE", help="text for perplexity")
    add("--held-out-tokens", type=int, default=120_000, metavar="N", help="of that text (default 120000)")
    add("--at", default="10,30,100", metavar="N,N,..", help="edit counts at which to evaluate")
    add("--batch-size", type=int, default=10, metavar="N")
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
    if options.skip < 0:
        raise SystemExit(f"--skip must be 0 or more, got {options.skip}")
    pairs = (one.partition("=") for one in options.set)
    settings = {name: number_in(yaml.safe_load(value)) for name, _, value in pairs}
    text = None if options.held_out is None else options.held_out.read_text(encoding="utf-8")
    plan = Plan(
        model=options.model,
        config=EditConfig.from_dict(settings),
        records=read_records(options.facts, limit=options.skip + at[-1])[options.skip :],
        batch_size=options.batch_size,
        at=at,
        corpus=options.corpus,
        held_out=None if text is None else HeldOut(text, max_tokens=options.held_out_tokens),
        work=options.work,
    )
    if len(plan.records) < at[-1]:
        raise SystemExit(f"--at asks for {at[-1]} edits, {options.facts} holds {len(plan.records)} behind --skip")
    rows: list[dict[str, Any]] = []

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        write_table(rows, options.out)
        print("  ".join(f"{name} {_cell(row.get(name))}" for name in COLUMNS), flush=True)

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
