"""bench/gpu_check.py as far as it goes without a GPU: processes, rows written as they come, tables."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import coachhook_fast.bench

PATH = Path(__file__).resolve().parents[2] / "bench" / "gpu_check.py"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("gpu_check", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("wrong", [["--seconds", "-5"], ["--seconds", "nan"], ["nothing"]])
def test_arguments_without_meaning(script: Any, monkeypatch: pytest.MonkeyPatch, wrong: list[str]) -> None:
    monkeypatch.setattr("sys.argv", ["gpu_check.py", *wrong])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 2


def row(**fields: Any) -> dict[str, Any]:
    base = {"work": "w", "baseline": "b", "seconds": 1.0, "baseline_seconds": 2.0, "ratio": 2.0, "floor_ratio": 3.0}
    return {**base, "checked": True, "dtype": "bfloat16", "shape": "gpt-j 4096x16384", "timing": "graph", **fields}


def test_processes_end_or_are_ended(script: Any, tmp_path: Path) -> None:
    assert script.run(["-c", "print('out')"], tmp_path / "log", 60.0) == "done"
    assert (tmp_path / "log").read_text() == "out\n"
    assert script.run(["-c", "raise SystemExit(3)"], tmp_path / "log", 60.0) == "exit code 3"
    assert script.run(["-c", "import time; time.sleep(60)"], tmp_path / "log", 1.0) == "stopped at its limit"


def test_rows_before_a_crash_are_kept(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield row()
        raise RuntimeError("broke")

    monkeypatch.setitem(coachhook_fast.bench.BENCHMARKS, "solve", rows)
    assert script.measure("solve", tmp_path / "rows.json") == 1
    assert [found["work"] for found in json.loads((tmp_path / "rows.json").read_text())] == ["w"]


def test_sections_and_their_tables(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def worker(section: str, limit: float) -> str:
        work, share = "gated projection, rank 100, 0 of 1 tokens gated", {"rank": 100, "tokens": 1, "gated_share": 0.0}
        found = [
            row(work=work, baseline="plain projection", cost=1.2, floor_cost=1.02, **share),
            row(work=work, baseline="published hook", cost=0.3, ratio=3.5, floor_cost=1.02, timing="eager", **share),
            row(work=work, baseline="published hook", cost=0.3, ratio=2.9, floor_cost=1.02, timing="eager", **share),
            row(work="decode step, batch 1", cost=1.05, floor_cost=1.01, timing="eager"),
        ]
        if section == "solve":
            found = [row(work="solve and update", d=16384, n=100, checked=False)]
        (tmp_path / f"{section}-gpu.json").write_text(json.dumps(found))
        return "done"

    monkeypatch.setattr(script, "RESULTS", tmp_path)
    monkeypatch.setattr(script, "run_worker", worker)
    assert script.check(["gated-linear"], 10.0, "gpu") == 0
    lines = capsys.readouterr().out.splitlines()
    asked = {line[:58].strip(): line[58:].split() for line in lines}
    assert asked["gpt-j, rank 100, 1 tokens, over plain"] == ["1.08", "1.020", "1.200", "MISSES"]
    assert asked["decode, published over ours, worst of 2, 1 miss"] == ["3.00", "3.000", "2.900", "MISSES"]
    assert any(line.strip().startswith("2.90 gpt-j") for line in lines)
    assert asked["prefill, published over ours, worst of 0, 0 miss"][-2:] == ["NOT", "MEASURED"]
    assert asked["decode step, batch 1, over unedited"] == ["1.10", "1.010", "1.050"]
    assert asked["decode step, batch 8, over unedited"][-2:] == ["NOT", "MEASURED"]
    assert script.check(["solve"], 10.0, "gpu") == 1
    assert "WRONG solve and update" in capsys.readouterr().out
    assert len(list(script.limits("targets", [row(work="target values, an edit", ratio=21.0)] * 2))) == 2
