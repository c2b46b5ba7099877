"""The Markdown of the repository: lines fit, links lead somewhere, tables can be read, code runs."""

from __future__ import annotations

import re
import runpy
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import tiny_model, tiny_texts, tiny_tokenizer

import coachhook_fast
from coachhook_fast import EditConfig, Editor, EditRequest, EditWarning

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("docs", ".github")
PAGES = sorted([*ROOT.glob("*.md"), *(path for name in FOLDERS for path in (ROOT / name).rglob("*.md"))])
EXPERIMENTS = sorted(path for path in (ROOT / "docs" / "experiments").glob("*.md") if path.name != "index.md")
CODE = ("coachhook_fast", "csrc", "kernels", "tests", "bench", "examples", "make")
LONGEST = 160
HEAD = ("- Question: ", "- Commit: ", "- Result: ", "- Status: ")
# One number as we write it: 1 000, .987, 1.5e-6, −3, 12 %, ~2, × 1.04, with or without emphasis.
_NUMBER = r"[×~±<>≤≥−-]?\s?(?:\d{1,3}(?: \d{3})+|\d*\.?\d+)(?:e-?\d+)?\s?%?"
SEVERAL_NUMBERS = re.compile(rf"{_NUMBER}(?:(?:\s*[,;/]\s*|\s+(?:and|of)\s+){_NUMBER})+")
RUNS, NOT_RUN = "<!-- runs on a tiny model -->", "<!-- not run: "


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def lines_of(path: Path) -> Iterator[tuple[int, str, bool]]:
    """(number, line, whether it is code) of each line, fences among the code."""
    code = False
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        fence = line.lstrip().startswith("```")
        yield number, line, code or fence
        code ^= fence


def is_table(line: str) -> bool:
    return line.lstrip().startswith("|")


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_lines_of_prose_fit(path: Path) -> None:
    long = [number for number, line, code in lines_of(path) if not code and not is_table(line) and len(line) > LONGEST]
    assert long == [], f"lines of {name(path)} with more than {LONGEST} characters"


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", words).replace(" ", "-")


def anchors(path: Path) -> set[str]:
    return {slug(line.lstrip("#")) for _, line, code in lines_of(path) if not code and line.startswith("#")}


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_links_lead_somewhere(path: Path) -> None:
    wrong = []
    for number, line, code in lines_of(path):
        for target in [] if code else re.findall(r"\]\(([^)\s]+)\)", line):
            if re.match(r"[a-z]+:", target):
                continue
            file, _, anchor = target.partition("#")
            there = (path.parent / file).resolve() if file else path
            if not there.exists() or (anchor and anchor not in anchors(there)):
                wrong.append(f"{name(path)}:{number}: {target}")
    assert wrong == []


def test_documents_that_code_names_are_there() -> None:
    wrong = []
    kinds = {".py", ".cpp", ".h", ".cu", ".cuh", ".mk", ".toml", ".txt", ".yml"}
    sources = [path for folder in CODE for path in (ROOT / folder).rglob("*") if path.suffix in kinds]
    for path in [*sources, ROOT / "Makefile", ROOT / "CHANGELOG.md", ROOT / "pyproject.toml"]:
        for named in set(re.findall(r"\bdocs/[\w./-]+\.\w+", path.read_text(encoding="utf-8"))):
            if not (ROOT / named).exists():
                wrong.append(f"{name(path)} names {named}")
    assert wrong == []


@pytest.mark.parametrize("path", EXPERIMENTS, ids=name)
def test_experiments_say_first_what_came_of_them(path: Path) -> None:
    if path.name == "specificity.md":
        pytest.skip("its head is written with the study that goes on")
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ")
    assert lines[1] == lines[6] == ""
    assert [line[: len(head)] for line, head in zip(lines[2:6], HEAD, strict=True)] == list(HEAD)
    assert re.search(r"\b[0-9a-f]{7}\b", lines[3]), "no commit is named"
    assert f"({path.name})" in (path.parent / "index.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", [*EXPERIMENTS, *(ROOT / "docs").glob("*.md"), ROOT / "README.md"], ids=name)
def test_a_cell_holds_one_number(path: Path) -> None:
    crowded = []
    for number, line, code in lines_of(path):
        labelled = line.strip().strip("|").split("|") if is_table(line) and not code else []
        for cell in labelled[1:]:
            if SEVERAL_NUMBERS.fullmatch(cell.replace("*", "").strip()):
                crowded.append(f"{name(path)}:{number}: {cell.strip()}")
    assert crowded == []


