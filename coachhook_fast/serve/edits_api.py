"""/edits and /inspect: what is edited, more of it, less of it, what it would do, and what the gate sees."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from coachhook_fast.evaluate.inspect import inspect_prompt
from coachhook_fast.request import EditRequest
from coachhook_fast.serve.editing import Editing
from coachhook_fast.serve.errors import ApiError, api_error
from coachhook_fast.serve.limits import Limits, Places
from coachhook_fast.serve.logs import log_error
from coachhook_fast.serve.schemas import EditsBody, Fact, InspectBody, PreviewBody, read
from coachhook_fast.serve.served import Served


class Workers:
    """The threads of edits and of inspections, one each, and the places before them, each kind apart."""

    def __init__(self, limits: Limits) -> None:
        self.edits, self.inspecting = ThreadPoolExecutor(1, "edit"), ThreadPoolExecutor(1, "inspect")
        self.places = {
            "edits": Places("edits", limits.editing),
            "rollbacks": Places("rollbacks", limits.rollbacks),
            "inspections": Places("inspections", limits.inspecting),
        }

    async def run(self, kind: str, work: Callable[..., Any], *args: Any) -> Response:
        """`work` in its thread, as JSON. ApiError for what it raises, 429 where too many of its kind wait."""
        pool = self.inspecting if kind == "inspections" else self.edits
        with self.places[kind].one():
            try:
                return JSONResponse(await asyncio.get_running_loop().run_in_executor(pool, work, *args))
            except ApiError:
                raise
            except Exception as error:
                told = api_error(error)
                if told.status >= 500:
                    log_error("work_failed", error, kind=kind, status=told.status)
                raise told from error

    def close(self) -> None:
        """Waits for what runs: an edit is saved whole or not at all. What waits is dropped."""
        for pool in (self.edits, self.inspecting):
            pool.shutdown(cancel_futures=True)


def routes(editing: Editing, viewer: Served, tokenizer: Any, workers: Workers, limits: Limits) -> APIRouter:
    """The routes; `viewer`: a model of its own to inspect prompts with, as that runs it under temporary hooks."""
    router = APIRouter()

    def requests(body: EditsBody) -> list[EditRequest]:
        if len(body.edits) > limits.edits:
            raise ApiError(400, f"a batch may have {limits.edits} edits, got {len(body.edits)}", param="edits")
        return [_request(index, fact) for index, fact in enumerate(body.edits)]

    @router.get("/edits")
    async def edits() -> Any:
        return JSONResponse(editing.listed())

    @router.post("/edits")
    async def edit(request: Request) -> Response:
        return await workers.run("edits", editing.edit, requests(read(EditsBody, await request.body())))

    @router.post("/edits/preview")
    async def preview(request: Request) -> Response:
        body = read(PreviewBody, await request.body())
        if len(body.questions) > limits.questions:
            raise ApiError(400, f"questions may be {limits.questions}, got {len(body.questions)}", param="questions")
        return await workers.run("edits", editing.preview, requests(body), body.questions, body.max_tokens)

    @router.post("/edits/{batch}/rollback")
    async def rollback(batch: str) -> Response:
        editing.check_batch(batch)
        return await workers.run("rollbacks", editing.rollback, batch)

    @router.delete("/edits/{batch}/{index}")
    async def remove(batch: str, index: str) -> Response:
        if not re.fullmatch("[0-9]{1,9}", index):
            raise ApiError(400, f"a fact is named by its number in the batch, got {index!r}", param="index")
        editing.check_fact(batch, int(index))
        return await workers.run("rollbacks", editing.remove, batch, int(index))

    @router.post("/inspect")
    async def inspect(request: Request) -> Response:
        body = read(InspectBody, await request.body())
        viewer.check_name(body.model)

        def look() -> dict[str, Any]:
            with viewer.pinned(body.model) as version:
                return {"version": version, **inspect_prompt(viewer.model, tokenizer, body.prompt).to_dict()}

        return await workers.run("inspections", look)

    return router


def _request(index: int, fact: Fact) -> EditRequest:
    try:
        return EditRequest(**fact.model_dump())
    except (ValueError, TypeError) as error:
        raise ApiError(422, f"edits.{index}: {error}", param=f"edits.{index}", code="refused") from None
