"""`coachhook serve`: a service that answers, takes edits and shows them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from coachhook_fast import files
from coachhook_fast.cli import common
from coachhook_fast.cli.common import Report

if TYPE_CHECKING:
    from rich.console import Console

NAME = "serve"
HELP = "Serve a model over HTTP: OpenAI's API, edits while it runs, and a page that shows them."
EXAMPLES = """examples:
  coachhook serve --model smollm2 --edits edits/                    # http://127.0.0.1:8000, this machine only
  coachhook serve --model smollm2 --edits edits/ --host 0.0.0.0 --token-file token
  coachhook serve --model smollm2 --edits edits/ --adapter acme=edits/acme --adapter globex=edits/globex

Models by name: base, default (what POST /edits changes), and each adapter. --edits need not exist yet. SIGTERM ends
the service when what runs has ended. See docs/serving.md; the service needs pip install 'coachhook-fast[serve]'.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model(parser)
    common.add_edits(parser, required=True)
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="another edit set, served as model NAME; may repeat",
    )
    parser.add_argument("--host", default="127.0.0.1", metavar="H", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, metavar="P", help="default 8000; 0 takes a free one")
    parser.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="the bearer token that requests must bring, one line; needed for a --host that others can reach",
    )
    parser.add_argument(
        "--max-tokens", type=common.positive, default=1024, metavar="N", help="of one answer (default 1024)"
    )
    parser.add_argument(
        "--max-waiting", type=common.positive, default=256, metavar="N", help="completions in the queue (default 256)"
    )
    parser.add_argument("--corpus", type=Path, metavar="FILE", help="text for the key statistics (see coachhook stats)")
    common.add_config(parser)


def run(arguments: argparse.Namespace) -> Report:
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed: pip install 'coachhook-fast[serve]'") from error
    from coachhook_fast.edits.manifest import stands_in
    from coachhook_fast.serve.auth import check_bind, read_token
    from coachhook_fast.serve.limits import Limits

    token = None if arguments.token_file is None else read_token(arguments.token_file)
    check_bind(arguments.host, token)
    if not 0 <= arguments.port < 65536:
        raise ValueError(f"--port must be 0 to 65535, got {arguments.port}")
    adapters = adapters_in(arguments.adapter)
    if arguments.corpus is not None:
        files.check_readable(arguments.corpus, most=2**63)
    limits = Limits(new_tokens=arguments.max_tokens, generating=arguments.max_waiting)
    config = common.load_config(arguments, edits=arguments.edits if stands_in(arguments.edits) else None)
    model, tokenizer = common.load_model(arguments)
    from coachhook_fast.serve import logs
    from coachhook_fast.serve.app import Service
    from coachhook_fast.serve.server import listen, make_server

    with listen(arguments.host, arguments.port) as listener:  # before the work: a taken port is told at once
        service = Service(
            model, tokenizer, arguments.edits, token=token, config=config, adapters=adapters,
            corpus=arguments.corpus, limits=limits,
        )  # fmt: skip
        port = listener.getsockname()[1]
        host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
        common.note(f"serving {', '.join(service.served.names)} on http://{host}:{port}")
        logs.set_up()
        make_server(service).run(sockets=[listener])
    data = {"served": list(service.served.names), "version": service.editing.version}

    def show(console: Console) -> None:
        console.print(f"stopped; the edits are in {arguments.edits}", markup=False, soft_wrap=True)

    return Report(data, show)


def adapters_in(given: list[str]) -> dict[str, Path]:
    """Folders by name, of NAME=DIR; ValueError where one is not written so, or a name is there twice."""
    found: dict[str, Path] = {}
    for each in given:
        name, equals, folder = each.partition("=")
        if not equals or not name or not folder:
            raise ValueError(f"--adapter must be NAME=DIR, got {each!r}")
        if name in found:
            raise ValueError(f"--adapter {name} is there twice")
        if not Path(folder).is_dir():
            raise ValueError(f"--adapter {name}: {folder} is no folder")
        found[name] = Path(folder)
    return found
