"""/edits and /inspect: previews that leave nothing, edits under load, undo, and disks and models that never differ."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from serve_cases import CONFIG, FACTS, PROMPT, Running, ask, metrics_of, service_of, text_of
from tiny import tiny_model

from coachhook_fast import files, load_edits
from coachhook_fast.editing.key_memory import KeyMemory
from coachhook_fast.edits import store

pytestmark = pytest.mark.filterwarnings("ignore::coachhook_fast.EditWarning")


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    with Running(tmp_path / "edits") as service:
        yield service


def state(running: Running) -> list[torch.Tensor]:
    """All that a preview or a failed edit must leave: hooks of all three models, key memories."""
    service = running.service
    hooks = [*service.served.hooks.hooks, *service.viewer.hooks.hooks, *service.editor.hooks]
    return [
        *(memory.factor.clone() for memory in service.editor.memories),
        *(tensor for hook in hooks for tensor in (hook.get_delta_weight(), torch.tensor(hook.threshold))),
    ]


def assert_served_is_on_disk(running: Running) -> None:
    disk = store.load(running.service.editing.folder)
    assert [batch.id for batch in disk.batches] == [batch.id for batch in running.service.editing.ledger]
    for delta, hook in zip(disk.deltas, running.service.served.hooks.hooks, strict=True):
        torch.testing.assert_close(hook.get_delta_weight(), delta.dense())
    assert running.service.served.version == (disk.batches[-1].id if disk.batches else "base")


def test_edits_land_while_others_generate(running: Running, tmp_path: Path) -> None:
    client = running.client()
    base = ask(client)
    assert base["system_fingerprint"] == "coachhook-base"
    stop, failures, answers = threading.Event(), [], []

    def generate() -> None:
        with running.client() as mine:
            while not stop.is_set():
                reply = mine.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 8, "temperature": 0})
                if reply.status_code != 200:
                    failures.append(reply.text)
                answers.append((reply.json()["system_fingerprint"], text_of(reply.json())))

    threads = [threading.Thread(target=generate) for _ in range(3)]
    for thread in threads:
        thread.start()
    first = client.post("/edits", json={"edits": FACTS[:3]}).json()
    second = client.post("/edits", json={"edits": FACTS[3:6]}).json()
    listed = client.get("/edits").json()
    assert [batch["id"] for batch in listed["batches"]] == [first["id"], second["id"]]
    assert listed["version"] == second["version"] == second["id"]
    rolled = client.post(f"/edits/{first['id']}/rollback").json()
    assert rolled == {"rolled_back": first["id"], "version": second["id"]}
    time.sleep(0.3)
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(answers) > 5
    # A text is of one version from its beginning to its end. (The second one's edits changed with the rollback.)
    for version in ("base", first["id"]):
        assert len({text for fingerprint, text in answers if fingerprint == f"coachhook-{version}"}) <= 1
    assert {text for fingerprint, text in answers if fingerprint == "coachhook-base"} <= {text_of(base)}
    assert_served_is_on_disk(running)
    model = load_edits(tiny_model("llama"), tmp_path / "edits")
    assert [batch.id for batch in model.coachhook.edit_set.batches] == [second["id"]]
    values = metrics_of(client)
    assert values["coachhook_edits"] == 3
    assert values[f'coachhook_version_info{{version="{second["id"]}"}}'] == 1
    assert values["coachhook_generated_tokens_total"] >= 8 * len(answers)
    assert values['coachhook_requests_total{route="/v1/completions",status="200"}'] >= len(answers)


def test_requests_carry_paraphrases_and_keep_and_a_restart_serves_them(tmp_path: Path) -> None:
    fact = {**FACTS[0], "paraphrases": ["Once more: {} works as a"], "keep": ["{} lives in"], "case_id": 7}
    with Running(tmp_path / "edits") as service, service.client() as client:
        made = client.post("/edits", json={"edits": [fact]}).json()
        assert made["edits"][0]["paraphrases"] == fact["paraphrases"]
        assert made["edits"][0]["state"] in ("said", "not said", "weak", "in context only")
        before = ask(client)
    with Running(tmp_path / "edits") as service, service.client() as client:
        after = ask(client)
        assert after["choices"] == before["choices"]
        assert after["system_fingerprint"] == f"coachhook-{made['id']}"
        request = service.service.editing.ledger[0].requests[0]
        assert (request.paraphrases, request.keep, request.case_id) == (
            tuple(fact["paraphrases"]),
            tuple(fact["keep"]),
            7,
        )
        assert client.post("/edits", json={"edits": FACTS[2:4]}).status_code == 200  # and goes on


def test_a_preview_tells_what_an_edit_does_and_leaves_nothing(running: Running) -> None:
    client = running.client()
    first = client.post("/edits", json={"edits": FACTS[:2]}).json()
    before, edits = state(running), client.get("/edits").json()
    manifest = (running.service.editing.folder / "edit_set.json").read_bytes()
    fact = {**FACTS[0], "target_new": "cook", "paraphrases": ["Once more: {} works as a"], "keep": ["{} lives in"]}
    found = client.post(
        "/edits/preview", json={"edits": [fact, FACTS[3]], "questions": [PROMPT], "max_tokens": 6}
    ).json()
    assert [(a["edit"], a["kind"]) for a in found["answers"]] == [
        (0, "prompt"), (0, "paraphrase"), (0, "keep"), (1, "prompt"), (None, "question"),
    ]  # fmt: skip
    assert all(answer["changed"] == (answer["before"] != answer["after"]) for answer in found["answers"])
    for one, other in zip(state(running), before, strict=True):
        assert torch.equal(one, other)
    assert client.get("/edits").json() == edits
    assert (running.service.editing.folder / "edit_set.json").read_bytes() == manifest
    # What it said is what the edit does.
    question = found["answers"][-1]
    assert text_of(ask(client, max_tokens=6)) == question["before"]
    made = client.post("/edits", json={"edits": [fact, FACTS[3]]}).json()
    assert [edit["answer"] for edit in made["edits"]] == [edit["answer"] for edit in found["edits"]]
    assert text_of(ask(client, max_tokens=6)) == question["after"]
    again = client.post("/edits/preview", json={"edits": [{**FACTS[0], "prompt": "Ask {} for a"}]}).json()
    assert [a["kind"] for a in again["answers"]].count("same subject") == 1  # asked twice in one wording
    assert first["id"] in [batch["id"] for batch in client.get("/edits").json()["batches"]]


@pytest.mark.parametrize(("code", "status"), [(errno.ENOSPC, 507), (errno.EDQUOT, 507), (errno.EIO, 503)])
def test_a_full_disk_leaves_disk_and_model_equal(
    running: Running, monkeypatch: pytest.MonkeyPatch, code: int, status: int
) -> None:
    client = running.client()
    batch = client.post("/edits", json={"edits": FACTS[:2]}).json()
    said, version = text_of(ask(client)), running.service.served.version

    def full(path: Path, content: bytes) -> None:
        raise OSError(code, "no", str(path))

    monkeypatch.setattr(files, "write_synced", full)
    for path, body in (("/edits", {"edits": FACTS[2:4]}), (f"/edits/{batch['id']}/rollback", {})):
        reply = client.post(path, json=body)
        assert reply.status_code == status, reply.text
        assert "nothing was changed" in reply.json()["error"]["message"]
        assert str(running.service.editing.folder) not in reply.text
        assert running.service.served.version == version
        assert text_of(ask(client)) == said
        assert_served_is_on_disk(running)
    monkeypatch.undo()
    assert client.post(f"/edits/{batch['id']}/rollback").status_code == 200
    assert client.post("/edits", json={"edits": FACTS[2:4]}).status_code == 200
    assert_served_is_on_disk(running)


def test_of_two_services_on_one_folder_the_second_is_refused(tmp_path: Path) -> None:
    with Running(tmp_path / "edits") as one, Running(tmp_path / "edits") as other:
        with one.client() as first, other.client() as second:
            batch = first.post("/edits", json={"edits": FACTS[:2]}).json()
            reply = second.post("/edits", json={"edits": FACTS[2:4]})
            assert reply.status_code == 409
            assert reply.json()["error"]["code"] == "conflict"
            assert other.service.served.version == "base"
            assert second.get("/edits").json()["batches"] == []
            assert first.post("/edits", json={"edits": FACTS[4:6]}).status_code == 200
            assert batch["id"] in [one["id"] for one in first.get("/edits").json()["batches"]]
        assert_served_is_on_disk(one)


def test_a_single_fact_is_removed_and_a_new_answer_takes_the_old_ones_place(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = running.client()
    batch = client.post("/edits", json={"edits": FACTS[:3]}).json()
    assert [edit["index"] for edit in batch["edits"]] == [0, 1, 2]
    place = f"/edits/{batch['id']}"
    assert client.delete(f"{place}/1").json() == {"removed": [batch["id"], 1], "version": batch["id"]}
    listed = client.get("/edits").json()
    assert [edit["index"] for edit in listed["batches"][0]["edits"]] == [0, 2]
    assert [(one["batch"], one["index"], one["reason"]) for one in listed["removed"]] == [(batch["id"], 1, "removed")]
    for index, status in (("1", 404), ("7", 404), ("x", 400), ("-1", 400), ("9" * 30, 400)):
        assert client.delete(f"{place}/{index}").status_code == status
    assert client.delete("/edits/nothing/0").status_code == 404
    assert_served_is_on_disk(running)
    with monkeypatch.context() as patch:
        patch.setattr(files, "write_synced", lambda path, content: (_ for _ in ()).throw(OSError(errno.ENOSPC, "no")))
        assert client.delete(f"{place}/2").status_code == 507
        assert client.post("/edits", json={"edits": [{**FACTS[0], "target_new": "cook"}]}).status_code == 507
    assert client.get("/edits").json() == listed
    assert_served_is_on_disk(running)
    changed = client.post("/edits", json={"edits": [{**FACTS[0], "target_new": "cook"}]}).json()
    listed = client.get("/edits").json()
    assert [[edit["target_new"] for edit in one["edits"]] for one in listed["batches"]] == [
        [FACTS[2]["target_new"]], ["cook"],
    ]  # fmt: skip
    assert listed["removed"][-1]["by"] == changed["id"]
    assert_served_is_on_disk(running)


def test_a_fault_in_the_editor_leaves_the_service_healthy(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    client = running.client()
    client.post("/edits", json={"edits": FACTS[:2]})
    said = text_of(ask(client))

    def broken(self: KeyMemory, keys: torch.Tensor) -> Any:
        raise RuntimeError("a secret word of the request")

    monkeypatch.setattr(KeyMemory, "solve", broken)
    reply = client.post("/edits", json={"edits": FACTS[2:4]})
    assert reply.status_code == 500
    assert "secret word" not in reply.text
    monkeypatch.undo()
    assert text_of(ask(client)) == said
    assert_served_is_on_disk(running)
    assert client.post("/edits", json={"edits": FACTS[2:4]}).status_code == 200


def test_bad_edits_are_refused_by_name(running: Running) -> None:
    client = running.client()
    for path, body, status, word in (
        ("/edits", {"edits": [{**FACTS[0], "prompt": "It rains", "subject": "Ann"}]}, 422, "edits.0"),
        ("/edits", {"edits": [FACTS[0], {**FACTS[0], "target_new": "other"}]}, 422, "contradicts"),
        ("/edits", {"edits": [{**FACTS[0], "prompt": "a " * 400 + "{}"}]}, 422, "context"),
        ("/edits", {"edits": FACTS[:1] * 65}, 400, "64 edits"), ("/edits", {"edits": []}, 400, "edits"),
        ("/edits", {"edits": [{**FACTS[0], "colour": 1}]}, 400, "edits.0.colour"),
        ("/edits/preview", {"edits": FACTS[:1], "questions": ["a " * 400]}, 422, "context"),
        ("/edits/preview", {"edits": FACTS[:1], "questions": ["a"] * 33}, 400, "32"),
        ("/edits/nothing/rollback", {}, 404, "nothing"),
        ("/inspect", {"prompt": "a " * 400}, 422, "context"), ("/inspect", {"prompt": "a", "model": "x"}, 404, "'x'"),
    ):  # fmt: skip
        reply = client.post(path, json=body)
        assert reply.status_code == status, (path, reply.text)
        assert word in reply.json()["error"]["message"]
    assert client.get("/edits").json() == {"version": "base", "batches": [], "removed": []}


def test_inspect_shows_the_gate_of_each_edit_set(running: Running) -> None:
    client = running.client()
    batch = client.post("/edits", json={"edits": FACTS[:2]}).json()
    text = str(batch["edits"][0]["text"])
    seen = client.post("/inspect", json={"prompt": text}).json()
    assert seen["version"] == batch["id"]
    assert seen["layers"] == list(CONFIG.layers or ())
    assert "".join(token["token"] for token in seen["tokens"]) == text
    assert any(any(token["fire"]) for token in seen["tokens"])
    assert client.post("/inspect", json={"prompt": text, "model": "base"}).status_code == 200


def test_each_kind_waits_in_a_queue_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A queue full of completions keeps no rollback out, and one of edits neither."""
    with Running(tmp_path / "edits", generating=1, editing=1, workers=1) as service, service.client() as client:
        batch = client.post("/edits", json={"edits": FACTS[:2]}).json()
        go_on = threading.Event()
        generate = service.service.generator._write
        monkeypatch.setattr(service.service.generator, "_write", lambda batch: go_on.wait(30) and generate(batch))
        edit = service.service.editing.editor.edit
        monkeypatch.setattr(
            service.service.editing.editor, "edit", lambda *args, **kwargs: go_on.wait(30) and edit(*args, **kwargs)
        )
        codes: dict[str, list[int]] = {"/v1/completions": [], "/edits": []}

        def post(path: str, body: Any) -> None:
            with service.client() as mine:
                codes[path].append(mine.post(path, json=body).status_code)

        cases = [("/v1/completions", {"prompt": "a", "max_tokens": 2})] * 5
        cases += [("/edits", {"edits": [fact]}) for fact in FACTS[2:5]]
        threads = [threading.Thread(target=post, args=case) for case in cases]
        for thread in threads:
            thread.start()
        rolled: list[int] = []
        undo = threading.Thread(target=lambda: rolled.append(client.post(f"/edits/{batch['id']}/rollback").status_code))
        undo.start()
        while len(codes["/v1/completions"]) < 3 or len(codes["/edits"]) < 2:
            time.sleep(0.01)
        refused = service.client().post("/v1/completions", json={"prompt": "a"})
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        go_on.set()
        for thread in [*threads, undo]:
            thread.join()
        assert sorted(codes["/v1/completions"]) == [200, 200, 429, 429, 429]
        assert sorted(codes["/edits"]) == [200, 429, 429]
        assert rolled == [200]


