"""The service as an ASGI app: models, workers, routes and guard, put together."""

from __future__ import annotations

import copy
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from coachhook_fast.config import EditConfig
from coachhook_fast.editing.editor import Editor
from coachhook_fast.edits.manifest import stands_in
from coachhook_fast.hooks.shared_weights import shared_weight_copy
from coachhook_fast.serve import edits_api, openai, page
from coachhook_fast.serve.asking import Asking
from coachhook_fast.serve.auth import Doorkeeper
from coachhook_fast.serve.editing import Editing
from coachhook_fast.serve.errors import FAILED, ApiError
from coachhook_fast.serve.generation import Generator
from coachhook_fast.serve.guard import Guard
from coachhook_fast.serve.limits import Limits
from coachhook_fast.serve.logs import log_error
from coachhook_fast.serve.metrics import Metrics
from coachhook_fast.serve.served import Served
from coachhook_fast.statistics.corpus import Corpus


class Service:
    """All that runs, and the app in front of it.

    Args:
        model, tokenizer: the base model, without hooks.
        folder: where the edit set is kept; what stands there is served from the start.
        token: the bearer token; None lets requests from this machine in.
        config: settings of the edits; None takes those of `folder`, else the defaults.
        adapters: folders of further edit sets, served by name and not edited.
        corpus: text for the key statistics; see `Editor.collect_statistics`.

    Raises:
        ValueError: the edit set or an adapter is damaged or does not fit the model; the model has hooks.

    service = Service(model, tokenizer, Path("edits"), token="secret")
    uvicorn.run(service.app)
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        folder: Path,
        *,
        token: str | None = None,
        config: EditConfig | None = None,
        adapters: Mapping[str, Path] | None = None,
        corpus: Corpus | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.limits, self.metrics = limits or Limits(), Metrics()
        self._corpus, self.draining, self.statistics_ready = corpus, False, False
        # Three models over the same weights: editor and viewer run theirs with temporary hooks, which passes of other
        # threads must not meet. Tokenizers likewise: one that is used in two threads can refuse the one.
        copies = [shared_weight_copy(model) for _ in range(2)]
        self.editor = Editor(copies[0], copy.deepcopy(tokenizer), config, edits=folder if stands_in(folder) else None)
        places = self.editor.partial.layout, self.editor.layers, self.editor.config.gate
        self.served = Served(model, *places, adapters=adapters, metrics=self.metrics)
        self.viewer = Served(copies[1], *places, adapters=adapters)
        self.editing = Editing(self.editor, [self.served, self.viewer], folder, self.metrics)
        self.generator = Generator(self.served, self.limits, self.metrics)
        self.asking = Asking(self.generator, tokenizer, self.limits)
        self.workers = edits_api.Workers(self.limits)
        api = self._api(copy.deepcopy(tokenizer))
        self.app = Guard(api, Doorkeeper(token), self.limits, self.metrics)

    def _api(self, tokenizer: Any) -> FastAPI:
        @asynccontextmanager
        async def lifespan(_: FastAPI) -> AsyncIterator[None]:
            self.workers.edits.submit(self._prepare)
            yield
            self.close()

        api = FastAPI(title="coachhook-fast", openapi_url=None, docs_url=None, redoc_url=None, lifespan=lifespan)
        api.add_exception_handler(ApiError, _refused)
        api.add_exception_handler(HTTPException, _refused)
        api.add_exception_handler(Exception, _refused)
        api.include_router(page.routes())
        api.include_router(openai.routes(self.asking, self.served, int(time.time())))
        api.include_router(edits_api.routes(self.editing, self.viewer, tokenizer, self.workers, self.limits))

        @api.get("/healthz")
        async def healthz() -> Any:
            return {"status": "ok"}

        @api.get("/readyz")
        async def readyz() -> Response:
            state = {"ready": not self.draining, "edits_ready": self.statistics_ready}
            return JSONResponse(state, 503 if self.draining else 200)

        @api.get("/metrics")
        async def metrics() -> Response:
            return Response(self.metrics.text(self._gauges()), media_type="text/plain; version=0.0.4")

        return api

    def _prepare(self) -> None:
        try:
            self.editing.prepare(self._corpus)
            self.statistics_ready = True
        except Exception as error:  # the service answers; the first edit tells its client why not
            log_error("statistics_failed", error)

    def _gauges(self) -> dict[str, list[tuple[dict[str, str], float]]]:
        ledger = self.editing.ledger
        waiting = {name: places.taken for name, places in self.workers.places.items()}
        return {
            "coachhook_edits": [({}, sum(len(batch.outcomes) for batch in ledger))],
            "coachhook_batches": [({}, len(ledger))],
            "coachhook_waiting": [
                ({"kind": kind}, taken) for kind, taken in {**waiting, "completions": self.generator.taken}.items()
            ],
            "coachhook_version_info": [({"version": self.editing.version}, 1)],
        }

    def close(self) -> None:
        """Ends all threads: answers at their next token, an edit when it is saved and served."""
        self.draining = True
        self.generator.close()
        self.asking.close()
        self.workers.close()


async def _refused(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        error = ApiError(error.status_code, error.detail, headers=error.headers)
    told = error if isinstance(error, ApiError) else ApiError(500, FAILED, code="internal")
    return JSONResponse(told.to_dict(), told.status, told.headers)
