"""What the tests of the command line share: arguments of the module's model folder, and how a verb is called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coachhook_fast.cli import main

QUICK = ["--set", "v_num_grad_steps=3", "--set", "mom2_n_tokens=600", "--set", "threshold_keys=64", "--layers", "1,2"]


def model(home: Path) -> list[str]:
    return ["--model", str(home / "model"), "--device", "cpu"]


def facts(home: Path) -> list[str]:
    return ["--facts", str(home / "facts.jsonl")]


def edits(home: Path) -> list[str]:
    return ["--edits", str(home / "edits")]


def out(home: Path, name: str) -> list[str]:
    return ["--out", str(home / name)]


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> Any:
    """What a command prints on stdout under --json, which must be JSON and nothing else."""
    capsys.readouterr()
    assert main([*arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def run_text(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    capsys.readouterr()
    assert main(arguments) == code
    return capsys.readouterr().out


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The error line of a command that must refuse its input."""
    capsys.readouterr()
    try:
        code: Any = main(arguments)
    except SystemExit as end:  # argparse leaves this way
        code = end.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert "Traceback" not in captured.err
    line = captured.err.strip().splitlines()[-1]
    assert line.startswith(f"coachhook {arguments[0]}: error: ")
    return line
