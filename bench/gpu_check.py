"""What `make gpu-check` runs on a GPU machine: GPU tests, then the gated projection's rows, then the table of limits.

The rows land in bench/results/gated-linear-<gpu>.json; the script fails if a test fails or an answer is wrong.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
TESTS = [
    f"tests/test_{name}.py"
    for name in ("kernels", "gated_linear", "layer", "aot", "cholesky", "memory", "gpu", "gpu_editing")
]
# (shape, rank, tokens, ours over the plain projection at most)
LIMITS = (
    ("gpt-j", 100, 1, 1.08),
    ("gpt-j", 1000, 1, 1.35),
    ("gpt2-xl", 100, 1, 1.30),
    ("gpt-j", 100, 2048, 1.10),
    ("gpt-j", "full", 2048, 1.25),
)


def main() -> int:
    if not torch.cuda.is_available():
        print("no CUDA device: nothing to check here", file=sys.stderr)
        return 2
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    tests = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "--import-mode=importlib", "-q", *TESTS],
        cwd=ROOT,
        env=environment,
        check=False,
    )
    from coachhook_fast.bench import BENCHMARKS
    from coachhook_fast.bench.gated_linear import SHARE

    rows = BENCHMARKS["gated-linear"]()
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    target = ROOT / "bench" / "results" / f"gated-linear-{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"{len(rows)} rows in {target}")
    print(f"{'shape':12} {'rank':>5} {'tokens':>6} {'limit':>6} {'floor':>6} {'cost':>6}")
    for shape, rank, tokens, limit in LIMITS:
        for row in rows:
            key = (str(row["shape"]).split()[0], row.get("rank"), row.get("tokens"), row.get("gated_share"))
            plain = row["baseline"] == "plain projection" and "relative" not in row["work"]
            if plain and key == (shape, rank, tokens, round(SHARE * tokens) / tokens):
                mark = "" if row["cost"] <= limit else "  MISSES"
                print(
                    f"{shape:12} {rank!s:>5} {tokens:>6} {limit:>6.2f} {row['floor_cost']:>6.3f} "
                    f"{row['cost']:>6.3f}{mark}"
                )
    wrong = [row["work"] for row in rows if not row["checked"]]
    if wrong:
        print("wrong answers: " + "; ".join(wrong), file=sys.stderr)
    return 1 if wrong or tests.returncode else 0


if __name__ == "__main__":
    sys.exit(main())
