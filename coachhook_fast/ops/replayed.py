"""Hands the launches of a call to csrc/cuda/replay.cpp, which makes the next call of its kind without Python.

Only where C++ asks for them (a kind of call that it meets for the first time, outside of a recorded CUDA graph), and
only if everything that the kernels read is an argument of the call or their own: a call that needs a copy or a cast
stays with Python.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from coachhook_fast.ops._library import EXTENSION, build_info

if TYPE_CHECKING:
    from coachhook_fast.kernels.launches import Launch, Place, Recording

_CAN_REPLAY = bool(build_info().get("cuda"))
_ALIGNMENT = 256  # of scratch: no kernel was compiled for more
_BYTES = {"i32": 4, "i64": 8}


class Buffers(NamedTuple):
    """What a launch may point into, beside its scratch: the order of `Buffer` in csrc/cuda/replay.h."""

    x: Tensor
    out: Tensor
    U: Tensor | None
    B: Tensor
    threshold: Tensor
    sketch: Tensor | None
    mask: Tensor | None
    cu_seqlens: Tensor | None
    state: Tensor | None
    fire: Tensor
    after: Tensor


def _launch(launch: Launch, places: list[Place | int], offsets: list[int]) -> tuple | None:
    """(function, grid, threads, shared bytes, early, [(buffer, offset or number, bytes)]), or None where the compiled
    kernel wants more than a launch can hold."""
    compiled = launch.compiled
    about = compiled.metadata
    if about.num_ctas != 1 or about.global_scratch_size or about.profile_scratch_size or about.launch_cooperative_grid:
        return None
    arguments = []
    # an argument that is 1 was compiled into the kernel
    for kind, place in zip(list(compiled.src.signature.values())[: len(places)], places, strict=True):
        if kind == "constexpr":
            continue
        if isinstance(place, int):
            if kind not in _BYTES:
                return None
            arguments.append((-1, place, _BYTES[kind]))
        elif place.buffer < len(Buffers._fields):
            arguments.append((place.buffer, place.offset, 8))
        else:
            scratch = offsets[place.buffer - len(Buffers._fields)]
            arguments.append((len(Buffers._fields), scratch + place.offset, 8))
    grid = (*launch.grid, 1, 1)[:3]
    return compiled.function, grid, 32 * about.num_warps, about.shared, about.launch_pdl, arguments


def plan(recording: Recording, buffers: Buffers) -> tuple[int, list[tuple]] | None:
    """Bytes of scratch, and the launches in C++'s terms; None where a replay would not do the same."""
    places = recording.places(buffers)
    if places is None:
        return None
    offsets, size = [], 0
    for tensor in recording.scratch:
        offsets.append(size)
        size += -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT
    launches = [_launch(launch, where, offsets) for launch, where in zip(recording.launches, places, strict=True)]
    return None if None in launches else (size, launches)  # type: ignore[return-value]


def awaited() -> bool:
    """Whether C++ asks for the launches of this call."""
    return _CAN_REPLAY and EXTENSION.awaits_launches()  # type: ignore[union-attr]


@contextmanager
def kept() -> Iterator[Callable[..., None]]:
    """Within, launches are recorded if C++ asks for them; what it yields hands them over."""
    if not awaited():
        yield lambda buffers, is_overlapped=False: None
        return
    from coachhook_fast.kernels.launches import recording

    with recording() as launches:

        def keep(buffers: Buffers, is_overlapped: bool = False) -> None:
            found = plan(launches, buffers)
            if found is not None:
                EXTENSION.keep_launches(buffers.after.shape[0], is_overlapped, *found)  # type: ignore[union-attr]

        yield keep
