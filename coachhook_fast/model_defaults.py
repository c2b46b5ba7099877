"""Defaults that follow from a model's sizes: which blocks are edited, and λ. Imports nothing of ours."""

from __future__ import annotations

# Width of keys, summed over round-robin layers: nine layers of SmolLM2 (docs/experiments/round-robin.md).
_SUMMED_WIDTH = 13_824


def round_robin_layers(num_layers: int, key_dim: int) -> tuple[int, ...]:
    """Edited blocks where none are named, in round-robin: `default_layers` and their neighbours on both sides.

    The fewer edits a layer holds, and the wider its keys, the further they stand from ordinary text: blocks are added
    until their widths add up to `_SUMMED_WIDTH`, from block 1 to the end of the first third of the model, behind which
    edits were seen to answer for other subjects (docs/experiments/round-robin.md). Gives 2-10 of 30 (SmolLM2, d 1 536),
    and the five of `default_layers` from d 3 072 on.
    """
    own = default_layers(num_layers)
    more = max(0, -(-_SUMMED_WIDTH // key_dim) - len(own))
    first = min(own[0], max(1, own[0] - more // 2))
    last = max(own[-1], min(num_layers // 3, own[-1] + more - more // 2))
    return tuple(range(first, last + 1))


def later_layers(num_layers: int, key_dim: int) -> tuple[int, ...]:
    """Edited blocks in round-robin where none are named and edits are `specific`: as many as have `_SUMMED_WIDTH` key
    coordinates together, five at least, about three eighths of the depth.

    The fewer edits a layer holds, and the wider its keys, the further they stand from ordinary text. Behind the blocks
    of `default_layers` a subject's state says more of what is asked about it: δ leaves the rest of the subject alone at
    less cost (docs/experiments/specificity.md). Gives 7-15 of 30 (SmolLM2).
    """
    count = min(max(1, num_layers - 2), max(5, -(-_SUMMED_WIDTH // key_dim)), max(2, num_layers // 3))
    first = max(min(1, max(0, num_layers - 1 - count)), round(0.37 * num_layers) - count // 2)
    return tuple(range(first, min(num_layers, first + count)))


def default_layers(num_layers: int) -> tuple[int, ...]:
    """Edited blocks where none are named and every batch edits all: five from about an eighth of the depth on.

    Gives 4-8 of 30 (SmolLM2) and 4-8 of 32 (Llama-2, as EasyEdit), close to the paper's 3-8 of 28 (GPT-J).
    See docs/experiments/layers.md.
    """
    first = max(0, round(num_layers * 0.13))
    last = min(first + 4, max(num_layers - 2, 0))
    return tuple(range(min(first, last), last + 1))


def default_update_weight(key_dim: int) -> float:
    """λ for keys of width d: d / 4, at most the paper's 15 000 (METHOD section 6, docs/experiments/lambda.md).

    The leverage s = kᵀ(λE)⁻¹k of an ordinary key averages d / λ, so this keeps it near 4 at every width.
    """
    return min(15_000.0, key_dim / 4)
