"""Statistics of a model's edited layers, from the disk cache where the same run was made before."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from coachhook_fast.config import EditConfig
from coachhook_fast.models.caches import if_possible, is_there
from coachhook_fast.models.distributed import everywhere
from coachhook_fast.models.loading import cache_dir, context_length
from coachhook_fast.models.passes.forward import PartialModel
from coachhook_fast.statistics.corpus import (
    Corpus,
    begin_tokens,
    content_hash,
    cut_documents,
    joined,
    read_documents,
    sample_documents,
    with_short_prefixes,
)
from coachhook_fast.statistics.key_statistics import KeyStatistics, collect, run_name

_SEED = 0


def model_statistics(
    partial: PartialModel,
    tokenizer: Any,
    config: EditConfig,
    model_id: str,
    key_dim: int,
    corpus: Corpus | None,
    *,
    max_tokens: int | None = None,
    earlier: str = "",
    progress: bool = True,
) -> KeyStatistics:
    """Key statistics of `config.layers`, cached by content: model, layers, corpus, token count, packing.

    Args:
        corpus: see `corpus.read_documents`; None lets the model write its own text.
        max_tokens: token budget; None takes `config.mom2_n_tokens`, or 20 d (10 d of the model's own text: writing a
            token costs far more than reading one), at least 4 096.
        earlier: run of the statistics that earlier edits were made with; taken where neither corpus nor budget is given
            and the cache still holds it.
    """
    if corpus is None and max_tokens is None and earlier:
        held = _cached(earlier)
        if everywhere(held is not None):
            assert held is not None
            return held
    budget = max_tokens if max_tokens is not None else config.mom2_n_tokens
    if budget is None:
        budget = max(4_096, (20 if corpus is not None else 10) * key_dim)
    if budget < 2:
        raise ValueError(f"max_tokens must be at least 2, got {budget}")
    assert config.layers is not None
    # A budget in tokens, cut to rows of a fixed length: a long context cannot blow it up.
    length = min(config.stats_sequence_length, context_length(partial.model) or config.stats_sequence_length)
    begin = begin_tokens(tokenizer)
    # What is kept to find hard negatives in may be more than what the statistics are of.
    text = None if corpus is None else read_documents(corpus, tokenizer, max(budget, config.hard_negative_tokens))
    documents = None if text is None else cut_documents(text, budget)
    run = run_name(
        model=model_id,
        layers=config.layers,
        corpus=f"self {_SEED}" if text is None else content_hash(text),
        tokens=budget,
        kept=config.hard_negative_tokens,
        tolerance=config.mom2_tolerance,
        length=length,
        keys=config.threshold_keys,
        begin=begin,
        modules=config.rewrite_module_tmp,
        # Edit sets of earlier versions know runs by these names: none for runs without, and that setting's first one.
        **({"openings": config.short_prefixes} if config.short_prefixes else {}),
    )
    held = _cached(run)
    if everywhere(held is not None):  # ranks that take them and ranks that read them would wait for one another
        assert held is not None
        return held
    if documents is None:
        documents = list(sample_documents(partial.model, tokenizer, budget, seed=_SEED, length=min(128, length)))
        text = documents
    assert text is not None
    share = config.short_prefixes or 0.0
    statistics = collect(
        partial,
        with_short_prefixes(documents, tokenizer, share),
        config.layers,
        model_id=model_id,
        begin=begin,
        sequence_length=length,
        batch_tokens=config.pass_tokens,
        sample_size=config.threshold_keys,
        total_tokens=round(budget / (1.0 - share)),
        tolerance=config.mom2_tolerance,
        checkpoint=_path(run).with_suffix(".partial"),
        run=run,
        progress=progress,
    )
    statistics = replace(statistics, run=run, text=joined(cut_documents(text, config.hard_negative_tokens)))
    with if_possible():
        statistics.save(_path(run))
    return statistics


def _path(run: str) -> Path:
    return cache_dir() / "statistics" / f"{run}.safetensors"


def _cached(run: str) -> KeyStatistics | None:
    if not is_there(_path(run)):
        return None
    try:
        held = KeyStatistics.load(_path(run))
        if not held.is_finite():
            raise ValueError(f"{_path(run)} holds statistics that are not finite")
        return held
    except ValueError as error:  # a disk that was full, or a copy that was cut off
        warnings.warn(f"{error}; the statistics are collected anew", stacklevel=3)
        return None
