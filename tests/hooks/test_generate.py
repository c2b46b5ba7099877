"""transformers' generate(): every mode gives the tokens of the plain rule, run without a cache, one at a time."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import pytest
import torch
from generate_cases import (
    GATES,
    STEPS,
    TEXTS,
    fired,
    generate,
    hooked,
    ids_of,
    plain,
    reference,
    set_prompt,
)
from installed import before
from tiny import CACHE, tiny_model, tiny_tokenizer
from torch import Tensor
from transformers import CompileConfig, ContinuousBatchingConfig, DynamicCache, GenerationConfig, StaticCache

from coachhook_fast.edits.delta import LowRankDelta

# ------------------------------------------------------------------ one sequence


@pytest.mark.slow
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gptj", "qwen2", "mistral", "gemma2", "gemma3"])
def test_dynamic_and_sliding_window_caches(gate: str, family: str) -> None:
    model = hooked(gate, family)
    changed = False
    for text in TEXTS:
        ids = ids_of(text)
        assert generate(model, ids) == reference(model, ids)
        changed = changed or fired(model, ids)
    assert changed


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_static_cache(gate: str, family: str) -> None:
    model = hooked(gate, family)
    for text in TEXTS[:2]:
        ids = ids_of(text)
        assert generate(model, ids, cache_implementation="static") == reference(model, ids)


@pytest.mark.parametrize("gate", GATES)
def test_no_cache(gate: str) -> None:
    model = hooked(gate)
    ids = ids_of(TEXTS[0])
    assert generate(model, ids, use_cache=False) == reference(model, ids, prompt=None)


@pytest.mark.slow
@pytest.mark.parametrize("gate", GATES)
def test_compiled_static_cache_has_one_graph(gate: str) -> None:
    """The decode step compiles whole, as often as the unedited model's, and again for no other edit set."""
    model = hooked(gate)
    model.coachhook.reserve(8)
    for hook in model.coachhook.hooks:
        hook.set_delta(hook.delta, hook.threshold, relative=hook.served.state.relative)
    ids = ids_of(TEXTS[0])
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = CompileConfig(backend=backend, fullgraph=True, mode=None)
    compiled._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": compiled}
    torch._dynamo.reset()
    generate(tiny_model("llama"), ids, **options)
    unedited = len(graphs)
    assert unedited == 1 or before("torch", "2.10")
    torch._dynamo.reset()
    graphs.clear()
    assert generate(model, ids, **options) == reference(model, ids)
    hook = model.coachhook.hooks[0]
    smaller = LowRankDelta(hook.delta.U[:, :1], -2 * hook.delta.B[:1])  # rank 3 to rank 1
    hook.set_delta(smaller, hook.threshold, relative=hook.served.state.relative)
    assert generate(model, ids, **options) == reference(model, ids)
    # Before 5.20 transformers may compile forward without the hooks before it: that of `sequence` is one graph more.
    apart = gate == "sequence" and before("transformers", "5.20")
    assert unedited <= len(graphs) <= unedited + apart


@pytest.mark.parametrize("backend", ["fp8", "quanto", "hqq"])
def test_quantised_cache(backend: str) -> None:
    """Quantised keys change the model itself, so the reference is the plain gate with the same cache."""
    package = {"quanto": "optimum", "hqq": "hqq"}.get(backend)
    if package and importlib.util.find_spec(package) is None:
        pytest.skip(f"the quantised cache's backend {backend} needs the package {package}")
    if backend == "fp8" and before("transformers", "5.21"):
        pytest.skip("transformers before 5.21 has no quantised cache of its own")
    model = hooked("calibrated")
    options: dict[str, Any] = {"cache_implementation": "quantized", "cache_config": {"backend": backend}}
    for text in TEXTS[:2]:
        ids = ids_of(text)
        assert generate(model, ids, **options) == generate(plain(model), ids, **options)
    sequence = hooked("sequence")
    cache = DynamicCache(config=sequence.config)
    generate(sequence, ids, **{CACHE: cache})
    made = sequence.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, return_dict_in_generate=True, **options
    )
    states = made[CACHE].layers[5:]
    for layer, exact in zip(states, cache.layers[5:], strict=True):
        length = ids.shape[1]
        assert layer.keys[0, 0, :length, 0].tolist() == list(range(1, length + 1))  # counts, not quantised
        torch.testing.assert_close(layer.keys[:, :, 0], exact.keys[:, :, 0], rtol=0.1, atol=0.1)


# ------------------------------------------------------------------ batches and beams


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_left_padded_batch(gate: str, cache: str) -> None:
    model = hooked(gate)
    batch = tiny_tokenizer(padding_side="left")(TEXTS, padding=True, return_tensors="pt")
    batch.pop("token_type_ids", None)
    made = model.generate(**batch, max_new_tokens=STEPS, do_sample=False, cache_implementation=cache)
    expected = [reference(model, ids_of(text)) for text in TEXTS]
    assert made[:, -STEPS:].tolist() == expected


