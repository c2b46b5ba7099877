"""Hot swap of compiled models: threads run, torch traces, operators switch. Each pass sees one whole version."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
from swap_cases import Load, alone, edit_set, logits, model_with
from tiny import tiny_model
from torch import Tensor

SETS = [edit_set(seed, rank) for seed, rank in ((0, 2), (1, 5), (2, 3))]


# Two are needed, one with edits and one without; cold threads may make each a second time. A cold run under
# TORCH_LOGS=recompiles,guards (torch 2.13) made a second graph with edits, whose guards are those of the first but for
# ids; torch's reason: "runtime guards failed even though they passed during recompilation-reason analysis". Passes of
# one thread, and of a second one while another compiles, made none. What failed at run time is not known.
MOST_GRAPHS = 4


class Compiled:
    """A model with room for all of SETS, and how it is compiled; `graphs` are those that were made."""

    def __init__(self, how: str) -> None:
        self.model = model_with()
        self.hooks = self.model.coachhook
        self.hooks.reserve(8)
        self.hooks.publish(SETS[0])
        self.graphs: list[Any] = []
        if how == "blocks":
            for block in self.model.model.layers:
                block.compile(backend=self._backend)
            self.run: Callable[[], Tensor] = lambda: logits(self.model)
        elif how == "a function":
            function = torch.compile(self._call, backend=self._backend, fullgraph=True)
            self.run = lambda: logits(function)
        else:
            module = torch.compile(self.model, backend=self._backend, fullgraph=how == "fullgraph")
            self.run = lambda: logits(module)

    def _call(self, ids: Tensor, use_cache: bool) -> Any:
        return self.model(ids, use_cache=use_cache)

    def _backend(self, graph: Any, inputs: Any) -> Any:
        self.graphs.append(graph)
        return graph.forward

    def served(self) -> int:
        """Which of VERSIONS a pass gives; -1: none."""
        found = self.run()
        distances = [float((found - version).abs().max()) for version in versions()]
        return distances.index(min(distances)) if min(distances) < 1e-4 else -1


def versions() -> list[Tensor]:
    return [*(alone(edits) for edits in SETS), alone(None)]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def swap(hooks: Any, times: int) -> None:
    """Each version in turn, and the base model by both switches."""
    for number in range(times):
        if number % 5 == 3:
            hooks.disable()
            threading.Event().wait(0.005)
            hooks.enable()
        elif number % 5 == 4:
            with hooks.disabled():
                threading.Event().wait(0.005)
        else:
            hooks.publish(SETS[number % 5])
        threading.Event().wait(0.005)


@pytest.mark.parametrize("how", ["fullgraph", "with breaks"])
def test_passes_under_swaps_while_torch_traces(how: str) -> None:
    """Cold: the threads trace while versions come and go, and until both graphs are there."""
    compiled = Compiled(how)
    with Load(compiled.run, versions()) as load:
        for _ in range(100):
            swap(compiled.hooks, 5)
            if load.problems or (min(load.passes[:4]) > 0 and sum(load.passes) > 200):
                break
    assert not load.problems, load.problems[:2]
    assert sum(count > 0 for count in load.passes) >= 3
    made = len(compiled.graphs)
    assert made <= MOST_GRAPHS
    for number, edits in enumerate(SETS):
        compiled.hooks.publish(edits)
        assert compiled.served() == number  # later swaps are followed
    with compiled.hooks.disabled():
        assert compiled.served() == 3
    assert len(compiled.graphs) == made


def test_a_callers_function_that_traces_the_model_follows_swaps() -> None:
    """Its hooks are traced with it; warmed by hand, it compiles no more."""
    compiled = Compiled("a function")
    assert compiled.served() == 0
    with compiled.hooks.disabled():
        assert compiled.served() == 3
    with Load(compiled.run, versions()) as load:
        swap(compiled.hooks, 60)
    assert not load.problems, load.problems[:2]
    assert sum(count > 0 for count in load.passes) >= 3
    for number, edits in enumerate(SETS):
        compiled.hooks.publish(edits)
        assert compiled.served() == number
    assert len(compiled.graphs) <= MOST_GRAPHS


def test_no_version_is_published_while_a_callers_function_is_traced() -> None:
    compiled = Compiled("a function")
    compiled.served()
    with torch._dynamo.convert_frame.compile_lock:  # as a thread holds it that traces
        operator = threading.Thread(target=compiled.hooks.publish, args=(SETS[1],))
        operator.start()
        operator.join(0.2)
        assert compiled.hooks.edit_set is SETS[0]
    operator.join(60)
    assert compiled.hooks.edit_set is SETS[1]


def test_a_pass_of_another_thread_is_whole_while_one_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch says `is_compiling()` in every thread then."""
    model = model_with()
    model.coachhook.publish(SETS[0])
    handle = model.model.layers[1].register_forward_hook(lambda *_: model.coachhook.publish(SETS[1]))
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    found = logits(model)
    handle.remove()
    assert torch.equal(found, alone(SETS[0]))


