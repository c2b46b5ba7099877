"""Who gets in and with what: tokens, hosts, bodies that lie about their size or never end, and texts that are none."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serve_cases import FACTS, PROMPT, TOKEN, Running, ask, metrics_of, received

from coachhook_fast.serve.auth import check_bind, is_loopback, read_token
from coachhook_fast.serve.limits import Limits
from coachhook_fast.serve.logs import LOGGER, JsonLines

pytestmark = pytest.mark.filterwarnings("ignore::coachhook_fast.EditWarning")
GUARDED = (
    ("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("GET", "/v1/models"), ("GET", "/v1/models/base"),
    ("GET", "/edits"), ("POST", "/edits"), ("POST", "/edits/preview"), ("POST", "/edits/x/rollback"),
    ("DELETE", "/edits/x/0"), ("GET", "/metrics"), ("POST", "/inspect"),
    ("GET", "/docs"), ("GET", "/openapi.json"), ("GET", "/nothing"),
)  # fmt: skip


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with Running(
        tmp_path_factory.mktemp("serve") / "edits", body_bytes=2000, body_seconds=0.5, header_seconds=0.5
    ) as service:
        yield service


def head(path: str = "/v1/completions", *lines: str, token: str = TOKEN, method: str = "POST") -> bytes:
    told = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", f"Authorization: Bearer {token}", *lines]
    return "\r\n".join([*told, "", ""]).encode()


# -------------------------------------------------------------------- who


def test_only_bearers_of_the_token_get_in(running: Running) -> None:
    for given in (None, "Bearer wrong", TOKEN, f"Bearer {TOKEN}x", f"bearer\t{TOKEN}", "Bearer"):
        headers = {} if given is None else {"Authorization": given}
        with running.client("x") as stranger:
            stranger.headers.pop("Authorization")
            for method, path in GUARDED:
                reply = stranger.request(method, path, headers=headers, json={} if method == "POST" else None)
                assert reply.status_code == 401, (path, headers)
                assert reply.headers["www-authenticate"] == "Bearer"
            for path in ("/", "/page.css", "/page.js", "/healthz", "/readyz"):
                assert stranger.get(path).status_code == 200
    with running.client() as friend:
        assert friend.get("/v1/models").status_code == 200
        assert [friend.get(path).status_code for path in ("/docs", "/openapi.json", "/nothing")] == [404] * 3
        assert friend.get("/nothing").json()["error"]["type"] == "not_found_error"
    twice = running.raw(head("/edits", "Authorization: Bearer wrong", method="GET"))
    assert b" 401 " in twice.splitlines()[0]


def test_a_stranger_is_refused_before_the_body(running: Running) -> None:
    """The answer comes while the body is still announced, and the connection ends."""
    began = time.monotonic()
    said = running.raw(head("/edits", "Content-Type: application/json", "Content-Length: 1999", token="wrong"))
    assert b" 401 " in said.splitlines()[0]
    assert time.monotonic() - began < 0.4
    expecting = running.raw(head("/edits", "Content-Length: 1999", "Expect: 100-continue", token="wrong"))
    assert expecting.startswith(b"HTTP/1.1 401")


def test_without_a_token_this_machine_alone_gets_in(tmp_path: Path) -> None:
    """A page of the web in a local browser is a stranger: by a rebound name, or by a form that it sends."""
    with Running(tmp_path / "edits", token=None) as service, service.client() as client:
        assert client.get("/edits").status_code == 200
        assert client.get("/edits", headers={"Host": f"localhost:{service.port}"}).status_code == 200
        assert client.get("/edits", headers={"Host": "evil.example"}).status_code == 403
        assert client.get("/edits", headers={"Host": "127.0.0.1.evil.example"}).status_code == 403
        own = {"Origin": service.address}
        assert client.post("/edits/x/rollback", headers=own).status_code == 404
        for origin in ("https://evil.example", "null", f"http://localhost:{service.port + 1}"):
            assert client.post("/edits/x/rollback", headers={"Origin": origin}).status_code == 403
        form = client.post("/v1/completions", content=b'{"prompt": "a"}', headers={"Content-Type": "text/plain"})
        assert form.status_code == 415


@pytest.mark.parametrize(
    ("content", "word"),
    [(b"", "blank"), (b"  \n", "blank"), (b"a\nb\n", "line"), ("clé".encode(), "ASCII"), (b"a b", "spaces"),
     (b"\xff\xfe", "UTF-8"), (b"x" * 5000, "bytes"), (b"a\x00b", "visible")],
)  # fmt: skip
def test_tokens_that_nobody_could_bring_are_refused(tmp_path: Path, content: bytes, word: str) -> None:
    (tmp_path / "token").write_bytes(content)
    with pytest.raises(ValueError, match=word) as caught:
        read_token(tmp_path / "token")
    assert "clé" not in str(caught.value)


def test_token_files_and_hosts(tmp_path: Path) -> None:
    for content in (b"sesame", b"sesame\n", b"sesame\r\n"):
        (tmp_path / "token").write_bytes(content)
        assert read_token(tmp_path / "token") == "sesame"
    hosts = {"127.0.0.1": True, "127.9.9.9": True, "::1": True, "localhost": True, "0.0.0.0": False, "::": False,
             "": False, "192.168.1.4": False, "example.org": False}  # fmt: skip
    for host, loopback in hosts.items():
        assert is_loopback(host) == loopback, host
        check_bind(host, "token")
        if not loopback:
            with pytest.raises(ValueError, match="--token-file"):
                check_bind(host, None)
    check_bind("127.0.0.1", None)
    with pytest.raises(ValueError, match="edits must be positive, got 0"):
        Limits(edits=0)


# -------------------------------------------------------------------- bodies


def test_bodies_are_counted_as_they_come(running: Running) -> None:
    chunk = b"400\r\n" + b" " * 1024 + b"\r\n"
    chunked = head("/v1/completions", "Content-Type: application/json", "Transfer-Encoding: chunked") + chunk * 64
    assert b" 413 " in running.raw(chunked + b"0\r\n\r\n").splitlines()[0]
    both = head("/edits", "Content-Length: 10", "Transfer-Encoding: chunked") + chunk * 8
    assert b" 400 " in running.raw(both).splitlines()[0]
    large = head("/edits", "Content-Type: application/json", "Content-Length: 2001")
    assert b" 413 " in running.raw(large).splitlines()[0]
    for length in ("-1", "1e3", "9" * 30):
        assert b" 400 " in running.raw(head("/edits", f"Content-Length: {length}")).splitlines()[0]
    assert b" 413 " in running.raw(head("/healthz", "Content-Length: 5", method="GET")).splitlines()[0]
    body = json.dumps({"prompt": "a", "max_tokens": 1}).encode()
    right = head("/v1/completions", "Content-Type: application/json", "Transfer-Encoding: chunked", "Connection: close")
    right += b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    assert b" 200 " in running.raw(right).splitlines()[0]


def test_headers_and_bodies_that_never_end_are_not_waited_for(running: Running) -> None:
    began = time.monotonic()
    assert running.raw(b"GET /healthz HT", seconds=5) == b""
    assert 0.3 < time.monotonic() - began < 3
    began = time.monotonic()
    said = running.raw(head("/edits", "Content-Type: application/json", "Content-Length: 50") + b"{", seconds=5)
    assert b" 408 " in said.splitlines()[0]
    assert 0.3 < time.monotonic() - began < 3
    with socket.create_connection(("127.0.0.1", running.port)) as connection:  # a byte now and then gives no more time
        connection.settimeout(0.1)
        began = time.monotonic()
        for byte in b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"a" * 100:
            try:
                connection.sendall(bytes([byte]))
                if connection.recv(10) == b"":
                    break
            except TimeoutError:
                continue
            except OSError:
                break
        assert time.monotonic() - began < 3
    with socket.create_connection(("127.0.0.1", running.port)) as connection:  # and one that speaks again is answered
        connection.settimeout(5)
        for _ in range(2):
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            said = b""
            while not said.endswith(b"}"):
                said += connection.recv(4096)
            assert b" 200 " in said.splitlines()[0]
            time.sleep(0.2)
        connection.settimeout(3)
        assert received(connection) == b""  # closed when it is silent


EVIL = {
    "NaN": b'{"prompt": NaN}', "infinity": b'{"prompt": "a", "temperature": Infinity}',
    "large float": b'{"prompt": "a", "temperature": 1e999}',
    "huge integer": b'{"prompt": "a", "max_tokens": ' + b"9" * 1500 + b"}",
    "huge seed": b'{"prompt": "a", "seed": ' + b"9" * 40 + b"}",
    "text for a number": b'{"prompt": "a", "max_tokens": "4"}',
    "number for text": b'{"prompt": 12345678901234567890123}',
    "true for a number": b'{"prompt": "a", "max_tokens": true}',
    "half a character": b'{"prompt": "a\\ud800b"}', "half in stop": b'{"prompt": "a", "stop": "\\udfff"}',
    "half in model": b'{"prompt": "a", "model": "\\ud800"}', "half in a name": b'{"\\ud800": 1, "prompt": "a"}',
    "repeated": b'{"prompt": "a", "prompt": "b"}', "nested": b"[" * 1900, "nested object": b'{"a":' * 300, "empty": b"",
    "list": b"[]", "null": b"null", "bytes": b'{"prompt": "\xff"}', "cut": b'{"prompt": "a"',
    "no tokens": b'{"prompt": [[]]}', "mixed": b'{"prompt": ["a", 1]}', "negative id": b'{"prompt": [-1]}',
    "huge id": b'{"prompt": [1000000000000000000000]}', "stop with nothing": b'{"prompt": "a", "stop": ""}',
    "n": b'{"prompt": "a", "n": 0}', "top_p": b'{"prompt": "a", "top_p": 0}',
    "stream options": b'{"prompt": "a", "stream_options": {"x": 1}}',
}  # fmt: skip


@pytest.mark.parametrize("name", EVIL)
def test_what_is_no_request_is_refused_and_nothing_is_500(running: Running, name: str) -> None:
    with running.client() as client:
        for path in ("/v1/completions", "/v1/chat/completions", "/edits", "/edits/preview", "/inspect"):
            reply = client.post(path, content=EVIL[name], headers={"Content-Type": "application/json"})
            assert reply.status_code in (400, 404, 422), (path, reply.status_code, reply.text)
            assert reply.json()["error"]["message"]
            reply.text.encode()  # no half characters come back
        fact = {"prompt": "{} is", "subject": "Ann", "target_new": "red"}
        for field in fact:
            evil = EVIL[name].partition(b": ")[2][:-1] or b"null"
            body = json.dumps({"edits": [{**fact, field: "@"}]}).encode().replace(b'"@"', evil)
            if len(body) < 2000 and evil not in (b'"a"',) and not evil.startswith(b'"a", '):
                reply = client.post("/edits", content=body, headers={"Content-Type": "application/json"})
                assert reply.status_code in (400, 422), (field, body, reply.text)
        assert client.get("/edits").json()["batches"] == []


# -------------------------------------------------------------------- clients that leave, logs


def test_a_client_that_leaves_stops_its_generation(tmp_path: Path) -> None:
    with Running(tmp_path / "edits", workers=1) as service, service.client() as client:
        rows: list[Any] = []
        start = service.service.asking.start

        def watched(*args: Any) -> Any:
            answers = start(*args)
            rows.extend(answers.job.rows)
            return answers

        service.service.asking.start = watched  # type: ignore[method-assign]
        hook = service.service.served.model.register_forward_pre_hook(lambda *_: time.sleep(0.03))
        for stream in (False, True):
            body = json.dumps({"prompt": "a", "max_tokens": 240, "stream": stream}).encode()
            lines = ("Content-Type: application/json", f"Content-Length: {len(body)}")
            with socket.create_connection(("127.0.0.1", service.port)) as connection:
                connection.sendall(head("/v1/completions", *lines) + body)
                while not rows or not rows[-1].tokens:
                    time.sleep(0.01)
            end = time.monotonic() + 5
            while service.service.generator.taken and time.monotonic() < end:
                time.sleep(0.01)
            assert service.service.generator.taken == 0
            assert 0 < len(rows[-1].tokens) < 100
            rows.clear()
        hook.remove()
        assert metrics_of(client)["coachhook_cancelled_total"] == 2
        assert len(ask(client)["choices"]) == 1


def test_logs_tell_what_happened_and_nothing_of_what_was_said(running: Running) -> None:
    lines: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(JsonLines().format(record))

    handler, level = Kept(), LOGGER.level
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    try:
        with running.client() as client:
            ask(client, prompt="A word that is secret")
            client.post("/edits", json={"edits": [{"prompt": "secret", "subject": "Ann", "target_new": "secret"}]})
            client.post("/edits", json={"edits": FACTS[:1]})
            client.get("/edits/secret")
        with running.client("wrong-secret") as stranger:
            stranger.get("/edits")
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(level)
    told = [json.loads(line) for line in lines]
    requests = [line for line in told if line["event"] == "request"]
    assert [(line["route"], line["status"]) for line in requests] == [
        ("/v1/completions", 200), ("/edits", 422), ("/edits", 200), ("none", 404), ("none", 401),
    ]  # fmt: skip
    assert any(line["event"] == "edited" and line["edits"] == 1 for line in told)
    text = "\n".join(lines)
    for word in ("secret", TOKEN, str(FACTS[0]["subject"]), str(FACTS[0]["target_new"]), PROMPT):
        assert word not in text


def test_a_long_prompt_is_made_into_tokens_off_the_event_loop(tmp_path: Path) -> None:
    """/healthz is answered meanwhile."""
    with Running(tmp_path / "edits") as service, service.client() as client:
        go_on, tokenizer = threading.Event(), service.service.asking.tokenizer

        class Slow:
            def __getattr__(self, name: str) -> Any:
                return getattr(tokenizer, name)

            def __call__(self, text: str) -> Any:
                go_on.wait(10)
                return tokenizer(text)

        service.service.asking.tokenizer = Slow()
        codes: list[int] = []
        body = {"prompt": "a", "max_tokens": 1}
        asking = threading.Thread(target=lambda: codes.append(client.post("/v1/completions", json=body).status_code))
        asking.start()
        time.sleep(0.1)
        with service.client() as other:
            assert other.get("/healthz").status_code == 200
        assert codes == []
        go_on.set()
        asking.join()
        assert codes == [200]


def test_a_fault_of_the_service_is_told_without_its_words(
    running: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("a word of the request")

    monkeypatch.setattr(running.service.editing, "listed", broken)
    with running.client() as client:
        reply = client.get("/edits")
        assert (reply.status_code, reply.json()["error"]["code"]) == (500, "internal")
        assert reply.headers["cache-control"] == "no-store"
        assert "a word" not in reply.text
        monkeypatch.undo()
        assert client.get("/edits").status_code == 200
    assert "a word" not in caplog.text
