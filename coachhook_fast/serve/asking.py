"""From a request to the pieces of its answers: tokens off the event loop, a place in the queue, an end when the client
leaves."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any

from coachhook_fast.models.loading import context_length
from coachhook_fast.request import prompt_ids
from coachhook_fast.serve.errors import ApiError
from coachhook_fast.serve.generation import Generator, Job, decoder
from coachhook_fast.serve.limits import Limits
from coachhook_fast.serve.rows import Piece, Row, Sampling
from coachhook_fast.serve.schemas import ChatBody, CompletionBody

Ids = tuple[int, ...]


class Asking:
    """Prompts to tokens, and jobs to pieces.

    Args:
        tokenizer: used by one thread at a time for prompts; decoding, which changes nothing in it, by the workers.
    """

    def __init__(self, generator: Generator, tokenizer: Any, limits: Limits) -> None:
        self.generator, self.tokenizer, self.limits = generator, tokenizer, limits
        self._tokenising = ThreadPoolExecutor(1, "tokenise")
        model = generator.served.model
        self._context = context_length(model)
        self._vocabulary = int(model.config.get_text_config().vocab_size)

    def close(self) -> None:
        self._tokenising.shutdown(cancel_futures=True)

    async def completion_ids(self, body: CompletionBody) -> list[Ids]:
        """The prompts of /v1/completions as ids. ApiError 400 for ids that the model does not have."""
        prompts = _listed(body.prompt)
        if len(prompts) > self.limits.answers:
            raise ApiError(400, f"prompt may hold {self.limits.answers} texts, got {len(prompts)}", param="prompt")
        for prompt in prompts:
            if not isinstance(prompt, str) and max(prompt, default=0) >= self._vocabulary:
                raise ApiError(
                    400, f"prompt holds ids from {self._vocabulary} on, which the model has not", param="prompt"
                )

        def ids() -> list[Ids]:
            return [tuple(prompt_ids(self.tokenizer, p) if isinstance(p, str) else p) for p in prompts]

        return await self._off_the_loop(ids)

    async def chat_ids(self, body: ChatBody) -> list[Ids]:
        """The conversation in the model's chat template. ApiError 400 where it has none, or refuses the messages."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise ApiError(400, "the model has no chat template: use /v1/completions", code="no_chat_template")
        messages = [
            {
                "role": "system" if message.role == "developer" else message.role,
                "content": message.text,
                **({} if message.name is None else {"name": message.name}),
            }
            for message in body.messages
        ]

        def ids() -> list[Ids]:
            from jinja2 import TemplateError

            try:
                text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            except (TemplateError, ValueError, TypeError) as error:  # such as roles that must take turns
                raise ApiError(400, f"the chat template refuses the messages: {error}", param="messages") from None
            return [tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])]

        return await self._off_the_loop(ids)

    async def _off_the_loop(self, work: Callable[[], list[Ids]]) -> list[Ids]:
        return await asyncio.get_running_loop().run_in_executor(self._tokenising, work)

    def sampling(
        self, body: CompletionBody | ChatBody, prompts: Sequence[Ids], wanted: int | None, default: int
    ) -> Sampling:
        """How the answers to `prompts` are drawn: `wanted` tokens each or, where None, as many of `default` as fit.

        Raises:
            ApiError: 400 where a prompt is empty or too long, or too much is asked for.
        """
        answers = len(prompts) * (body.n or 1)
        if answers > self.limits.answers:
            raise ApiError(400, f"n times prompts may be {self.limits.answers}, got {answers}", param="n")
        if wanted is not None and wanted > self.limits.new_tokens:
            raise ApiError(400, f"max_tokens may be {self.limits.new_tokens}, got {wanted}", param="max_tokens")
        longest = max(map(len, prompts))
        if min(map(len, prompts)) == 0:
            raise ApiError(400, "a prompt has no tokens", param="prompt")
        room = min(self._context or self.limits.batch_tokens, self.limits.batch_tokens // answers)
        most = room - longest
        if most < (wanted or 1):
            raise ApiError(
                400,
                f"{longest} tokens of prompt and {wanted or 1} to write are more than the {room} that fit",
                param="prompt",
                code="context_length_exceeded",
            )
        logprobs: int | None
        if isinstance(body, ChatBody):
            logprobs = (body.top_logprobs or 0) if body.logprobs else None
        else:
            logprobs = body.logprobs
        return Sampling(
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            max_tokens=wanted or min(most, default, self.limits.new_tokens),
            stop=body.stops,
            seed=secrets.randbits(62) if body.seed is None else body.seed,
            logprobs=logprobs,
        )

    def start(self, name: str, prompts: Sequence[Ids], sampling: Sampling, n: int) -> Answers:
        """Puts n answers to each prompt into the queue. ApiError as `Generator.submit`."""
        inbox = Inbox(asyncio.get_running_loop())
        rows = [
            Row(
                index=index * n + copy,
                prompt=prompt,
                sampling=_of_copy(sampling, index * n + copy),
                decode=decoder(self.tokenizer),
                emit=inbox.put,
            )
            for index, prompt in enumerate(prompts)
            for copy in range(n)
        ]
        job = Job(name, rows)
        self.generator.submit(job)
        return Answers(job, inbox)


class Inbox:
    """What threads say to a request. It knows nothing of its job, whose rows know it: a circle would keep both, with
    prompts and answers, until the garbage collector comes by."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._pieces: asyncio.Queue[Piece | None] = asyncio.Queue()

    def put(self, piece: Piece | None) -> None:
        """From any thread; None: the client has left."""
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

    async def get(self) -> Piece | None:
        return await self._pieces.get()


class Answers:
    """The pieces of a job's answers as they come from its thread."""

    def __init__(self, job: Job, inbox: Inbox) -> None:
        self.job, self._inbox = job, inbox

    async def pieces(self, receive: Callable[[], Any]) -> AsyncIterator[Piece]:
        """Until every answer has ended, or, by `receive`, the client has left: then all of them end.

        Raises:
            ApiError: an answer failed.
        """
        left = asyncio.ensure_future(_left(receive, self._inbox.put))
        open_answers = len(self.job.rows)
        try:
            while open_answers:
                piece = await self._inbox.get()
                if piece is None:
                    return
                if piece.error is not None:
                    raise piece.error
                yield piece
                open_answers -= piece.finish is not None
        finally:
            left.cancel()
            if open_answers:
                self.job.cancel()


async def _left(receive: Callable[[], Any], emit: Callable[[None], None]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    emit(None)


def _listed(prompt: Any) -> list[Any]:
    """`prompt` as a list of texts or of lists of ids."""
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else list(prompt)


def _of_copy(sampling: Sampling, index: int) -> Sampling:
    """Each answer has a seed of its own."""
    return replace(sampling, seed=(sampling.seed * 1_000_003 + index) % 2**63)
