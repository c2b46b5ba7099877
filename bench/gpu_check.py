"""What `make gpu-check` runs on a GPU machine: the GPU's tests, then the benchmarks, then the table of limits.

    python bench/gpu_check.py [tests] [gated-linear] [solve] [targets] [--seconds 380]

Every section is a process of its own with a time limit, and rows are written as they come, so a hang or a crash loses
nothing else. Rows land in $OUT, or bench/results/, as NAME-<gpu>.json, each section's output in NAME.log beside them.
Exit code 1: a test failed, an answer was wrong, or a section did not finish.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(os.environ.get("OUT") or ROOT / "bench" / "results")
# Longest seconds of each section; all of them together have --seconds.
SECTIONS = {"tests": 150, "gated-linear": 200, "solve": 100, "targets": 100}
ALWAYS = ("kernels", "gated_linear", "layer", "cholesky", "key_memory", "gpu")  # these look for a GPU themselves
WORKERS = 8
# Child processes: modules of the checkout's root must not shadow packages, kernels are compiled, output comes at once.
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
    "PYTHONSAFEPATH": "1",
    "PYTHONUNBUFFERED": "1",
    "HF_HUB_OFFLINE": "1",
}

# (shape, rank, tokens, ours over the plain projection at most), in graphs
COSTS = (
    ("gpt-j", 100, 1, 1.08),
    ("gpt-j", 1000, 1, 1.35),
    ("gpt2-xl", 100, 1, 1.30),
    ("gpt-j", 100, 2048, 1.10),
    ("gpt-j", "full", 2048, 1.25),
)
# ratio to the published hook at least, plain calls: name, tokens, limit
PUBLISHED = (("decode", range(1, 65), 3.0), ("prefill", range(65, 1 << 20), 1.6))
STEP = 1.10  # an edited model's decode step over the unedited one's at most

Row = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}; none: all")
    parser.add_argument("--seconds", type=float, default=380.0, help="for all sections together")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)  # this process is the one section
    arguments = parser.parse_args()
    unknown = [name for name in arguments.sections if name not in SECTIONS]
    if unknown:
        parser.error(f"unknown section {', '.join(unknown)}")
    if not 0 < arguments.seconds < float("inf"):
        parser.error(f"--seconds must be a positive number, got {arguments.seconds}")
    import torch

    if not torch.cuda.is_available():
        print("no CUDA device: nothing to check here", file=sys.stderr)
        return 2
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    if arguments.worker:
        return measure(arguments.sections[0], RESULTS / f"{arguments.sections[0]}-{name}.json")
    return check(arguments.sections or list(SECTIONS), arguments.seconds, name)


def check(sections: list[str], seconds: float, gpu: str) -> int:
    """All sections one after the other, each with its table, then the table of limits."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    deadline, failed = time.monotonic() + seconds, False
    summary = [f"{'limits':58} {'asked':>7} {'floor':>7} {'found':>7}"]
    for section in sections:
        limit, path = min(SECTIONS[section], deadline - time.monotonic()), RESULTS / f"{section}-{gpu}.json"
        for earlier in (path, RESULTS / f"{section}.log"):
            earlier.unlink(missing_ok=True)
        begin = time.monotonic()
        ended = run_tests(limit) if section == "tests" else run_worker(section, limit)
        rows = json.loads(path.read_text()) if path.exists() else []
        wrong = [f"{row['work']} ({row['shape']})" for row in rows if not row["checked"]]
        failed |= ended != "done" or bool(wrong)
        print(f"{section}: {ended} after {time.monotonic() - begin:.0f} s; {len(rows)} rows, {len(wrong)} wrong")
        for work in wrong[:10]:
            print(f"  WRONG {work}"[:150])
        if section == "gated-linear":
            print_costs(rows)
        summary += limits(section, rows)
        sys.stdout.flush()
    print("\n".join(["", *summary]))
    return int(failed)


# ---------------------------------------------------------------- processes


def run(command: list[str], log: Path, limit: float, **environment: str) -> str:
    """Runs to the end, or `limit` seconds, with all output in `log`: "done", or what happened."""
    process = start(command, log, **environment)
    try:
        code = process.wait(max(1.0, limit))
    except subprocess.TimeoutExpired:
        stop(process)
        return "stopped at its limit"
    return "done" if code == 0 else f"exit code {code}"


