"""`pytest bench/bench_serving.py`: the functions of `coachhook bench serving` under pytest-benchmark."""

from __future__ import annotations

from typing import Any

import pytest

from coachhook_fast.bench import serving
from coachhook_fast.hooks.load_edits import load_edits
from coachhook_fast.models.loading import load_model


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, Any]:
    model, tokenizer = load_model("smollm2", dtype="float32")
    model.generation_config.eos_token_id = None  # type: ignore[union-attr]
    return load_edits(model, serving.edits_folder()), tokenizer


@pytest.mark.parametrize("batch", serving.BATCHES)
@pytest.mark.parametrize("side", ["edited", "unedited"])
def test_generate(benchmark: Any, smollm2: tuple[Any, Any], batch: int, side: str) -> None:
    model, tokenizer = smollm2
    model.coachhook.enable() if side == "edited" else model.coachhook.disable()
    benchmark.group = f"generate(), batch {batch}"
    benchmark.pedantic(serving._generate(model, serving._inputs(tokenizer, batch)), rounds=3, warmup_rounds=1)
