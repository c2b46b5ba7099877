"""A service that answers prompts and takes edits while it runs.

    pip install 'coachhook-fast[serve]'
    COACHHOOK_TOKEN=secret python examples/serve_fastapi.py --model smollm2 --edits edits/

    curl -H 'Authorization: Bearer secret' -H 'Content-Type: application/json' localhost:8000/v1/completions \\
        -d '{"prompt": "The Eiffel Tower is located in the city of", "max_tokens": 8}'
    curl … localhost:8000/edits -d '{"edits": [{"prompt": "The {} is located in the city of",
        "subject": "Eiffel Tower", "target_new": "Rome"}]}'

An editor works on a shared-weight copy of the model, with hooks of its own, in a thread of its own. An edit is answered
once it is on disk and published; every forward pass of the served model sees one whole version
(coachhook_fast/hooks/versions.py).
"""

from __future__ import annotations

import argparse
import asyncio
import hmac
import os
import random
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from coachhook_fast import EditConfig, Editor, EditRequest, load_model
from coachhook_fast.edits import store
from coachhook_fast.edits.manifest import MANIFEST
from coachhook_fast.hooks.hooks import Hooks, shared_weight_copy


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    body_bytes: int = 1 << 20
    prompt_tokens: int = 2048
    new_tokens: int = 256
    edits: int = 64
    running: int = 4  # generations at once
    waiting: int = 64  # requests in the queue behind them


class Completion(BaseModel):
    prompt: str = Field(min_length=1)
    max_tokens: int = Field(default=16, ge=1)
    temperature: float = Field(default=0.0, ge=0.0, le=2.0)


class Edit(BaseModel):
    prompt: str
    subject: str
    target_new: str
    paraphrases: list[str] = []
    keep: list[str] = []


class Edits(BaseModel):
    edits: list[Edit] = Field(min_length=1)


