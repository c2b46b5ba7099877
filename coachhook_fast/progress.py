"""One progress bar for all long work, on stderr so that stdout stays for results."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class Bar:
    """Advances a bar; does nothing where progress is off."""

    def __init__(self, progress: object = None, task: object = None) -> None:
        self._progress, self._task = progress, task

    def advance(self, steps: float, note: str = "") -> None:
        if self._progress is not None:
            self._progress.update(self._task, advance=steps, note=note)  # type: ignore[attr-defined]


@contextmanager
def track(title: str, total: float | None, unit: str, enabled: bool = True) -> Iterator[Bar]:
    """A bar titled `title` over `total` steps (None: unknown) with its rate in `unit`/s."""
    if not enabled:
        yield Bar()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            # Over the whole run: steps that come in bursts say nothing over rich's short window.
            rate = task.completed / task.elapsed if task.elapsed else 0.0
            return Text(f"{rate:,.1f} {unit}/s" if rate else f"- {unit}/s")

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,.0f}"), Rate())
    with Progress(
        *columns, TimeElapsedColumn(), TextColumn("{task.fields[note]}"), console=Console(file=sys.stderr)
    ) as bar:
        yield Bar(bar, bar.add_task(title, total=total, note=""))
