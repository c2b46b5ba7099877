"""The page: from the package alone, nothing as markup, and what it does, under Node and in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from serve_cases import FACTS, PROMPT, TOKEN, Running

from coachhook_fast.serve import page

pytestmark = pytest.mark.filterwarnings("ignore::coachhook_fast.EditWarning")
FOLDER = Path(page.__file__).with_name("page")
HTML, CSS, SCRIPT = ((FOLDER / name).read_text() for name in ("index.html", "page.css", "page.js"))
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EVIL = "<img src=x onerror=document.title='broken'>"


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(HTML)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with Running(tmp_path_factory.mktemp("page") / "edits", token=None) as service:
        yield service


def test_the_page_is_served_with_a_policy(running: Running) -> None:
    with running.client() as client:
        for path, kind, text in (
            ("/", "text/html", HTML),
            ("/page.css", "text/css", CSS),
            ("/page.js", "text/javascript", SCRIPT),
        ):
            reply = client.get(path)
            assert reply.status_code == 200
            assert reply.text == text
            assert reply.headers["content-type"].startswith(kind)
            assert reply.headers["x-content-type-options"] == "nosniff"
            policy = dict(part.strip().split(" ", 1) for part in reply.headers["content-security-policy"].split(";"))
            assert policy["default-src"] == policy["frame-ancestors"] == policy["form-action"] == "'none'"
            assert {policy[name] for name in ("script-src", "style-src", "connect-src")} == {"'self'"}


def test_nothing_is_markup_and_nothing_comes_from_elsewhere() -> None:
    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "Function(",
        "DOMParser",
        ".cssText",
    ):
        assert word not in SCRIPT
    assert not re.search(r"(https?:)?//[a-z]", HTML + CSS + re.sub(r"^\s*//.*$", "", SCRIPT, flags=re.M))
    assert "@import" not in CSS
    assert "url(" not in CSS
    for tag, attributes in Tags().found:
        assert not any(name.startswith("on") or name == "style" for name in attributes), tag
        assert tag != "style"
        assert tag != "script" or attributes.get("src") == "/page.js"


def test_every_field_has_a_label_and_every_name_is_there() -> None:
    tags = Tags().found
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'\$\("([\w-]+)"\)', SCRIPT)) <= set(ids)
    assert HTML.count("<label>") == sum(tag in ("input", "textarea", "select") for tag, _ in tags)
    assert 'lang="en"' in HTML
    assert 'name="viewport"' in HTML
    assert 'role="status"' in HTML
    for need in ("prefers-color-scheme: dark", "max-width: 40rem", ":focus-visible"):
        assert need in CSS


def shown(running: Running, *steps: list[str]) -> list[Any]:
    """The document at each "show"."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    script = Path(__file__).parents[1] / "helpers" / "page_in_node.js"
    done = subprocess.run(
        [node, str(script), running.address, str(FOLDER), json.dumps(steps)],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def text(element: Any) -> str:
    return str(element.get("text", "")) + "".join(text(child) for child in element.get("children", []))


def rows(shown: Any, name: str) -> list[list[str]]:
    return [[text(cell) for cell in row["children"]] for row in shown["ids"][name].get("children", [])]


def test_the_page_adds_searches_asks_looks_and_undoes(running: Running) -> None:
    fact = FACTS[0]
    filled = str(fact["prompt"]).replace("{}", str(fact["subject"]))
    fields = {"prompt": "prompt", "subject": "subject", "target": "target_new"}
    typed = [["type", name, str(fact[field])] for name, field in fields.items()]
    typed.append(["type", "questions", f"{PROMPT}\n\n"])
    before, tried, added, found, none, looked, undone = shown(
        running,
        ["show"], *typed, ["click", "preview"], ["show"], ["submit", "add"], ["show"],
        ["type", "search", str(fact["subject"]).upper()], ["show"], ["type", "search", "nobody"], ["show"],
        ["type", "search", ""], ["key", "", "/"], ["click", "theme"], ["type", "question", filled], ["submit", "ask"],
        ["type", "looked", filled], ["submit", "look"], ["show"],
        ["press", "ledger", "Undo"], ["press", "ledger", "Undo"], ["show"],
    )  # fmt: skip
    assert rows(before, "ledger") == []
    assert [text(option) for option in before["ids"]["left"]["children"]] == ["base", "default"]
    assert [row[:2] for row in rows(tried, "answers")] == [["prompt", filled], ["question", PROMPT]]
    assert "nothing was changed" in tried["ids"]["status"]["text"]
    assert rows(tried, "ledger") == []
    assert rows(added, "ledger")[0][:2] == [filled, fact["target_new"]]
    assert added["ids"]["previewed"]["hidden"]
    assert len(rows(found, "ledger")) == 1
    assert rows(none, "ledger") == []
    assert looked["focused"] == "search"
    assert looked["theme"] == "dark"
    assert text(looked["ids"]["left-answer"]) not in ("", "…")
    gate = looked["ids"]["gate"]["children"]
    assert [text(cell) for cell in gate[0]["children"]] == ["token", "layer 1", "layer 2"]
    assert "".join(text(row["children"][0]) for row in gate[1:]).replace("·", " ") == filled
    fired = [cell for row in gate[1:] for cell in row["children"][1:] if cell.get("className") == "fires"]
    assert fired
    assert all(text(cell).startswith("● ") and cell["styles"]["--level"] > 0.4 for cell in fired)
    assert rows(undone, "ledger") == []
    assert text(undone["ids"]["version"]) == "base"
    with running.client() as client:
        assert client.get("/edits").json()["batches"] == []


def test_evil_text_is_text(running: Running) -> None:
    """Markup stays as it is written, what turns text around is an escape."""
    with running.client() as client:
        fact = {"prompt": f"{EVIL} {{}} is \u202eevil", "subject": "Ann\u0000", "target_new": "<b>red</b>"}
        made = client.post("/edits", json={"edits": [fact]}).json()
        (page,) = shown(running, ["show"])
        row = rows(page, "ledger")[0]
        assert row[0] == f"{EVIL} Ann\\u0000 is \\u202eevil"
        assert row[1] == "<b>red</b>"
        client.post(f"/edits/{made['id']}/rollback")


def test_a_single_fact_is_removed(running: Running) -> None:
    with running.client() as client:
        made = client.post("/edits", json={"edits": FACTS[:2]}).json()
        before, asked, after = shown(
            running, ["show"], ["press", "ledger", "Remove"], ["show"], ["press", "ledger", "Remove"], ["show"]
        )
        assert len(rows(before, "ledger")) == len(rows(asked, "ledger")) == 2
        assert [row[0] for row in rows(after, "ledger")] == [made["edits"][1]["text"]]
        client.post(f"/edits/{made['id']}/rollback")


def test_a_stranger_sees_no_fact_before_the_token(tmp_path: Path) -> None:
    with Running(tmp_path / "edits") as service:
        with service.client() as client:
            client.post("/edits", json={"edits": FACTS[:1]})
        refused, entered = shown(service, ["show"], ["type", "token", TOKEN], ["submit", "enter"], ["show"])
    assert rows(refused, "ledger") == []
    assert not refused["ids"]["enter"].get("hidden")
    assert "token" in refused["ids"]["status"]["text"]
    assert len(rows(entered, "ledger")) == 1
    assert entered["ids"]["enter"]["hidden"]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
@pytest.mark.parametrize("size", ["1280,900", "390,844"])
def test_a_browser_shows_the_facts_and_obeys_none_of_their_markup(running: Running, tmp_path: Path, size: str) -> None:
    assert BROWSER is not None
    with running.client() as client:
        made = client.post(
            "/edits", json={"edits": [{"prompt": f"{EVIL} {{}} is", "subject": "Ann", "target_new": "red"}]}
        )
        options = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path}",
            f"--window-size={size}",
        ]
        done = subprocess.run(
            [BROWSER, *options, "--virtual-time-budget=10000", "--dump-dom", f"{running.address}/"],
            capture_output=True, text=True, timeout=200,
        )  # fmt: skip
        client.post(f"/edits/{made.json()['id']}/rollback")
    assert "&lt;img src=x onerror=document.title='broken'&gt; Ann is" in done.stdout
    assert "<title>coachhook: edited facts</title>" in done.stdout
    assert "<img" not in done.stdout


def test_the_page_is_in_the_package() -> None:
    """Its folder is no package of its own: the pattern that installs it names it."""
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    patterns = re.search(r'\[tool\.setuptools\.package-data\]\n"\*" = (\[.*\])', text)
    assert patterns is not None
    found = {path.name for pattern in json.loads(patterns[1]) for path in FOLDER.parent.glob(pattern)}
    assert {"index.html", "page.css", "page.js"} <= found
