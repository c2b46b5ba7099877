"""Logs: a JSON object a line, on stderr, without prompts, answers, subjects or secrets.

Of an error only its type and the places in the code are written: its words may quote a request.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
import warnings
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TextIO

from coachhook_fast.printable import one_line

LOGGER = logging.getLogger("coachhook.serve")
_MOST_FRAMES = 12


def log(event: str, level: int = logging.INFO, **fields: Any) -> None:
    """One line; `fields` must hold nothing of what clients wrote.

    log("edit", batch=batch.id, edits=3, seconds=12.5)
    """
    LOGGER.log(level, event, extra={"fields": fields})


def log_error(event: str, error: BaseException, **fields: Any) -> None:
    """One line with the error's type and where it came from."""
    log(event, logging.ERROR, error=type(error).__name__, at=places_of(error), **fields)


def places_of(error: BaseException) -> list[str]:
    """file:line of the frames that an error passed, the innermost last."""
    frames = traceback.extract_tb(error.__traceback__)[-_MOST_FRAMES:]
    return [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames]


class JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        ours = record.name == LOGGER.name
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage() if ours else "server",
        }
        if not ours:  # uvicorn's own words, which quote nothing
            line["message"] = one_line(record.getMessage(), most=200)
        line |= getattr(record, "fields", {})
        if record.exc_info and record.exc_info[1] is not None:
            line |= {"error": type(record.exc_info[1]).__name__, "at": places_of(record.exc_info[1])}
        return json.dumps(line)


def set_up() -> None:
    """Sends our lines, uvicorn's and the kinds of warnings to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name, level in ((LOGGER.name, logging.INFO), ("uvicorn.error", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
    warnings.showwarning = _warned


def _warned(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    del message, file, line  # a warning's words may quote an edit
    log("warning", logging.WARNING, kind=category.__name__, at=[f"{Path(filename).name}:{lineno}"])
