"""The example service over HTTP, on a real socket, with generation running while edits land."""

from __future__ import annotations

import importlib.util
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_facts, tiny_model, tiny_texts, tiny_tokenizer

from coachhook_fast import EditConfig, load_edits

pytest.importorskip("fastapi", reason="the extra [serve] is not installed")
pytest.importorskip("uvicorn", reason="the extra [serve] is not installed")
httpx = pytest.importorskip("httpx", reason="httpx is not installed")

pytestmark = pytest.mark.filterwarnings("ignore::coachhook_fast.EditWarning")

PATH = Path(__file__).resolve().parents[2] / "examples" / "serve_fastapi.py"
TOKEN = "secret"
CONFIG = EditConfig(layers=(1, 2), v_num_grad_steps=4, mom2_update_weight=5.0, threshold_rule="zscore", threshold_z=1.0)
FACTS = [{name: fact[name] for name in ("prompt", "subject", "target_new")} for fact in tiny_facts(6)]
PROMPT = tiny_texts()[0]


def example() -> Any:
    spec = importlib.util.spec_from_file_location("serve_fastapi", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["serve_fastapi"] = module  # pydantic looks annotations up there
    spec.loader.exec_module(module)
    return module


class Running:
    """The service on a free port, in a thread."""

    def __init__(self, folder: Path, **limits: int) -> None:
        import uvicorn

        module = example()
        model = tiny_model("llama")
        model.generation_config.eos_token_id = None
        self.app = module.create_app(
            model, tiny_tokenizer(), folder, TOKEN, config=CONFIG, limits=module.Limits(**limits)
        )
        service = self.app.state.service
        service.editor.collect_statistics(tiny_texts(), progress=False)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.server = uvicorn.Server(uvicorn.Config(self.app, host="127.0.0.1", port=port, log_level="warning"))
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        self.address = f"http://127.0.0.1:{port}"
        while not self.server.started:
            time.sleep(0.01)

    def client(self, token: str = TOKEN) -> Any:
        return httpx.Client(base_url=self.address, headers={"Authorization": f"Bearer {token}"}, timeout=60)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join()


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    service = Running(tmp_path / "edits")
    yield service
    service.stop()


def metrics_of(client: Any) -> dict[str, float]:
    lines = client.get("/metrics").text.splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


def answer(client: Any, **changes: Any) -> Any:
    reply = client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 8, **changes})
    assert reply.status_code == 200, reply.text
    return reply.json()


@pytest.mark.slow
def test_edits_land_while_others_generate(running: Running, tmp_path: Path) -> None:
    client = running.client()
    base = answer(client)
    assert base["edit_version"] == {"begun": "base", "ended": "base"}
    assert base["usage"]["completion_tokens"] == 8
    stop, failures, answers = threading.Event(), [], []

    def generate() -> None:
        with running.client() as mine:
            while not stop.is_set():
                reply = mine.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 8})
                if reply.status_code != 200:
                    failures.append(reply.text)
                answers.append((tuple(reply.json()["edit_version"].values()), reply.json()["choices"][0]["text"]))

    threads = [threading.Thread(target=generate) for _ in range(3)]
    for thread in threads:
        thread.start()
    first = client.post("/edits", json={"edits": FACTS[:3]}).json()
    second = client.post("/edits", json={"edits": FACTS[3:]}).json()
    listed = client.get("/edits").json()
    assert [batch["id"] for batch in listed["batches"]] == [first["id"], second["id"]]
    assert listed["version"] == second["id"]
    edited = answer(client)
    rolled = client.post(f"/edits/{first['id']}/rollback").json()
    assert rolled == {"rolled_back": first["id"], "version": second["id"]}
    time.sleep(0.3)
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures
    # Whoever began and ended in one version got that version's answer.
    whole = {text for (begun, ended), text in answers if begun == ended == "base"}
    assert whole <= {base["choices"][0]["text"]}
    assert len(answers) > 5
    assert edited["edit_version"]["ended"] == second["id"]

    # What was acknowledged is on disk, and serves in another process the same.
    model = load_edits(tiny_model("llama"), tmp_path / "edits")
    assert [batch.id for batch in model.coachhook.edit_set.batches] == [second["id"]]
    values = metrics_of(client)
    assert values["coachhook_edits"] == 3
    assert values[f'coachhook_edit_version{{version="{second["id"]}"}}'] == 1
    assert values["coachhook_generated_tokens_total"] >= 8 * len(answers)
    assert values['coachhook_request_seconds_count{endpoint="/v1/completions"}'] >= len(answers)
    for layer in (1, 2):
        tokens = values[f'coachhook_gate_tokens_total{{layer="{layer}"}}']
        assert 0 <= values[f'coachhook_gate_fired_total{{layer="{layer}"}}'] <= tokens > 0


