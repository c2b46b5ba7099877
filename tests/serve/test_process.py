"""`coachhook serve` as a process: its arguments, and an end that loses nothing."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from cli_cases import fails
from serve_cases import FACTS, TOKEN
from tiny import tiny_model, tiny_texts, tiny_tokenizer

from coachhook_fast.edits import store

SETTINGS = [
    "--set",
    "v_num_grad_steps=3",
    "--set",
    "threshold_keys=64",
    "--set",
    "mom2_n_tokens=600",
    "--layers",
    "1,2",
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder, a corpus and a token."""
    folder = tmp_path_factory.mktemp("home")
    model = tiny_model("llama")
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "corpus.txt").write_text("\n\n".join(tiny_texts()))
    (folder / "token").write_text(f"{TOKEN}\n")
    return folder


class Process:
    """`coachhook serve` on a free port."""

    def __init__(self, home: Path, edits: Path) -> None:
        command = [
            sys.executable,
            "-m",
            "coachhook_fast.cli",
            "serve",
            "--model",
            str(home / "model"),
            "--device",
            "cpu",
        ]
        command += ["--edits", str(edits), "--port", "0", "--token-file", str(home / "token")]
        command += ["--corpus", str(home / "corpus.txt"), *SETTINGS]
        self.lines: list[str] = []
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self.port = int(self.wait_for(r"serving base, default on http://127\.0\.0\.1:(\d+)"))
        self.client = httpx.Client(
            base_url=f"http://127.0.0.1:{self.port}", headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60
        )
        self.wait_for('"event": "(statistics_ready)"')

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:  # one by one: others read them meanwhile
            self.lines.append(line)

    def wait_for(self, pattern: str) -> str:
        end = time.monotonic() + 200
        while time.monotonic() < end and self.process.poll() is None:
            for line in list(self.lines):
                if found := re.search(pattern, line):
                    return found[1]
            time.sleep(0.02)
        raise AssertionError(f"no {pattern} in {self.lines}")

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Exit code and stdout."""
        self.process.send_signal(number)
        code = self.process.wait(100)
        self._reader.join()
        assert self.process.stdout is not None
        return code, self.process.stdout.read()


@pytest.fixture
def running(home: Path, tmp_path: Path) -> Iterator[Process]:
    process = Process(home, tmp_path / "edits")
    yield process
    if process.process.poll() is None:
        process.process.kill()
        process.process.wait()


def test_sigterm_drains_and_ends_well(running: Process, tmp_path: Path) -> None:
    """An edit and an answer that are under way are answered, an upload that never ends is not waited for long."""
    client = running.client
    assert client.get("/readyz").json() == {"ready": True, "edits_ready": True}
    first = client.post("/edits", json={"edits": FACTS[:2]}).json()
    found: dict[str, Any] = {}

    def post(name: str, path: str, body: Any) -> None:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        found[name] = httpx.post(f"http://127.0.0.1:{running.port}{path}", json=body, headers=headers, timeout=60)

    answering = ("answer", "/v1/completions", {"prompt": "a b", "max_tokens": 200, "temperature": 0})
    threads = [
        threading.Thread(target=post, args=case)
        for case in (answering, ("edit", "/edits", {"edits": FACTS[2:6]}))
    ]  # fmt: skip
    with socket.create_connection(("127.0.0.1", running.port)) as unfinished:
        unfinished.sendall(
            b"POST /edits HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer %s\r\nContent-Length: 50\r\n\r\n{"
            % TOKEN.encode()
        )
        for thread in threads:
            thread.start()
        while not re.search(r'kind="edits"} 1', client.get("/metrics").text) and not found.get("edit"):
            time.sleep(0.005)
        code, out = running.end()
    for thread in threads:
        thread.join()
    assert code == 0, running.lines
    assert "stopped; the edits are in" in out
    assert found["edit"].status_code == 200
    assert found["answer"].status_code == 200
    assert found["answer"].json()["usage"]["completion_tokens"] == 200
    kept = [batch.id for batch in store.load(tmp_path / "edits").batches]
    assert kept == [first["id"], found["edit"].json()["id"]]
    events = [json.loads(line)["event"] for line in running.lines if line.startswith("{")]
    assert "stopping" in events
    assert not any("Traceback" in line for line in running.lines)


def test_a_kill_loses_nothing_that_was_answered(home: Path, running: Process, tmp_path: Path) -> None:
    made = [running.client.post("/edits", json={"edits": [fact]}).json()["id"] for fact in FACTS[:2]]
    threading.Thread(target=lambda: _ignoring(running, FACTS[2:6])).start()
    time.sleep(0.05)
    assert running.end(signal.SIGKILL)[0] == -signal.SIGKILL
    assert [batch.id for batch in store.load(tmp_path / "edits").batches][:2] == made


def _ignoring(running: Process, facts: list[Any]) -> None:
    try:
        running.client.post("/edits", json={"edits": facts})
    except httpx.HTTPError:
        return


def test_bad_arguments_are_refused_before_the_model_is_loaded(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["serve", "--model", str(tmp_path / "no model"), "--edits", str(tmp_path / "edits")]
    (tmp_path / "blank").write_text("  \n")
    (tmp_path / "adapter").mkdir()
    for arguments, word in (
        (["--host", "0.0.0.0"], "--token-file"), (["--host", "::"], "--token-file"),
        (["--token-file", str(tmp_path / "blank")], "blank"), (["--token-file", str(tmp_path / "none")], "none"),
        (["--port", "70000"], "--port"), (["--port", "x"], "--port"), (["--adapter", "acme"], "NAME=DIR"),
        (["--adapter", f"a={tmp_path / 'none'}"], "no folder"), (["--max-tokens", "0"], "--max-tokens"),
        ([*["--adapter", f"a={tmp_path / 'adapter'}"] * 2], "twice"), (["--corpus", str(tmp_path / "none")], "none"),
    ):  # fmt: skip
        assert word in fails(capsys, *common, *arguments)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        line = fails(
            capsys, "serve", "--model", str(home / "model"), "--edits", str(tmp_path / "edits"), "--port", port
        )
        assert "in use" in line
    assert os.listdir(tmp_path / "adapter") == []