def start(command: list[str], log: Path, **environment: str) -> subprocess.Popen[bytes]:
    with log.open("a") as output:
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env={**ENVIRONMENT, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def stop(process: subprocess.Popen[bytes]) -> None:
    """With the workers it has started."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_tests(limit: float) -> str:
    """The GPU's tests; beside them, on the other cores, the benchmark's kernels are compiled."""
    found = sorted((ROOT / "tests").rglob("test_*.py"))
    always = {f"test_{name}.py" for name in ALWAYS}
    files = [str(path) for path in found if path.name in always or "mark.gpu" in path.read_text()]
    log, begin = RESULTS / "tests.log", time.monotonic()
    ahead = "from coachhook_fast.bench.gated_linear_gpu import compile_ahead; compile_ahead()"
    compiling = start(["-c", ahead], log, OMP_NUM_THREADS="1")
    command = ["-m", "pytest", "--import-mode=importlib", "-q", "-n", str(WORKERS), "--tb=short", "--timeout=120"]
    command += ["--durations=5", "-rfE", *files]
    ended = run(command, log, limit, OMP_NUM_THREADS="1")
    lines = log.read_text(errors="replace").splitlines()
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    print("\n".join(line[:180] for line in failures[:25] or ([] if ended == "done" else lines[-15:])))
    print(
        "\n".join(line[:110] for line in lines if re.search(r"\d+ (passed|failed|error)|s (call|setup) +tests", line))
    )
    try:
        if compiling.wait(max(1.0, limit - (time.monotonic() - begin))):
            print(f"kernels were not all compiled ahead: {log}")
    except subprocess.TimeoutExpired:
        stop(compiling)
        print("kernels were not all compiled ahead: no time left")
    return ended


def run_worker(section: str, limit: float) -> str:
    log = RESULTS / f"{section}.log"
    ended = run([str(Path(__file__).resolve()), section, "--worker"], log, limit)
    if ended != "done":
        print("\n".join(line[:180] for line in log.read_text(errors="replace").splitlines()[-12:]))
    return ended


def measure(section: str, path: Path) -> int:
    """In the section's own process: all its rows to `path`; 1 if a part of it broke."""
    from coachhook_fast.bench import BENCHMARKS
    from coachhook_fast.bench.gated_linear_gpu import parts
    from coachhook_fast.bench.rows import complete, machine

    machine()  # before the run: the load of then
    makers: dict[str, Any] = parts() if section == "gated-linear" else {section: BENCHMARKS[section]}
    found: list[Row] = []
    broken, written = 0, time.monotonic()
    for name, make in makers.items():
        begin = time.monotonic()
        try:
            for row in make():
                found += complete([row])
                if time.monotonic() > written + 3:
                    path.write_text(json.dumps(found, indent=1) + "\n")
                    written = time.monotonic()
        except Exception:  # one part's trouble is not the others'
            broken = 1
            traceback.print_exc(limit=-8)
        path.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{name}: {time.monotonic() - begin:.1f} s, {len(found)} rows", flush=True)
    return broken


# ---------------------------------------------------------------- tables


def projections(rows: Iterable[Row], baseline: str) -> dict[tuple[Any, ...], Row]:
    """(shape, rank, tokens) -> row, of bf16 and 2 % gated."""
    return {
        (row["shape"].split()[0], row["rank"], row["tokens"]): row
        for row in rows
        if row["work"].startswith("gated projection, rank")
        and row["baseline"] == baseline
        and row["dtype"] == "bfloat16"
        and row["gated_share"] == round(0.02 * row["tokens"]) / row["tokens"]
    }


def print_costs(rows: list[Row]) -> None:
    for title, baseline, column in (
        ("ours / plain, graphs", "plain projection", "cost"),
        ("published / ours, plain calls", "published hook", "ratio"),
    ):
        found = projections(rows, baseline)
        lengths = sorted({key[2] for key in found})
        print(f"{title:32}" + "".join(f"{length:>7}" for length in lengths))
        for shape, rank in dict.fromkeys(key[:2] for key in found):
            cells = [found.get((shape, rank, length)) for length in lengths]
            values = "".join("      -" if row is None else f"{row[column]:7.3f}" for row in cells)
            print(f"  {shape:12} rank {rank!s:12}" + values)
    for row in rows:
        if "cost" in row and not row["work"].startswith("gated projection, rank"):
            print(f"  {row['work'][:62]:62} {row['dtype']:9} {row['timing']:6} {row.get('cost', row['ratio']):7.3f}")


def limits(section: str, rows: list[Row]) -> Iterator[str]:
    """Lines of the table of what is asked."""
    if section == "gated-linear":
        plain, published = (
            projections(rows, "plain projection"),
            [row for row in rows if row["baseline"] == "published hook"],
        )
        for shape, rank, tokens, limit in COSTS:
            row = plain.get((shape, rank, tokens), {})
            yield line(f"{shape}, rank {rank}, {tokens} tokens, over plain", limit, row, "floor_cost", "cost")
        for name, lengths, limit in PUBLISHED:
            found = sorted((row for row in published if row.get("tokens") in lengths), key=lambda row: row["ratio"])
            missed = sum(row["ratio"] < limit for row in found)
            yield line(f"{name}, published over ours, worst of {len(found)}, {missed} miss", limit, (found or [{}])[0])
            for row in found[: min(missed, 12)]:
                yield f"    {row['ratio']:.2f} {row['shape']} {row['dtype']} {row['work']}"
        for batch in (1, 8):
            work = f"decode step, batch {batch}"
            row = pick(rows, work=work, timing="eager")
            yield line(f"{work}, over unedited", STEP, row, "floor_cost", "cost")
    elif section == "solve":
        row = pick(rows, work="solve and update", d=16384, n=100)
        yield line("solve and update, d 16384, n 100, dense over ours", 5.0, row)
    elif section == "targets":
        for row in rows:
            if row["work"] == "target values, an edit":
                yield line(f"target values, {row['shape'].split(',')[0]}"[:58], 20.0, row)


def pick(rows: Iterable[Row], **wanted: Any) -> Row:
    """The first row that says all this; empty where none does."""
    return next((row for row in rows if wanted.items() <= row.items()), {})


def line(label: str, limit: float, row: Row, floor: str = "floor_ratio", column: str = "ratio") -> str:
    """A cost is asked to be at most `limit`, a ratio at least."""
    if not row:
        return f"{label:58} {limit:7.2f} {'':>7} {'-':>7}  NOT MEASURED"
    met = row[column] <= limit if column == "cost" else row[column] >= limit
    return f"{label:58} {limit:7.2f} {row[floor]:7.3f} {row[column]:7.3f}{'' if met else '  MISSES'}"


if __name__ == "__main__":
    sys.exit(main())