def test_warmed_models_compile_nothing_under_swaps() -> None:
    compiled = Compiled("with breaks")
    compiled.hooks.warm(compiled.run)
    assert compiled.hooks.modes == ["gated"] * 4
    made = len(compiled.graphs)
    assert made == 2
    with Load(compiled.run, versions()) as load:
        swap(compiled.hooks, 60)
    assert not load.problems, load.problems[:2]
    assert len(compiled.graphs) == made


def test_warming_switches_nothing_for_others() -> None:
    compiled = Compiled("fullgraph")
    seen: list[list[str]] = []
    compiled.hooks.warm(lambda: seen.append(compiled.hooks.modes))
    assert seen == [["gated"] * 4] * 2
    modes: list[str] = []
    handle = compiled.model.model.layers[0].mlp.down_proj.register_forward_pre_hook(
        lambda hook, _: modes.append(hook.mode)
    )
    compiled.hooks.warm(lambda: logits(compiled.model))
    handle.remove()
    assert modes == ["gated", "off"]
    compiled.hooks.add_edits("a", SETS[1])
    with compiled.hooks.select(["a"]), pytest.raises(ValueError, match="leave select"):
        compiled.hooks.warm(compiled.run)


def test_past_the_recompile_limit_passes_are_whole() -> None:
    """torch runs the model's own code then, and compiles what it calls."""
    with torch._dynamo.config.patch(recompile_limit=1, cache_size_limit=1):
        compiled = Compiled("with breaks")
        assert compiled.served() == 0
        with compiled.hooks.disabled():
            assert compiled.served() == 3  # a second graph is one too many
        for number in (1, 2, 0):
            compiled.hooks.publish(SETS[number])
            assert compiled.served() == number
        with Load(compiled.run, versions(), threads=2) as load:
            swap(compiled.hooks, 20)
        assert not load.problems, load.problems[:2]


def test_blocks_compiled_one_by_one_follow_a_swap_in_the_next_pass() -> None:
    compiled = Compiled("blocks")
    assert compiled.served() == 0
    handle = compiled.model.model.norm.register_forward_pre_hook(lambda *_: None)
    between = compiled.model.model.embed_tokens.register_forward_hook(lambda *_: compiled.hooks.publish(SETS[1]))
    assert compiled.served() == 0
    between.remove()
    handle.remove()
    assert compiled.served() == 1


def test_a_pass_that_fails_while_it_is_the_first_holds_nobody_up() -> None:
    compiled = Compiled("with breaks")

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = compiled.model.model.layers[1].register_forward_pre_hook(fail)

    def interrupted() -> None:
        with suppress(KeyboardInterrupt):
            compiled.run()

    thread = threading.Thread(target=interrupted)
    thread.start()
    thread.join()
    handle.remove()
    done: list[int] = []
    other = threading.Thread(target=lambda: done.append(compiled.served()), daemon=True)
    other.start()
    other.join(120)
    assert done == [0]


def test_a_compiled_pass_costs_no_graph_more_than_the_unedited_model() -> None:
    compiled = Compiled("fullgraph")
    compiled.run()
    assert len(compiled.graphs) == 1
    plain: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        plain.append(graph)
        return graph.forward

    logits(torch.compile(tiny_model("llama"), backend=backend, fullgraph=True))
    assert len(plain) == 1