@pytest.mark.slow
@pytest.mark.parametrize("gate", GATES)
def test_beam_search(gate: str) -> None:
    model = hooked(gate)
    twin = plain(model)
    for text in TEXTS[:3]:
        ids = ids_of(text)
        set_prompt(twin, ids.shape[1])
        expected = generate(twin, ids, num_beams=3, use_cache=False)
        assert generate(model, ids, num_beams=3) == expected


# ------------------------------------------------------------------ drafts and crops


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_prompt_lookup(gate: str, family: str) -> None:
    model = hooked(gate, family)
    ids = torch.cat([ids_of(TEXTS[0])] * 2, dim=1)  # the prompt repeats itself: drafts are found at once
    assert generate(model, ids, prompt_lookup_num_tokens=4) == reference(model, ids)


@pytest.mark.slow
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("noise", [0.0, 0.02, 2.0])
def test_assisted_decoding(gate: str, noise: float) -> None:
    """With an assistant that is right always, mostly, and hardly ever."""
    model = hooked(gate)
    assistant = copy.deepcopy(model)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.mul_(1 + noise * torch.randn_like(parameter))
    for text in TEXTS[:2]:
        ids = ids_of(text)
        expected = reference(model, ids)
        passes: list[int] = []
        handle = model.register_forward_pre_hook(lambda *_, passes=passes: passes.append(1))
        assert generate(model, ids, assistant_model=assistant) == expected
        handle.remove()
        if noise == 0:
            assert len(passes) < STEPS  # drafts were accepted


# ------------------------------------------------------------------ a cache used again


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("static", [False, True])
def test_conversation_in_one_cache(gate: str, static: bool) -> None:
    model = hooked(gate)
    first = ids_of(TEXTS[0])
    cache: Any = StaticCache(model.config, 200) if static else DynamicCache(config=model.config)
    history = first
    for text in TEXTS[1:3]:
        made = model.generate(
            history, attention_mask=torch.ones_like(history), max_new_tokens=6, do_sample=False, **{CACHE: cache}
        )
        assert made[0, -6:].tolist() == reference(model, history, 6, prompt=first.shape[1])
        history = torch.cat([made, ids_of(text)], dim=1)
    if static:
        cache.reset()
        assert generate(model, ids_of(TEXTS[3]), **{CACHE: cache}) == reference(model, ids_of(TEXTS[3]))


@pytest.mark.parametrize("gate", GATES)
def test_cropped_cache(gate: str) -> None:
    """Back into the middle of an earlier pass, and on with other tokens."""
    model = hooked(gate)
    ids = ids_of(TEXTS[0])
    cache = DynamicCache(config=model.config)
    generate(model, ids, **{CACHE: cache})
    turn = ids_of(TEXTS[1])
    history = torch.cat([ids, turn], dim=1)
    cache.crop(ids.shape[1] - cache.get_seq_length())
    with torch.no_grad():
        model(turn, **{CACHE: cache})  # the turn in one pass
    cache.crop(-(turn.shape[1] // 2))
    kept = history[:, : cache.get_seq_length()]
    other = torch.cat([kept, ids_of(TEXTS[2])], dim=1)
    assert generate(model, other, **{CACHE: cache}) == reference(model, other, prompt=ids.shape[1])


def test_states_are_those_of_each_token() -> None:
    model = hooked("sequence", dtype=torch.float64)
    batch = tiny_tokenizer(padding_side="left")(TEXTS, padding=True, return_tensors="pt")
    norms: list[Tensor] = []
    hook = model.coachhook.hooks[0]
    hook.register_forward_pre_hook(lambda module, args: norms.append(module.trace(args[0]).norm))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(batch.input_ids, attention_mask=batch.attention_mask, **{CACHE: cache})
    states = cache.layers[5].keys[:, 0]
    for row, mask in enumerate(batch.attention_mask.bool()):
        real = norms[0][row][mask]
        for token, state in enumerate(states[row][mask]):
            seen = real[: token + 1]
            expected = torch.stack([torch.tensor(token + 1.0), seen.mean(), ((seen - seen.mean()) ** 2).sum()])
            torch.testing.assert_close(state, expected.double(), rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------ what cuts a sequence


def test_chunked_prefill() -> None:
    model = hooked("calibrated")
    for text in TEXTS[:2]:
        ids = ids_of(text)
        for size in (1, 5):
            assert generate(model, ids, prefill_chunk_size=size) == reference(model, ids)
    sequence = hooked("sequence")
    for options in ({"prefill_chunk_size": 5}, {"generation_config": GenerationConfig(prefill_chunk_size=5)}):
        with pytest.raises(ValueError, match="prefill_chunk_size=5"):
            sequence.generate(ids, **options)


def test_continuous_batching() -> None:
    model = hooked("calibrated")
    expected = [reference(model, ids_of(text)) for text in TEXTS]
    config = GenerationConfig(max_new_tokens=STEPS, do_sample=False, eos_token_id=-1)
    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    prompts = [ids_of(text)[0].tolist() for text in TEXTS]
    outputs = model.generate_batch(prompts, generation_config=config, continuous_batching_config=small)
    made = [output.generated_tokens for output in outputs.values()]
    assert sorted(made) == sorted(expected)
    with pytest.raises(ValueError, match="continuous batching"):
        hooked("sequence").generate_batch([[5, 6, 7]], generation_config=config)
