"""`coachhook doctor`: what is installed here, what runs, and what is slow and why."""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coachhook_fast.cli.common import Report

if TYPE_CHECKING:
    from rich.console import Console

NAME = "doctor"
HELP = "Print versions, the C++ extension, GPUs and caches of this installation, and what is slow here and why."
EXAMPLES = """examples:
  coachhook doctor
  coachhook doctor --json

Loads no model and changes nothing. A bug report is the better for its output.
"""

_PACKAGES = ("coachhook-fast", "torch", "transformers", "triton", "vllm", "numpy", "safetensors", "accelerate", "gguf")
_BUILD = "install GCC >= 12 or clang, and CMake >= 3.19, then `pip install --no-build-isolation` anew"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb has none of its own."""


def run(arguments: argparse.Namespace) -> Report:
    versions = _versions()
    machine, extension, gpu, caches = _machine(), _extension(), _gpu(), _caches()
    data = {
        "versions": versions,
        "not_in_range": _not_in_range(),
        "machine": machine,
        "extension": extension,
        "gpu": gpu,
        "caches": caches,
        "slow": slow_parts(versions, machine, extension, gpu, caches),
    }
    return Report(data, lambda console: _show(console, data))


# -------------------------------------------------------------------- what there is


def _versions() -> dict[str, str | None]:
    """By package name; None where it is not installed."""
    found: dict[str, str | None] = {"Python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def _not_in_range() -> list[str]:
    """Requirements of the package that what is installed does not meet, such as "transformers>=5.17,<6: 4.9.0"."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires("coachhook-fast") or []
    except metadata.PackageNotFoundError:  # on the path, and not installed
        return []
    wrong = []
    for requirement in map(Requirement, lines):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            version = "not installed"
        if version == "not installed" or not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name}{requirement.specifier}: {version}")
    return wrong


def _machine() -> dict[str, Any]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": cores,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "onednn": torch.backends.mkldnn.is_available(),
    }


def _extension() -> dict[str, Any]:
    from coachhook_fast.ops import build_info
    from coachhook_fast.ops._library import EXTENSION

    info = build_info()
    loaded = bool(info.pop("extension"))
    return {"loaded": loaded, "file": getattr(EXTENSION, "__file__", None), **info}


def _gpu() -> dict[str, Any]:
    import torch

    devices = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(index)
            devices.append(
                {"name": found.name, "capability": f"{found.major}.{found.minor}", "bytes": found.total_memory}
            )
    return {"torch_cuda": torch.version.cuda, "devices": devices}


def _caches() -> dict[str, Any]:
    from coachhook_fast.models.loading import cache_dir

    folder = cache_dir()
    parts = sorted(folder.iterdir()) if folder.is_dir() and os.access(folder, os.R_OK | os.X_OK) else []
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return {
        "folder": str(folder),
        "from": "COACHHOOK_CACHE" if os.environ.get("COACHHOOK_CACHE") else "default",
        "writable": nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK),
        "parts": [{"name": part.name, "bytes": _size(part)} for part in parts],
    }


def _size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder; links count as themselves, what goes away meanwhile not at all."""
    files = [path]
    if path.is_dir() and not path.is_symlink():
        files = [Path(folder, name) for folder, _, names in os.walk(path) for name in names]
    size = 0
    for file in files:
        with contextlib.suppress(FileNotFoundError):
            size += file.lstat().st_size
    return size


# -------------------------------------------------------------------- what is slow


def slow_parts(
    versions: dict[str, str | None],
    machine: dict[str, Any],
    extension: dict[str, Any],
    gpu: dict[str, Any],
    caches: dict[str, Any],
) -> list[str]:
    """A line for each part that runs slower here than it could: which, why, and what helps."""
    lines = []
    if not extension["loaded"]:
        lines.append(
            "solver, gated projection and packed target values run their plain torch definitions, for the C++ "
            f"extension is not loaded ({extension['reason']}): {_BUILD}"
        )
    if machine["threads"] < (machine["cores"] or 1):
        lines.append(
            f"torch uses {machine['threads']} of {machine['cores']} cores: OMP_NUM_THREADS or torch.set_num_threads"
        )
    if not machine["onednn"]:
        lines.append("the editor's fp32 products stay with MKL: this torch has no oneDNN")
    if not str(machine["cpu_capability"]).startswith(("AVX512", "SVE")):
        lines.append(f"C++ kernels run without AVX-512: the CPU offers {machine['cpu_capability']}")
    if not gpu["devices"]:
        why = "torch finds none" if gpu["torch_cuda"] else "this torch is a build without CUDA"
        lines.append(f"models run on the CPU: no GPU ({why})")
    else:
        if versions["triton"] is None:
            lines.append("hooked projections run the plain definition on the GPU: Triton is not installed")
        if extension["loaded"] and not extension.get("cuda"):
            lines.append(
                "on the GPU up to 16 tokens go through Triton, later calls are launched from Python, and the solver's "
                "small factors are cuSOLVER's: the extension has no CUDA parts (nvcc of torch's version and CMake >= "
                "3.26 build them)"
            )
    if _before(versions["transformers"], (5, 24)):
        lines.append("GPT-J's target values stay padded: transformers before 5.24 calls its attention directly")
    if not caches["writable"]:
        lines.append(
            f"statistics, target values and base answers are computed anew in every run: {caches['folder']} cannot be "
            "written (COACHHOOK_CACHE names another folder)"
        )
    return lines


def _before(version: str | None, least: tuple[int, int]) -> bool:
    from packaging.version import Version

    return version is not None and Version(version).release < least


# -------------------------------------------------------------------- for people


def _show(console: Console, data: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, version in data["versions"].items():
        table.add_row(name, version or "not installed")
    for line in data["not_in_range"]:
        table.add_row("not in range", line)
    machine = data["machine"]
    table.add_row("machine", f"{machine['platform']}, {machine['cpu_capability']}, {machine['threads']} threads")
    table.add_row("extension", _extension_line(data["extension"]))
    cuda = "with CUDA parts" if data["extension"].get("cuda") else "without CUDA parts in the extension"
    for device in data["gpu"]["devices"]:
        table.add_row("GPU", f"{device['name']}, {device['capability']}, {_human(device['bytes'])}, {cuda}")
    if not data["gpu"]["devices"]:
        table.add_row("GPU", f"none; torch's CUDA: {data['gpu']['torch_cuda'] or 'not built in'}")
    caches = data["caches"]
    table.add_row("caches", f"{caches['folder']} ({caches['from']}), {'' if caches['writable'] else 'not '}writable")
    for part in caches["parts"]:
        table.add_row("", f"{part['name']}: {_human(part['bytes'])}")
    table.add_row("executable", sys.executable)
    console.print(table)
    console.print("slow here:" if data["slow"] else "nothing is slower here than it could be")
    for line in data["slow"]:
        console.print(f"- {line}", soft_wrap=True)


def _extension_line(extension: dict[str, Any]) -> str:
    if not extension["loaded"]:
        return f"not loaded: {extension['reason']}"
    built = ", ".join(f"{name} {value}" for name, value in extension.items() if name not in ("loaded", "file"))
    return f"{extension['file']} ({built})"


def _human(size: int) -> str:
    """Bytes as a person reads them: 1.5 MB."""
    units, amount = ["B", "kB", "MB", "GB", "TB"], float(size)
    while amount >= 1000 and len(units) > 1:
        amount /= 1000
        del units[0]
    return f"{amount:.0f} {units[0]}" if units[0] == "B" or amount >= 100 else f"{amount:.1f} {units[0]}"
