"""`coachhook`: the command line. One module a verb; heavy imports happen inside the verbs, so `--help` is quick.

Results go to stdout, as tables or, with `--json`, as JSON alone; progress and warnings go to stderr. The exit code is
0, 1 where `verify-vllm` finds a difference, `check` a fact that is not said, or `export` that too much would be lost, 2
for bad input (one line on stderr says which), or 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

from coachhook_fast.cli import (
    bench,
    check,
    doctor,
    edit,
    evaluate,
    export,
    generate,
    inspect,
    log,
    profile,
    rollback,
    serve,
    stats,
    verify_edits,
    verify_vllm,
)
from coachhook_fast.cli.common import console
from coachhook_fast.printable import one_line

VERBS = (
    stats, edit, evaluate, check, generate, inspect, log, rollback, export, serve, profile, bench, verify_edits,
    verify_vllm, doctor,
)  # fmt: skip

_DESCRIPTION = "Edit facts in a language model, in consecutive batches, without touching a base weight."
_EXAMPLES = """examples:
  coachhook edit --model smollm2 --facts examples/facts.jsonl --batch-size 8 --out edits/
  coachhook eval --model smollm2 --edits edits/ --facts examples/facts.jsonl
  coachhook generate --model smollm2 --edits edits/ "The Eiffel Tower is located in the city of"
  coachhook inspect --model smollm2 --edits edits/ "The Eiffel Tower is located in the city of"
  coachhook log --edits edits/

Every verb explains itself: coachhook VERB --help
"""


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {one_line(message)} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="coachhook",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb in VERBS:
        one = verbs.add_parser(
            verb.NAME,
            help=verb.HELP,
            description=verb.HELP,
            epilog=verb.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        verb.add_arguments(one)
        one.add_argument("--json", action="store_true", help="print JSON alone on stdout")
        one.set_defaults(run=verb.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    arguments = build_parser().parse_args(argv)
    try:
        # Nothing that runs meanwhile, ours or a library's, can mix with the result on stdout.
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.showwarning = _show_warning
            report = arguments.run(arguments)
        if arguments.json:
            print(json.dumps(report.data, indent=1, allow_nan=False))
        else:
            report.show(console())
        sys.stdout.flush()
        return report.code
    except KeyboardInterrupt:
        print(f"coachhook {arguments.verb}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe left; that is its right
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        print(f"coachhook {arguments.verb}: error: {one_line(error)}", file=sys.stderr)
        return 2
    except RecursionError:
        print(f"coachhook {arguments.verb}: error: its input is nested too deeply", file=sys.stderr)
        return 2
    return 0


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"coachhook: warning: {one_line(message)}", file=sys.stderr)
