"""Key statistics: one packed pass equals the plain definition, sequence by sequence, and survives a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import FAMILIES, tiny_model, tiny_texts, tiny_tokenizer
from torch import Tensor

from coachhook_fast.models.architectures import layout_of
from coachhook_fast.models.passes.forward import PartialModel
from coachhook_fast.statistics.cache import _cached
from coachhook_fast.statistics.corpus import begin_tokens, pack_rows, read_documents, sample_documents, sequences_of
from coachhook_fast.statistics.key_statistics import KeyAccumulator, KeyStatistics, collect

LAYERS = (1, 2)


def documents(bos: bool = False, count: int = 10) -> list[list[int]]:
    return read_documents(tiny_texts(count), tiny_tokenizer(bos=bos), 10_000)


def plain_keys(model: Any, partial: PartialModel, layer: int, sequences: list[list[int]]) -> Tensor:
    kept: list[Tensor] = []
    module = partial.layout.down_projection(model, layer)
    handle = module.register_forward_pre_hook(lambda _, args: kept.append(args[0][0]))
    with torch.no_grad():
        for sequence in sequences:
            model(torch.tensor([sequence]))
    handle.remove()
    return torch.cat(kept)


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_plain_definition(family: str) -> None:
    model = tiny_model(family, dtype=torch.float64)
    partial = PartialModel(model, layout_of(model))
    tokenizer = tiny_tokenizer(bos=True)
    begin = begin_tokens(tokenizer)
    assert begin == [tokenizer.bos_token_id]
    texts = documents(bos=True)
    found = collect(
        partial, texts, LAYERS, model_id="x", begin=begin, sequence_length=33, batch_tokens=100, sample_size=40,
        progress=False,
    )  # fmt: skip
    sequences = sequences_of(list(pack_rows(texts, begin, 33)))
    assert all(sequence[0] == begin[0] for sequence in sequences)
    tolerance = 1e-4 if family in ("gptj", "gemma2") else 1e-9
    for layer in LAYERS:
        keys = plain_keys(model, partial, layer, sequences)
        assert found.tokens == keys.shape[0]
        torch.testing.assert_close(found.moments[layer], keys.T @ keys / keys.shape[0], rtol=tolerance, atol=tolerance)
        # every sampled key is one of the keys
        nearest = torch.cdist(found.samples[layer], keys).min(1).values
        assert found.samples[layer].shape[0] == 40
        assert float(nearest.max()) < 1e-3


def test_the_pass_stops_after_the_last_layer() -> None:
    model = tiny_model("llama")
    partial = PartialModel(model, layout_of(model))
    ran: list[int] = []
    for index, block in enumerate(partial.blocks):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    collect(partial, documents(), LAYERS, model_id="x", sequence_length=64, progress=False)
    assert set(ran) == {0, 1, 2}


def test_a_killed_run_ends_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    partial = PartialModel(model, layout_of(model))
    options: dict[str, Any] = {
        "model_id": "x", "sequence_length": 32, "batch_tokens": 64, "sample_size": 50, "progress": False,
    }  # fmt: skip
    whole = collect(partial, documents(), LAYERS, **options)
    real, calls = PartialModel.run, []

    def dying(self: PartialModel, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    checkpoint = tmp_path / "statistics.partial"
    monkeypatch.setattr(PartialModel, "run", dying)
    with pytest.raises(KeyboardInterrupt):
        collect(partial, documents(), LAYERS, checkpoint=checkpoint, checkpoint_seconds=0, run="r", **options)
    assert checkpoint.is_file()
    calls.append(1)
    resumed = collect(partial, documents(), LAYERS, checkpoint=checkpoint, checkpoint_seconds=0, run="r", **options)
    assert not checkpoint.exists()
    assert resumed.tokens == whole.tokens
    assert len(calls) - 5 < -(-whole.tokens // 64), "the batches before the interrupt were computed again"
    for layer in LAYERS:
        assert torch.equal(resumed.moments[layer], whole.moments[layer])
        assert torch.equal(resumed.samples[layer], whole.samples[layer])
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        collect(partial, documents(), LAYERS, checkpoint=checkpoint, checkpoint_seconds=0, run="r", **options)
    # Batches of another size are other batches: a count of them says nothing.
    wider = options | {"batch_tokens": 128}
    resumed = collect(partial, documents(), LAYERS, checkpoint=checkpoint, checkpoint_seconds=0, run="r", **wider)
    assert resumed.tokens == whole.tokens
    checkpoint.write_bytes(b"cut off")
    with pytest.warns(UserWarning, match="the pass begins anew"):
        again = collect(partial, documents(), LAYERS, checkpoint=checkpoint, run="r", **options)
    assert torch.equal(again.moments[LAYERS[0]], whole.moments[LAYERS[0]])


def test_enough_keys_end_the_pass_and_the_estimate_is_right() -> None:
    width, generator = 12, torch.Generator().manual_seed(3)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)

    def draw(count: int) -> dict[int, Tensor]:
        return {0: torch.randn(count, width, generator=generator, dtype=torch.float64) @ mixing}

    accumulator = KeyAccumulator([0], 8, parts=2)
    assert accumulator.error(draw(9)) == float("inf")
    for batch in range(40):
        accumulator.add(draw(50), batch)
    held_out = draw(200)
    estimate = accumulator.error(held_out)
    solved = torch.linalg.solve(accumulator.finish("x").moments[0], held_out[0].T)
    true = torch.linalg.solve(mixing.T @ mixing, held_out[0].T)
    actual = float(((solved - true).norm(dim=0) / true.norm(dim=0)).median())
    assert 0.6 * actual < estimate < 1.6 * actual

    partial = PartialModel(model := tiny_model("llama"), layout_of(model))
    many = documents(count=60)
    options: dict[str, Any] = {"model_id": "x", "sequence_length": 32, "batch_tokens": 64, "progress": False}
    loose = collect(partial, many, LAYERS, tolerance=0.9, **options)
    tight = collect(partial, many, LAYERS, tolerance=1e-6, **options)
    whole = collect(partial, many, LAYERS, **options)
    assert loose.tokens < tight.tokens == whole.tokens
    for layer in LAYERS:
        torch.testing.assert_close(tight.moments[layer], whole.moments[layer], rtol=1e-4, atol=1e-5)


def test_save_and_load_and_the_checks(tmp_path: Path) -> None:
    statistics = KeyStatistics({1: torch.eye(4)}, {1: torch.ones(3, 4)}, 9, "abc")
    statistics.save(tmp_path / "s.safetensors")
    loaded = KeyStatistics.load(tmp_path / "s.safetensors")
    assert torch.equal(loaded.moments[1], torch.eye(4))
    assert (loaded.tokens, loaded.model) == (9, "abc")
    loaded.check([1], 4, "abc")
    with pytest.raises(ValueError, match="another model: fingerprint abc, this model's is def"):
        loaded.check([1], 4, "def")
    with pytest.raises(ValueError, match=r"lack layers \[2\], they hold \[1\]"):
        loaded.check([1, 2], 4, "abc")
    with pytest.raises(ValueError, match=r"layer 1 are \(4, 4\), expected \(5, 5\)"):
        loaded.check([1], 5, "abc")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "s.safetensors").read_bytes()[:50])
    with pytest.raises(ValueError, match=r"cut\.safetensors cannot be read"):
        KeyStatistics.load(tmp_path / "cut.safetensors")


class TestCorpus:
    tokenizer = tiny_tokenizer()

    def test_forms_agree(self, tmp_path: Path) -> None:
        texts = tiny_texts(4)
        file = tmp_path / "corpus.txt"
        file.write_text("\n\n".join(texts), encoding="utf-8")
        from_strings = read_documents(texts, self.tokenizer, 1000)
        assert read_documents(file, self.tokenizer, 1000) == from_strings
        assert read_documents(from_strings, self.tokenizer, 1000) == from_strings
        assert read_documents(({"text": text} for text in texts), self.tokenizer, 1000) == from_strings

    def test_budget_is_kept_to_the_token(self) -> None:
        assert sum(map(len, read_documents(tiny_texts(20), self.tokenizer, 57))) == 57

    @pytest.mark.parametrize(
        ("corpus", "error", "message"),
        [
            ("/no/such/file.txt", ValueError, "does not exist"),
            ([{"body": "x"}], ValueError, "record 0 has no field 'text', it has"),
            ([3.5], TypeError, "corpus item 0 must be text"),
            ([""], ValueError, "holds no text"),
            (7, TypeError, "must be a path or an iterable"),
        ],
    )
    def test_bad_corpora(self, corpus: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            read_documents(corpus, self.tokenizer, 100)

    def test_sampled_text_is_repeatable_and_leaves_the_random_state(self) -> None:
        model = tiny_model("gpt2")
        torch.manual_seed(5)
        expected = torch.rand(1)
        torch.manual_seed(5)
        first = list(sample_documents(model, self.tokenizer, 50, length=16, batch_size=2))
        assert torch.equal(torch.rand(1), expected)
        assert sum(map(len, first)) == 50
        assert list(sample_documents(model, self.tokenizer, 50, length=16, batch_size=2)) == first


def test_keys_that_are_not_finite_are_refused() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3] = torch.inf
    with pytest.raises(ValueError, match="layer 1 gives keys that are not finite"):
        collect(PartialModel(model, layout_of(model)), documents(), LAYERS, model_id="x", progress=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["moments", "samples"])
def test_cached_statistics_that_are_not_finite_are_collected_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float, kind: str
) -> None:
    monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path))
    statistics = KeyStatistics({1: torch.eye(4, dtype=torch.float64)}, {1: torch.zeros(2, 4)}, 8, "model", "run")
    path = tmp_path / "statistics" / "run.safetensors"
    statistics.save(path)
    assert _cached("run") is not None
    getattr(statistics, kind)[1][1, 2] = value
    statistics.save(path)
    with pytest.warns(UserWarning, match="not finite; the statistics are collected anew"):
        assert _cached("run") is None
