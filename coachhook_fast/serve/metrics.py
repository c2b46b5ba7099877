"""Counters and gauges in Prometheus' text format."""

from __future__ import annotations

import threading
from collections.abc import Mapping

HELP = {
    "coachhook_requests_total": ("counter", "Requests answered, by route and status."),
    "coachhook_request_seconds_sum": ("counter", "Seconds that requests took, by route."),
    "coachhook_request_seconds_count": ("counter", "Requests that were timed, by route."),
    "coachhook_prompt_tokens_total": ("counter", "Tokens of prompts that were answered."),
    "coachhook_generated_tokens_total": ("counter", "Tokens written."),
    "coachhook_batches_generated_total": ("counter", "Batches of answers."),
    "coachhook_cancelled_total": ("counter", "Answers that ended because their client had left."),
    "coachhook_gate_tokens_total": ("counter", "Tokens that a sample of passes showed a layer's gate."),
    "coachhook_gate_fired_total": ("counter", "Those of them where the edit fired."),
    "coachhook_edits": ("gauge", "Facts that are edited."),
    "coachhook_batches": ("gauge", "Batches in the ledger."),
    "coachhook_edit_seconds_sum": ("counter", "Seconds that batches of edits took."),
    "coachhook_waiting": ("gauge", "Requests that wait or run, by kind."),
    "coachhook_version_info": ("gauge", "1 for the version of the edits that is served."),
}


class Metrics:
    """Numbers by name and labels; any thread may add.

    metrics.add("coachhook_requests_total", route="/edits", status="200")
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[tuple[str, str], float] = {}

    def add(self, name: str, amount: float = 1.0, **labels: str) -> None:
        key = name, _labels(labels)
        with self._lock:
            self._values[key] = self._values.get(key, 0.0) + amount

    def text(self, gauges: Mapping[str, list[tuple[dict[str, str], float]]]) -> str:
        """All of it, with `gauges` as they are now: name -> (labels, value)s."""
        with self._lock:
            values = dict(self._values)
        for name, series in gauges.items():
            values |= {(name, _labels(labels)): value for labels, value in series}
        lines: list[str] = []
        for name, (kind, text) in HELP.items():
            found = [
                f"{name}{labels} {value:.10g}" for (other, labels), value in sorted(values.items()) if other == name
            ]
            if found:
                lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}", *found]
        return "\n".join(lines) + "\n"


def _labels(labels: Mapping[str, str]) -> str:
    def quoted(value: str) -> str:
        return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")

    return "{" + ",".join(f'{name}="{quoted(value)}"' for name, value in sorted(labels.items())) + "}" if labels else ""