def test_the_readme_is_about_ninety_lines() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 100


def test_the_picture_is_what_its_script_draws() -> None:
    figures = ROOT / "docs" / "figures"
    drawn = runpy.run_path(str(figures / "architecture.py"))["picture"]()
    assert drawn == (figures / "architecture.svg").read_text(encoding="utf-8")


def test_the_package_says_that_it_is_typed() -> None:
    assert (Path(coachhook_fast.__file__).parent / "py.typed").is_file()


# -------------------------------------------------------------------------------- code


def blocks(path: Path) -> Iterator[tuple[int, str, str]]:
    """(line, the line before, code) of each block of Python."""
    lines = path.read_text(encoding="utf-8").splitlines()
    for start, line in enumerate(lines):
        if line == "```python":
            end = lines.index("```", start)
            yield start + 1, lines[start - 1], "\n".join(lines[start + 1 : end])


BLOCKS = [(path, *block) for path in PAGES for block in blocks(path)]


def test_every_block_says_whether_it_runs() -> None:
    silent = [f"{name(path)}:{line}" for path, line, mark, _ in BLOCKS if mark != RUNS and not mark.startswith(NOT_RUN)]
    assert silent == []
    assert any(mark == RUNS for _, _, mark, _ in BLOCKS)


@pytest.fixture(scope="module")
def edited(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the pages suppose it: a corpus, held-out text, facts, and edit sets of the tiny model."""
    folder = tmp_path_factory.mktemp("docs")
    texts = tiny_texts(40)
    (folder / "corpus.txt").write_text("\n".join(texts))
    (folder / "held-out.txt").write_text("\n".join(texts[:8]))
    (folder / "examples").mkdir()
    shutil.copy(ROOT / "examples" / "facts.jsonl", folder / "examples" / "facts.jsonl")
    editor = Editor(tiny_model("llama"), tiny_tokenizer(), EditConfig(v_num_grad_steps=2))
    editor.collect_statistics(texts, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EditWarning)
        editor.edit([EditRequest(prompt="{} works as a", subject="Ines Quill", target_new="pilot")], progress=False)
    for part in ("edits", "edits/shared", "edits/acme", "edits/globex"):
        editor.save_pretrained(folder / part)
    return folder


@pytest.mark.parametrize(
    ("path", "line", "code"),
    [(path, line, code) for path, line, mark, code in BLOCKS if mark == RUNS],
    ids=lambda value: name(value) if isinstance(value, Path) else str(value) if isinstance(value, int) else "",
)
def test_code_runs(
    path: Path, line: int, code: str, edited: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "work"
    shutil.copytree(edited, folder)
    if "save_pretrained" in code and 'edits="edits/"' not in code:  # a folder is made, and not gone on from
        shutil.rmtree(folder / "edits")
    monkeypatch.chdir(folder)
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    monkeypatch.setattr(coachhook_fast, "load_model", lambda _: (model, tokenizer), raising=False)
    prompts = {"input_ids": torch.tensor([tokenizer("By trade, Ines Quill is a")["input_ids"]])}
    two_rows = {"input_ids": prompts["input_ids"].expand(2, -1)}
    names: dict[str, Any] = {
        "model": model, "tokenizer": tokenizer, "inputs": prompts, "two_rows": two_rows,
        "batch": {"input_ids": prompts["input_ids"].expand(4, -1)},
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EditWarning)  # a random model: edits need not go in
        exec(compile(code, f"{path}:{line}", "exec"), names)


# -------------------------------------------------------------------------------- what the project says of itself


def test_the_workflow_calls_targets_that_are_there() -> None:
    rules = "\n".join(path.read_text(encoding="utf-8") for path in [ROOT / "Makefile", *(ROOT / "make").glob("*.mk")])
    called = {
        target
        for path in [*(ROOT / ".github" / "workflows").glob("*.yml"), ROOT / ".ci" / "run", ROOT / "CONTRIBUTING.md"]
        for target in re.findall(r"\bmake ([a-z][a-z-]+)", path.read_text(encoding="utf-8"))
        if target != "targets"
    }
    assert called
    assert [target for target in sorted(called) if not re.search(rf"^{target}:", rules, re.M)] == []


def test_the_citation_names_the_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(citation["version"]) == coachhook_fast.__version__


def test_every_page_of_the_site_is_in_its_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r"[\w./-]+\.md", text))
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert pages == listed
