"""What several verbs share: arguments, loading, and the report that `main` prints."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coachhook_fast import files
from coachhook_fast.limits import MOST_LAYERS, check_bounds
from coachhook_fast.printable import one_line

if TYPE_CHECKING:
    from rich.console import Console

    from coachhook_fast.config import EditConfig
    from coachhook_fast.evaluate.datasets import EditRecord

MODEL_HELP = "hub name, local folder, GGUF file, or smollm2 for the packaged SmolLM2-135M"
_PIPE_WIDTH = 120  # columns of a table where stdout is no terminal


@dataclass(frozen=True)
class Report:
    """A verb's result: `data` for --json, `show` for people, and the exit code."""

    data: Any
    show: Callable[[Console], None]
    code: int = 0


def console() -> Console:
    """Where tables go: stdout."""
    from coachhook_fast.cli import terminal

    return terminal.console(_PIPE_WIDTH)


def note(message: str) -> None:
    """A line for the person who waits."""
    print(one_line(message), file=sys.stderr)


# -------------------------------------------------------------------- arguments


def positive(text: str) -> int:
    """argparse type: an integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return value


def names(text: str) -> list[str]:
    """argparse type: words between commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def add_model(parser: argparse.ArgumentParser, *, dtype: bool = True) -> None:
    parser.add_argument("--model", required=True, metavar="M", help=MODEL_HELP)
    if dtype:
        parser.add_argument("--dtype", metavar="T", help="float32, bfloat16 or float16 (default: the checkpoint's)")
    parser.add_argument(
        "--device",
        metavar="D",
        help="cpu, cuda, cuda:1 ..., or auto: over all there is (default: the GPU where there is one)",
    )


def add_facts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--facts", required=True, type=Path, metavar="FILE", help="CounterFact, ZsRE or our JSONL, told by its fields"
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="use only the first N facts")
    parser.add_argument(
        "--skip-invalid", action="store_true", help="leave out facts that are no valid edit, and count them"
    )


def folder(text: str) -> Path:
    """argparse type: a folder's name, which the empty text is not."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"must name a folder, got {text!r}")
    return Path(text)


def edits_folder(text: str) -> Path:
    """argparse type: the folder of an edit set, that of the hub's repository downloaded."""
    from coachhook_fast.edits.hub import HUB, local_folder

    if not text.startswith(HUB):
        return folder(text)
    try:
        return local_folder(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_edits(parser: argparse.ArgumentParser, *, required: bool, hub: bool = True) -> None:
    parser.add_argument(
        "--edits",
        required=required,
        type=edits_folder if hub else folder,
        metavar="DIR",
        help="folder of a saved edit set" + (", or hf:OWNER/NAME[@REVISION] of the hub" if hub else ""),
    )


def add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, metavar="YAML", help="settings: our names, or an EasyEdit hparams file")
    parser.add_argument("--layers", metavar="A,B,..", help="blocks to edit, for example 4,5,6 or 4-8")
    parser.add_argument("--gate", choices=("calibrated", "sequence"), help="who decides where edits fire")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any other setting of EditConfig; may repeat"
    )


# -------------------------------------------------------------------- loading


def load_model(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """(model, tokenizer) of --model, --dtype, --device."""
    from transformers.utils import logging

    from coachhook_fast.models.loading import load_model as load

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    note(f"loading {arguments.model}")
    return load(arguments.model, dtype=arguments.dtype, device=arguments.device)


def load_records(arguments: argparse.Namespace) -> tuple[list[EditRecord], list[str]]:
    """Records of --facts, and why others were left out."""
    from coachhook_fast.evaluate.datasets import read_records

    files.check_readable(arguments.facts, most=files.MOST_FACTS)
    skipped: list[str] = []
    try:
        records = read_records(
            arguments.facts,
            kinds=getattr(arguments, "kinds", None),
            limit=arguments.limit,
            skipped=skipped if arguments.skip_invalid else None,
        )
    except RecursionError:
        raise ValueError(f"{arguments.facts} is nested too deeply") from None
    if skipped:
        note(f"left out {len(skipped)} facts that are no valid edit, the first: {skipped[0]}")
    if not records:
        raise ValueError(f"{arguments.facts} holds no valid edit")
    return records, skipped


def load_config(arguments: argparse.Namespace, *, edits: Path | None = None) -> EditConfig:
    """Settings of --config, --layers, --gate and --set, later ones first; of `edits` where none are given."""
    import yaml

    from coachhook_fast.config import EditConfig, current_names, number_in, read_yaml
    from coachhook_fast.edits.manifest import read_manifest

    values: dict[str, Any] = {}
    if edits is not None:
        values = EditConfig.from_saved(read_manifest(edits)["config"]).to_dict()
    try:
        if arguments.config is not None:
            values |= read_yaml(arguments.config)
        if arguments.layers is not None:
            values["layers"] = _layers(arguments.layers)
        if arguments.gate is not None:
            values["gate"] = arguments.gate
        given: dict[str, Any] = {}
        for setting in arguments.set:
            key, equals, value = setting.partition("=")
            if not equals:
                raise ValueError(f"--set must be KEY=VALUE, got {setting!r}")
            given[key.strip()] = number_in(yaml.safe_load(value))
        config = EditConfig.from_dict(values | current_names(given))
        check_bounds(config)
        return config
    except (TypeError, yaml.YAMLError) as error:
        raise ValueError(str(error)) from error
    except RecursionError:
        raise ValueError(f"settings of {arguments.config or '--set'} are nested too deeply") from None


def _layers(text: str) -> tuple[int, ...]:
    """Reads 4,5,6 or 4-8 or both mixed."""
    layers: list[int] = []
    try:
        for part in names(text):
            first, dash, last = part.partition("-")
            start, end = int(first), int(last if dash else first)
            if end >= MOST_LAYERS:
                raise ValueError
            layers += range(start, end + 1)
    except ValueError:
        raise ValueError(
            f"--layers must be block numbers under {MOST_LAYERS} such as 4,5,6 or 4-8, got {text[:200]!r}"
        ) from None
    return tuple(layers)
