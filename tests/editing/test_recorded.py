"""Steps that are repeated: as they are, and, with a stand-in for CUDA's graphs, recorded, replayed and given up."""

from __future__ import annotations

import warnings
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch import nn

from coachhook_fast.editing.targets import recorded
from coachhook_fast.editing.targets.recorded import RecordedStep, Recording
from coachhook_fast.hooks.shared_weights import shared_weight_copy, shares_weights


class Cuda:
    """What `RecordedStep` asks of torch.cuda: under `graph` a step is recorded, and `replay` runs it."""

    def __init__(self) -> None:
        self.recording = False
        self.replays = 0
        self.error: Exception | None = None

    def current_stream(self) -> Any:
        return self

    def wait_stream(self, _: Any) -> None:
        assert not self.recording

    def stream(self, _: Any) -> Any:
        return nullcontext()

    def current_device(self) -> int:
        return 0

    def CUDAGraph(self) -> Any:
        return self

    @contextmanager
    def graph(self, *_: Any, **__: Any) -> Any:
        self.recording = True
        try:
            yield
        finally:
            self.recording = False

    def replay(self) -> None:
        self.replays += 1


class Counting:
    """A step that counts how often it ran; what is recorded runs nothing."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda, self.ran, self.recorded = cuda, 0, 0

    def __call__(self) -> torch.Tensor:
        if self.cuda.recording:
            self.recorded += 1
            if self.cuda.error is not None:
                raise self.cuda.error
        else:
            self.ran += 1
        return torch.tensor([float(self.ran)])


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    stand_in = Cuda()
    for name in ("current_stream", "stream", "current_device", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(stand_in, name))
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: torch.ones(1))  # CPU builds know no such device
    monkeypatch.setattr(recorded, "_stream_of", lambda _: stand_in)
    monkeypatch.setattr(recorded, "_refusal", lambda _: None)
    return stand_in


def test_the_first_call_runs_the_second_records_and_all_others_replay(cuda: Cuda) -> None:
    work = Counting(cuda)
    step = RecordedStep(work, Recording(nn.Linear(1, 1)))
    for _ in range(4):
        step()
    assert (work.ran, work.recorded, cuda.replays) == (1, 1, 3)


def test_what_cannot_be_recorded_goes_on_as_it_is(cuda: Cuda) -> None:
    cuda.error = RuntimeError("operation not permitted when stream is capturing")
    recording = Recording(nn.Linear(1, 1))
    work = Counting(cuda)
    step = RecordedStep(work, recording)
    with pytest.warns(UserWarning, match="not permitted"):
        assert [step() for _ in range(3)] == [[1.0], [2.0], [3.0]]
    assert work.recorded == 1
    other = Counting(cuda)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once: later steps of this recording are not tried
        second = RecordedStep(other, recording)
        assert [second() for _ in range(3)] == [[1.0], [2.0], [3.0]]
    assert (other.recorded, cuda.replays) == (0, 0)


def test_too_little_memory_is_no_reason_to_give_up_recording(cuda: Cuda) -> None:
    cuda.error = torch.OutOfMemoryError("no room")
    recording = Recording(nn.Linear(1, 1))
    step = RecordedStep(Counting(cuda), recording)
    step()
    with pytest.raises(torch.OutOfMemoryError):
        step()
    assert recording.refusal is None


def test_a_graph_shrinks_where_that_saves_more_than_it_costs(cuda: Cuda) -> None:
    step = RecordedStep(Counting(cuda), Recording(nn.Linear(1, 1)))
    step()
    assert not step.worth_shrinking(0.9, 20)  # what a replay takes is not known yet
    step()
    step._seconds, step._record_seconds = 0.01, 0.1
    assert step.worth_shrinking(0.9, 25)
    assert not step.worth_shrinking(0.5, 25)
    assert not step.worth_shrinking(0.9, 20)


def test_a_model_that_is_not_on_one_gpu_is_not_recorded() -> None:
    recording = Recording(tiny_model("llama"))
    assert recording.refusal is not None
    assert "GPU" in recording.refusal
    step = RecordedStep(lambda: torch.ones(1), recording)
    assert step() == [1.0]
    assert step.worth_shrinking(0.1, 1)
    assert not step.worth_shrinking(0.0, 1)


def test_a_shared_weight_copy_is_known_by_it() -> None:
    """Its editor records nothing: other threads may draw samples from the served model meanwhile."""
    model = tiny_model("llama")
    assert shares_weights(shared_weight_copy(model))
    assert not shares_weights(model)
