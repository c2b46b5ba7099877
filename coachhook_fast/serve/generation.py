"""Answers in batches: requests for the same edits that wait together run together, each with its own sampling.

Worker threads run transformers' `generate()`; a row that is done, or whose client has left, ends at the next token, and
its request is answered while the rest of the batch goes on.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList

from coachhook_fast.evaluate.generation import end_tokens, greedy_config
from coachhook_fast.evaluate.scoring import left_padded
from coachhook_fast.models.placement import input_device
from coachhook_fast.serve.errors import ApiError
from coachhook_fast.serve.limits import Limits, busy
from coachhook_fast.serve.logs import log_error
from coachhook_fast.serve.metrics import Metrics
from coachhook_fast.serve.rows import Row
from coachhook_fast.serve.sampling import Draws, Watch
from coachhook_fast.serve.served import Served


@dataclass(eq=False)  # told apart by being another, in queues too
class Job:
    """The answers of one request.

    Attributes:
        name: which edits; rows: its answers.
        version: of the edits, once it runs.
    """

    name: str
    rows: Sequence[Row]
    version: str | None = None
    cancelled: bool = False

    @property
    def tokens(self) -> int:
        """Of its longest answer, prompt included."""
        return max(len(row.prompt) + row.sampling.max_tokens for row in self.rows)

    def cancel(self) -> None:
        """Its client has left. Any thread may call it."""
        self.cancelled = True
        for row in self.rows:
            row.cancel()


class Generator:
    """Worker threads and the queue before them.

    generator = Generator(served, Limits(), Metrics())
    generator.submit(Job("default", [row]))
    generator.close()
    """

    def __init__(self, served: Served, limits: Limits, metrics: Metrics) -> None:
        self.served, self.limits, self.metrics = served, limits, metrics
        self._ends = end_tokens(served.model)
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._changed = threading.Condition()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"generate-{number}", daemon=True)
            for number in range(limits.workers)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def taken(self) -> int:
        """Requests that wait or run."""
        with self._changed:
            return len(self._waiting) + len(self._running)

    def submit(self, job: Job) -> None:
        """Puts `job` behind those that wait. ApiError 429 where too many do, 503 after `close`."""
        with self._changed:
            if self._closed:
                raise ApiError(503, "the service is stopping", code="stopping", headers={"Retry-After": "5"})
            if len(self._waiting) >= self.limits.generating:  # those whose clients have left make way
                self._waiting = deque(waiting for waiting in self._waiting if not waiting.cancelled)
            if len(self._waiting) >= self.limits.generating:
                raise busy("completions")
            self._waiting.append(job)
            self._changed.notify()

    def close(self) -> None:
        """Takes no more, cancels what runs and waits, and ends its threads."""
        with self._changed:
            self._closed = True
            jobs = [*self._waiting, *self._running]
            self._changed.notify_all()
        for job in jobs:
            job.cancel()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while batch := self._take():
            try:
                self._write(batch)
            except Exception as error:  # out of memory, or a fault of the model: the worker lives on
                log_error("generation_failed", error)
                for job in batch:
                    for row in job.rows:
                        row.fail(
                            error if isinstance(error, ApiError) else ApiError(500, "the model failed", code="model")
                        )
            finally:
                with self._changed:
                    self._running = [job for job in self._running if job not in batch]
                batch.clear()  # it may be long until the next one

    def _take(self) -> list[Job]:
        """The job that waited longest, and those behind it that fit into its batch; none after the end."""
        with self._changed:
            while True:
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if not self._waiting:
                    return []
                batch = [self._waiting.popleft()]
                for job in list(self._waiting):
                    if self._fits([*batch, job]):
                        batch.append(job)
                        self._waiting.remove(job)
                batch = [job for job in batch if not job.cancelled]
                if batch:
                    self._running += batch
                    return batch

    def _fits(self, jobs: Sequence[Job]) -> bool:
        answers = sum(len(job.rows) for job in jobs)
        return (
            len({job.name for job in jobs}) == 1
            and answers <= self.limits.batch_answers
            and answers * max(job.tokens for job in jobs) <= self.limits.batch_tokens
        )

    def _write(self, batch: Sequence[Job]) -> None:
        rows = [row for job in batch for row in job.rows]
        ids, mask, _ = left_padded([tuple(row.prompt) for row in rows], input_device(self.served.model))
        with torch.no_grad(), self.served.pinned(batch[0].name) as version:
            for job in batch:
                job.version = version
            self.served.model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=greedy_config(max(row.sampling.max_tokens for row in rows), self._ends),
                logits_processor=LogitsProcessorList([Draws(rows)]),
                stopping_criteria=StoppingCriteriaList([Watch(rows, self._ends, self.limits.answer_seconds)]),
            )
        written = sum(len(row.tokens) for row in rows)
        for row in rows:
            row.fail(ApiError(500, "the model ended without a word", code="model"))  # no row is left without an end
        self.metrics.add("coachhook_batches_generated_total")
        self.metrics.add("coachhook_generated_tokens_total", written)
        self.metrics.add("coachhook_prompt_tokens_total", sum(len(row.prompt) for row in rows))
        self.metrics.add("coachhook_cancelled_total", sum(len(job.rows) for job in batch if job.cancelled))


def decoder(tokenizer: Any) -> Any:
    """Token ids to text, special tokens left out, every space as it is."""
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
