"""What a user meets first, timed (make wheel-test): first_edit.py install WHEEL | check | edit."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path


def size_of(folder: Path) -> float:
    """MB of a folder's files."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def install(wheel: str) -> None:
    packages = next(Path(sys.prefix, "lib").glob("python*")) / "site-packages"
    before, start = size_of(packages), time.monotonic()
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", wheel], check=True)
    seconds = time.monotonic() - start
    used = resource.getrusage(resource.RUSAGE_CHILDREN)  # on a busy machine the seconds say little
    cpu = used.ru_utime + used.ru_stime
    own, added = size_of(packages / "coachhook_fast"), size_of(packages) - before
    print(f"{seconds:.1f} s ({cpu:.1f} s of CPU), {added:.1f} MB beside torch, {own:.1f} MB of it the package's own")


def check() -> None:
    """Fails where the package is not the installed one, or runs without its extension."""
    import coachhook_fast
    from coachhook_fast.ops import build_info

    assert Path(coachhook_fast.__file__).is_relative_to(sys.prefix), coachhook_fast.__file__
    info = build_info()
    print(json.dumps({"version": coachhook_fast.__version__, **info}))
    assert info["extension"], info


def edit() -> None:
    times = [time.monotonic()]
    from coachhook_fast import Editor, EditRequest, load_model
    from coachhook_fast.ops import build_info as build_info  # torch and the extension are imported here

    times.append(time.monotonic())
    model, tokenizer = load_model("smollm2")
    times.append(time.monotonic())
    editor = Editor(model, tokenizer)
    editor.collect_statistics(max_tokens=4_096, progress=False)  # as examples/demo.py
    times.append(time.monotonic())
    batch = editor.edit([EditRequest("{} works as a", "Ada Vale", "pilot")], progress=False)
    times.append(time.monotonic())
    names = ("import", "load the model", "statistics", "edit")
    parts = [f"{name} {after - before:.1f} s" for name, before, after in zip(names, times, times[1:], strict=False)]
    print(f"first edit after {times[-1] - times[0]:.1f} s ({time.process_time():.1f} s of CPU):", ", ".join(parts))
    assert batch.outcomes[0].said, batch.outcomes[0]


if __name__ == "__main__":
    {"install": install, "check": check, "edit": edit}[sys.argv[1]](*sys.argv[2:])