def test_a_restart_serves_what_was_acknowledged(tmp_path: Path) -> None:
    service = Running(tmp_path / "edits")
    with service.client() as client:
        made = client.post("/edits", json={"edits": FACTS[:2]}).json()
        before = answer(client)
    service.stop()
    service = Running(tmp_path / "edits")
    with service.client() as client:
        after = answer(client)
        assert after["choices"] == before["choices"]
        assert after["edit_version"]["ended"] == made["id"]
        assert client.post("/edits", json={"edits": FACTS[2:4]}).status_code == 200  # and goes on
    service.stop()


def test_an_edit_that_cannot_be_saved_leaves_the_old_one_of_its_fact(
    running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from coachhook_fast.edits import store

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    client = running.client()
    client.post("/edits", json={"edits": FACTS[:2]})
    listed, said = client.get("/edits").json(), answer(client)["choices"]
    changed = {"edits": [{**FACTS[0], "target_new": "clerk"}]}
    with monkeypatch.context() as patch:
        patch.setattr(store, "save", full)
        assert client.post("/edits", json=changed).status_code == 500
    client = running.client()  # the server closes a connection on which it failed
    assert client.get("/edits").json() == listed
    assert answer(client)["choices"] == said
    made = client.post("/edits", json=changed).json()
    saved = store.load(tmp_path / "edits")
    assert [batch.id for batch in saved.batches] == [listed["batches"][0]["id"], made["id"]]
    assert [request.target_new for request in saved.requests] == [FACTS[1]["target_new"], "clerk"]


def test_only_bearers_of_the_token_get_in(running: Running) -> None:
    with running.client("wrong") as stranger:
        for method, path in (
            ("POST", "/v1/completions"), ("POST", "/edits"), ("GET", "/edits"), ("GET", "/metrics"),
            ("POST", "/edits/x/rollback"),
        ):  # fmt: skip
            reply = stranger.request(method, path, json={})
            assert reply.status_code == 401, path
        assert stranger.get("/health").status_code == 200
    with pytest.raises(ValueError, match="token must not be empty"):
        example().create_app(None, None, Path("x"), "")


def test_limits(tmp_path: Path) -> None:
    service = Running(
        tmp_path / "edits", body_bytes=2000, prompt_tokens=20, new_tokens=9, edits=2, running=1, waiting=0
    )
    with service.client() as client:
        for path, body, status, message in (
            ("/v1/completions", {"prompt": "a b"}, 422, "max_tokens may be 9"),
            ("/v1/completions", {"prompt": "town " * 40, "max_tokens": 2}, 422, "may have 20 tokens"),
            ("/v1/completions", {"prompt": "x" * 3000}, 413, "2000 bytes"),
            ("/v1/completions", {"prompt": ""}, 422, "prompt"),
            ("/edits", {"edits": FACTS[:3]}, 422, "may have 2 edits"),
            ("/edits", {"edits": []}, 422, "edits"),
            ("/edits", {"edits": [{**FACTS[0], "prompt": "It rains", "subject": "Ann"}]}, 422, "subject"),
            ("/edits/nothing/rollback", {}, 404, "nothing"),
        ):
            reply = client.post(path, json=body)
            assert reply.status_code == status, reply.text
            assert message in reply.text
        assert client.get("/edits").json() == {"version": "base", "batches": []}
        codes: list[int] = []

        def ask() -> None:
            with service.client() as mine:
                codes.append(mine.post("/v1/completions", json={"prompt": "a b", "max_tokens": 9}).status_code)

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(codes) <= {200, 429}
        assert 200 in codes
    service.stop()
