"""A step that is run again and again over the same tensors: on a GPU a CUDA graph, which launches it as one.

The first call runs the step as it is (kernels are compiled, workspaces made), the second records it, and from then on
it is replayed. A step that cannot be recorded goes on as it is.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from coachhook_fast.hooks.shared_weights import shares_weights
from coachhook_fast.models.tensor_parallel import is_tensor_parallel

_log = logging.getLogger(__name__)


class Recording:
    """Whether steps over a model are recorded.

    Attributes:
        refusal: why they are not; None where they are.
    """

    def __init__(self, model: nn.Module, *, wanted: bool = True) -> None:
        self.refusal = None if wanted else "it was not asked for"
        if wanted:
            self.refuse(_refusal(model))

    def refuse(self, reason: str | None) -> None:
        """From now on steps are run as they are, for `reason`."""
        if reason is not None and self.refusal is None:
            _log.debug("steps are not recorded as CUDA graphs: %s", reason)
            self.refusal = reason


class RecordedStep:
    """One step over tensors that stay where they are.

    Args:
        work: runs the step and answers some numbers [k]; everything else it leaves in its tensors.
    """

    def __init__(self, work: Callable[[], Tensor], recording: Recording) -> None:
        self._work = work
        self._recording = recording
        self._ran = False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._answer: Tensor | None = None
        self._record_seconds = self._seconds = 0.0

    def __call__(self) -> list[float]:
        """Runs the step and waits for its numbers."""
        begin = time.perf_counter()
        if self._recording.refusal is not None:
            answer = self._work()
        elif not self._ran:
            answer, self._ran = self._on_side_stream(), True
        else:
            if self._graph is None:
                self._record()
                begin = time.perf_counter()
            answer = self._replay()
        numbers: list[float] = answer.tolist()
        self._seconds = time.perf_counter() - begin
        return numbers

    def worth_shrinking(self, share: float, steps: int) -> bool:
        """Whether a step without the `share` of its work that is of no use any more should take this one's place, with
        `steps` to go. A graph must be recorded anew, which for small models takes longer than the useless work."""
        if self._recording.refusal is not None:
            return share > 0
        if self._graph is None:
            return False
        return share * steps * self._seconds > 2 * self._record_seconds  # a first call as it is, and recording

    def _on_side_stream(self) -> Tensor:
        """The first call, on the stream that will be recorded."""
        stream = _stream()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                return self._work()
        finally:  # after an error too: what the step still reads must not be given away
            torch.cuda.current_stream().wait_stream(stream)

    def _record(self) -> None:
        """Records the step, which runs nothing; a warning where it cannot be recorded."""
        begin = time.perf_counter()
        try:
            self._graph, self._answer = _recorded(self._work)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._recording.refuse(str(error))
            warnings.warn(f"a step could not be recorded as a CUDA graph, it runs as it is: {error}", stacklevel=3)
            # torch's generator takes the recording for one under way still, until another has ended well.
            with contextlib.suppress(RuntimeError):
                _recorded(lambda: torch.zeros(1, device="cuda"))
        self._record_seconds = time.perf_counter() - begin

    def _replay(self) -> Tensor:
        if self._graph is None:
            return self._work()
        assert self._answer is not None
        self._graph.replay()
        return self._answer


def _recorded(work: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """`work` as a graph, and the tensor that a replay leaves its answer in. It is not run."""
    graph = torch.cuda.CUDAGraph()
    # The outer one gives the caller's stream back where the end of a failed recording raises too. Other threads' calls
    # are no errors meanwhile ("thread_local"), but for samples from the GPU's default generator, which is recorded too.
    with (
        torch.cuda.stream(torch.cuda.current_stream()),
        torch.cuda.graph(graph, stream=_stream(), capture_error_mode="thread_local"),
    ):
        answer = work()
    return graph, answer


def _stream() -> torch.cuda.Stream:
    """The current GPU's stream for recording: one, since cuBLAS keeps a workspace for every stream."""
    return _stream_of(torch.cuda.current_device())


@functools.cache
def _stream_of(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _refusal(model: nn.Module) -> str | None:
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if any(device.type != "cuda" for device in devices):
        return "the model is not on a GPU, or not all of it"
    if len(devices) > 1:
        return "the model stands on several GPUs"
    if torch.cuda.current_device() != next(iter(devices)).index:
        return "the model is not on the current GPU"
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        return "accelerate moves its inputs"
    if is_tensor_parallel(model):
        return "ranks share its weights out"
    if shares_weights(model):
        return (
            "its weights are shared: other threads may draw samples, which fails while the GPU's generator is recorded"
        )
    return None