def test_who_waited_is_counted_no_more(running: Running) -> None:
    """Whatever came of it; an answer is counted until its batch has ended."""
    client = running.client()
    assert client.post("/edits", json={"edits": [{**FACTS[0], "prompt": "{} {} x"}]}).status_code == 422
    client.post("/edits", json={"edits": FACTS[:1]})
    ask(client)
    end = time.monotonic() + 20
    while running.service.generator.taken and time.monotonic() < end:
        time.sleep(0.01)
    values = metrics_of(client)
    for kind in ("edits", "rollbacks", "inspections", "completions"):
        assert values[f'coachhook_waiting{{kind="{kind}"}}'] == 0


@pytest.mark.parametrize("damage", ["cut", "empty", "folder", "link", "no folder", "circle"])
def test_what_is_no_edit_set_stops_the_start(tmp_path: Path, damage: str) -> None:
    """And does not pass for one that is yet to be made, whose first edit would fail after its work."""
    folder = tmp_path / "edits"
    manifest = folder / "edit_set.json"
    if damage == "circle":
        folder.symlink_to(folder)
    elif damage == "no folder":
        folder.write_text("edits")
    else:
        folder.mkdir()
    if damage in ("cut", "empty"):
        manifest.write_text('{"format": 1, "mod' if damage == "cut" else "")
    elif damage == "folder":
        manifest.mkdir()
    elif damage == "link":
        manifest.symlink_to(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"edit_set\.json|edits is not a folder"):
        service_of(folder)
