"""`coachhook bench statistics`: key statistics in one packed pass, against a pass a layer over padded batches."""

from __future__ import annotations

import torch

from coachhook_fast.bench.rows import Row, baseline, once, row
from coachhook_fast.bench.workload import corpus
from coachhook_fast.model_defaults import default_layers
from coachhook_fast.models.architectures import layout_of
from coachhook_fast.models.loading import load_model
from coachhook_fast.models.passes.forward import PartialModel, frozen
from coachhook_fast.statistics.corpus import begin_tokens, pack_rows, read_documents, sample_documents, sequences_of
from coachhook_fast.statistics.key_statistics import KeyStatistics, collect

_LENGTH = 512


def run(model: str = "smollm2", tokens: int = 12_288, batch_tokens: int = 4096) -> list[Row]:
    """One row: seconds for `tokens` tokens, checked against the baseline's moments; the floor is the forward alone."""
    loaded, tokenizer = load_model(model, dtype=torch.float32)
    partial = PartialModel(loaded, layout_of(loaded))
    layers = default_layers(len(partial.blocks))
    text = corpus()
    if text is None:
        documents = list(sample_documents(loaded, tokenizer, tokens))
    else:
        documents = read_documents(text, tokenizer, tokens)
    begin = begin_tokens(tokenizer)
    rows = list(pack_rows(documents, begin, _LENGTH))
    sequences = sequences_of(rows)
    found: list[KeyStatistics] = []
    plain = baseline("layerwise_statistics")
    expected: list[dict[int, torch.Tensor]] = []

    def ours() -> None:
        found.append(
            collect(
                partial, documents, layers, model_id="", begin=begin, sequence_length=_LENGTH,
                batch_tokens=batch_tokens, progress=False,
            )
        )  # fmt: skip

    def theirs() -> None:
        expected.append(plain.second_moments(partial, sequences, layers, rows=16, pad_id=0))

    def forward_alone() -> None:
        whole = [row for row in rows if row[0].numel() == _LENGTH]
        each = max(1, batch_tokens // _LENGTH)
        for start in range(0, len(whole), each):
            ids, positions = zip(*whole[start : start + each], strict=True)
            partial.run({"input_ids": torch.stack(ids), "position_ids": torch.stack(positions)}, until=layers[-1])

    with frozen(loaded), torch.no_grad():
        once(forward_alone)
        # In turns, twice each: the machine's noise falls on all.
        taken = [(once(forward_alone), once(ours), once(theirs)) for _ in range(2)]
    floors, mine, others = (list(column) for column in zip(*taken, strict=True))
    error = max(
        float((found[0].moments[layer] - expected[0][layer]).norm() / expected[0][layer].norm()) for layer in layers
    )
    return [
        row(
            "key statistics",
            "a pass a layer, padded batches",
            mine,
            others,
            floor_seconds=min(floors),
            checked=error < 1e-5,
            dtype=torch.float32,
            shape=f"{model}, {tokens} tokens, layers {layers}",
            largest_difference=error,
            tokens_per_second=tokens / min(mine),
            over_forward_alone=min(mine) / min(floors),
        )
    ]
