"""`coachhook doctor`: what it says is what is there."""

from __future__ import annotations

import importlib.util
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_cases import run_json, run_text

from coachhook_fast.cli.doctor import slow_parts
from coachhook_fast.ops import extension_available

VERSIONS = {"torch": "2.13.0", "transformers": "5.24.0", "triton": "3.6.0"}
MACHINE = {"cores": 2, "threads": 2, "cpu_capability": "AVX512", "onednn": True}
EXTENSION = {"loaded": True, "file": "_C.so", "cuda": "13.0"}
GPU = {"torch_cuda": "13.0", "devices": [{"name": "GPU", "capability": "9.0", "bytes": 10**9}]}
CACHES = {"folder": "/cache", "writable": True}


def slow(**changes: dict[str, Any]) -> list[str]:
    """Lines for a machine that lacks nothing, but for `changes`."""
    whole = {"versions": VERSIONS, "machine": MACHINE, "extension": EXTENSION, "gpu": GPU, "caches": CACHES}
    return slow_parts(**{name: {**part, **changes.get(name, {})} for name, part in whole.items()})


def test_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    found = run_json(capsys, "doctor")
    assert found["versions"]["torch"] == metadata.version("torch")
    assert (found["versions"]["vllm"] is None) == (importlib.util.find_spec("vllm") is None)
    assert found["extension"]["loaded"] == extension_available()
    if found["extension"]["loaded"]:
        assert Path(found["extension"]["file"]).name.startswith("_C")
    assert len(found["gpu"]["devices"]) == torch.cuda.device_count()
    assert found["machine"]["threads"] == torch.get_num_threads()


def test_caches_and_their_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path / "cache"))
    assert run_json(capsys, "doctor")["caches"] == {
        "folder": str(tmp_path / "cache"), "from": "COACHHOOK_CACHE", "writable": True, "parts": [],
    }  # fmt: skip
    assert not (tmp_path / "cache").exists()  # looking makes nothing
    (tmp_path / "cache" / "targets" / "deep").mkdir(parents=True)
    (tmp_path / "cache" / "targets" / "deep" / "a").write_bytes(bytes(1500))
    (tmp_path / "cache" / "statistics").mkdir()
    (tmp_path / "cache" / "statistics" / "loop").symlink_to(tmp_path, target_is_directory=True)
    parts = run_json(capsys, "doctor")["caches"]["parts"]
    assert [part["name"] for part in parts] == ["statistics", "targets"]
    assert parts[1]["bytes"] == 1500
    assert parts[0]["bytes"] < 1500  # the link itself, not what it leads to
    assert "targets: 1.5 kB" in run_text(capsys, "doctor")


def test_requirements_that_are_not_met(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        "torch<2",
        "numpy>=1",
        "not-there-at-all>=3",
        "vllm>=99; extra == 'vllm'",
        "triton>=99; python_version<'3'",
    ]
    monkeypatch.setattr(metadata, "requires", lambda _: lines)
    assert run_json(capsys, "doctor")["not_in_range"] == [
        f"torch<2: {metadata.version('torch')}", "not-there-at-all>=3: not installed",
    ]  # fmt: skip
    monkeypatch.setattr(metadata, "requires", raising_not_found)
    assert run_json(capsys, "doctor")["not_in_range"] == []


def raising_not_found(name: str) -> list[str]:
    raise metadata.PackageNotFoundError(name)


def test_nothing_is_slow_where_nothing_is_missing() -> None:
    assert slow() == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"extension": {"loaded": False, "reason": "no module _C"}}, ["no module _C", "--no-build-isolation"]),
        ({"machine": {"threads": 1}}, ["1 of 2 cores", "OMP_NUM_THREADS"]),
        ({"machine": {"onednn": False}}, ["MKL"]),
        ({"machine": {"cpu_capability": "AVX2"}}, ["without AVX-512", "AVX2"]),
        ({"gpu": {"devices": []}}, ["no GPU", "torch finds none"]),
        ({"gpu": {"devices": [], "torch_cuda": None}}, ["build without CUDA"]),
        ({"versions": {"triton": None}}, ["Triton is not installed"]),
        ({"extension": {"cuda": ""}}, ["no CUDA parts", "nvcc"]),
        ({"versions": {"transformers": "5.17.0"}}, ["GPT-J", "5.24"]),
        ({"caches": {"writable": False}}, ["/cache", "COACHHOOK_CACHE"]),
    ],
)
def test_what_is_slow_is_said_with_its_reason(changes: dict[str, dict[str, Any]], words: list[str]) -> None:
    lines = slow(**changes)
    assert len(lines) == 1
    assert all(word in lines[0] for word in words)