class Metrics:
    """Counters in Prometheus' text format."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counters: dict[str, float] = {}

    def add(self, name: str, amount: float = 1.0) -> None:
        with self._lock:
            self._counters[name] = self._counters.get(name, 0.0) + amount

    def time(self, what: str, seconds: float) -> None:
        self.add(f'coachhook_request_seconds_sum{{endpoint="{what}"}}', seconds)
        self.add(f'coachhook_request_seconds_count{{endpoint="{what}"}}')

    def text(self, gauges: dict[str, float]) -> str:
        with self._lock:
            values = {**self._counters, **gauges}
        return "".join(f"{name} {value:g}\n" for name, value in sorted(values.items()))


class Service:
    """The served model, the editor of its copy, and the folder where edits are kept."""

    def __init__(self, model: Any, tokenizer: Any, folder: Path, config: EditConfig | None, metrics: Metrics) -> None:
        saved = (folder / MANIFEST).is_file()
        self.editor = Editor(shared_weight_copy(model), tokenizer, config, edits=folder if saved else None)
        self.model, self.tokenizer, self.folder, self.metrics = model, tokenizer, folder, metrics
        self.hooks = Hooks(model, self.editor.partial.layout, self.editor.layers, self.editor.config.gate)
        self._publish()
        for layer, hook in zip(self.hooks.layers, self.hooks.hooks, strict=True):
            hook.register_forward_pre_hook(self._watch(layer))

    def _watch(self, layer: int) -> Callable[..., None]:
        def watch(hook: Any, args: tuple[torch.Tensor, ...]) -> None:
            if random.random() < 1 / 16:  # a sample: telling costs the norms a second time
                fire = hook.trace(args[0]).fire
                self.metrics.add(f'coachhook_gate_tokens_total{{layer="{layer}"}}', fire.numel())
                self.metrics.add(f'coachhook_gate_fired_total{{layer="{layer}"}}', int(fire.sum()))

        return watch

    def _publish(self) -> None:
        self.hooks.publish(self.editor.edit_set)
        self.version = self.editor.ledger[-1].id if self.editor.ledger else "base"

    def complete(self, ids: list[int], wanted: Completion) -> dict[str, Any]:
        tokens = torch.tensor([ids], device=self.model.device)
        sampling = (
            {"do_sample": True, "temperature": wanted.temperature} if wanted.temperature else {"do_sample": False}
        )
        version = self.version
        made = self.model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=wanted.max_tokens,
            pad_token_id=self.tokenizer.pad_token_id, **sampling,
        )[0, len(ids) :]  # fmt: skip
        self.metrics.add("coachhook_generated_tokens_total", len(made))
        ended = len(made) < wanted.max_tokens
        return {
            "object": "text_completion",
            "choices": [
                {
                    "index": 0,
                    "text": self.tokenizer.decode(made, skip_special_tokens=True),
                    "finish_reason": "stop" if ended else "length",
                }
            ],
            "usage": {"prompt_tokens": len(ids), "completion_tokens": len(made)},
            "edit_version": {"begun": version, "ended": self.version},
        }

    def edit(self, edits: list[Edit]) -> dict[str, Any]:
        requests = [EditRequest(**edit.model_dump()) for edit in edits]
        if not self.editor.memories:
            self.editor.collect_statistics(progress=False)
        before = self.editor.edit_set
        batch = self.editor.edit(requests, progress=False)
        try:
            store.save(self.editor.edit_set, self.folder)
        except BaseException:  # not on disk: not acknowledged, not served; what it took the place of is back
            self.editor.restore(before)
            raise
        self._publish()
        return self.describe(batch)

    def rollback(self, batch_id: str) -> dict[str, Any]:
        self.editor.rollback(batch_id)
        self._publish()  # withdrawn from service even if the disk fails now
        store.save(self.editor.edit_set, self.folder)
        return {"rolled_back": batch_id, "version": self.version}

    @staticmethod
    def describe(batch: Any) -> dict[str, Any]:
        outcomes = [
            {"text": one.request.text, "target_new": one.request.target_new, "residual_left": one.residual_left}
            for one in batch.outcomes
        ]
        return {"id": batch.id, "time": batch.time, "seconds": batch.seconds, "edits": outcomes}


def create_app(
    model: Any,
    tokenizer: Any,
    folder: Path,
    token: str,
    *,
    config: EditConfig | None = None,
    limits: Limits | None = None,
) -> FastAPI:
    """The service as an ASGI app.

    Args:
        folder: where the edit set is kept; what stands there is served from the start.
        token: the bearer token that every request but /health must bring.
    """
    if not token:
        raise ValueError("token must not be empty: whoever reaches the port could edit the model")
    limits = limits or Limits()
    metrics = Metrics()
    service = Service(model, tokenizer, folder, config, metrics)
    generating = ThreadPoolExecutor(limits.running, "generate")
    editing = ThreadPoolExecutor(1, "edit")  # one batch at a time
    waiting = 0

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        generating.shutdown(cancel_futures=True)
        editing.shutdown()

    app = FastAPI(title="coachhook-fast", lifespan=lifespan)
    app.state.service = service

    def authorised(request: Request) -> None:
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            raise HTTPException(401, "a valid bearer token is needed", {"WWW-Authenticate": "Bearer"})

    @app.middleware("http")
    async def measured(request: Request, call_next: Any) -> Response:
        length = request.headers.get("content-length")
        if request.method == "POST" and (length is None or not length.isdigit()):
            return JSONResponse({"detail": "a Content-Length is needed"}, 411)
        if length is not None and int(length) > limits.body_bytes:
            return JSONResponse({"detail": f"the body may have {limits.body_bytes} bytes"}, 413)
        began = time.perf_counter()
        response: Response = await call_next(request)
        route = request.scope.get("route")
        name = getattr(route, "path", "unknown")
        metrics.time(name, time.perf_counter() - began)
        metrics.add(f'coachhook_responses_total{{endpoint="{name}",status="{response.status_code}"}}')
        return response

    async def within(pool: ThreadPoolExecutor, work: Callable[..., Any], *args: Any) -> Any:
        nonlocal waiting
        if waiting >= limits.running + limits.waiting:
            raise HTTPException(429, "too many requests are waiting", {"Retry-After": "1"})
        waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(pool, work, *args)
        except ValueError as error:  # the package's own checks name what is wrong
            raise HTTPException(422, str(error)) from error
        finally:
            waiting -= 1

    secured = [Depends(authorised)]

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/v1/completions", dependencies=secured)
    async def completions(wanted: Completion) -> Any:
        if wanted.max_tokens > limits.new_tokens:
            raise HTTPException(422, f"max_tokens may be {limits.new_tokens}, got {wanted.max_tokens}")
        ids = tokenizer(wanted.prompt).input_ids
        if not 0 < len(ids) <= limits.prompt_tokens:
            raise HTTPException(422, f"the prompt may have {limits.prompt_tokens} tokens, got {len(ids)}")
        return await within(generating, service.complete, ids, wanted)

    @app.post("/edits", dependencies=secured)
    async def edit(wanted: Edits) -> Any:
        if len(wanted.edits) > limits.edits:
            raise HTTPException(422, f"a batch may have {limits.edits} edits, got {len(wanted.edits)}")
        return await within(editing, service.edit, wanted.edits)

    @app.get("/edits", dependencies=secured)
    async def edits() -> Any:
        return {"version": service.version, "batches": [service.describe(batch) for batch in service.editor.ledger]}

    @app.post("/edits/{batch_id}/rollback", dependencies=secured)
    async def rollback(batch_id: str) -> Any:
        if batch_id not in [batch.id for batch in service.editor.ledger]:
            raise HTTPException(404, f"no batch {batch_id!r}")
        return await within(editing, service.rollback, batch_id)

    @app.get("/metrics", dependencies=secured)
    async def read_metrics() -> Response:
        gauges = {
            "coachhook_edits": service.editor.edit_set.num_edits,
            "coachhook_batches": len(service.editor.ledger),
            "coachhook_waiting_requests": waiting,
            f'coachhook_edit_version{{version="{service.version}"}}': 1,
        }
        return Response(metrics.text(gauges), media_type="text/plain; version=0.0.4")

    return app


def main() -> None:
    import uvicorn

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--edits", type=Path, default=Path("edits"), help="folder of the edit set")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    token = os.environ.get("COACHHOOK_TOKEN", "")
    if not token:
        parser.error("set COACHHOOK_TOKEN, the bearer token that clients must bring")
    model, tokenizer = load_model(arguments.model)
    uvicorn.run(create_app(model, tokenizer, arguments.edits, token), host=arguments.host, port=arguments.port)


if __name__ == "__main__":
    main()
