"""Settings of the layers that are edited and of the solve that inserts the target values."""

from __future__ import annotations

from dataclasses import dataclass

from coachhook_fast.config.checks import as_tuple, check_optional


@dataclass(frozen=True)
class SolveSettings:
    """Which layers a batch edits, and what its update is solved against (docs/method.md section 2, steps 2 and 3).

    Args:
        layers: edited blocks, ascending; None takes `round_robin_layers` of the model in round-robin, else
            `default_layers`.
        round_robin: each batch edits every `round_robin`-th of `layers`, those with the fewest edits, and the others
            only learn something of its keys. 1, as in the paper, edits all; len(layers) one at a time.
            `calibrated` only (docs/experiments/round-robin.md). None: one at a time where `layers` is None and the gate
            is `calibrated`, else 1.
        other_layers_weight: how much of K Kᵀ a layer learns of the requests that others edit. In full, a thousand keys
            leave a new one no room in 1 536 dimensions; without, later updates change what the layer answers to them
            (docs/experiments/interfering-keys.md). None: .03 where `round_robin` is above 1.
        hard_negatives: most texts of the corpus a request in which another subject ends in the same token: their keys
            enter the batch's solve without a residual, so that the edit passes them by
            (docs/experiments/hard-negatives.md). None: 8 where `round_robin` is above 1, else 0, as in the paper.
        mom2_update_weight: λ of C = λ E[kkᵀ] + Σ KKᵀ; None takes `default_update_weight` (docs/experiments/lambda.md).
        layer_module_tmp: template of a block's name, for architectures this package does not know.
        rewrite_module_tmp: template of its down-projection's name.
    """

    layers: tuple[int, ...] | None = None
    round_robin: int | None = None
    other_layers_weight: float | None = None
    hard_negatives: int | None = None
    mom2_update_weight: float | None = None
    layer_module_tmp: str | None = None
    rewrite_module_tmp: str | None = None

    def _check_solve(self) -> None:
        as_tuple(self, "layers")
        if self.layers is not None:
            if not self.layers or not all(type(layer) is int and layer >= 0 for layer in self.layers):
                raise ValueError(f"layers must be one or more block numbers >= 0, got {self.layers}")
            if list(self.layers) != sorted(set(self.layers)):
                raise ValueError(f"layers must be ascending without repeats, got {self.layers}")
        check_optional("round_robin", self.round_robin, least=1, integer=True)
        if self.round_robin is not None and self.layers is not None and self.round_robin > len(self.layers):
            raise ValueError(f"round_robin must be at most the number of layers {self.layers}, got {self.round_robin}")
        check_optional("other_layers_weight", self.other_layers_weight, above=0.0)
        if self.other_layers_weight is not None and self.other_layers_weight > 1:
            raise ValueError(f"other_layers_weight must be at most 1, got {self.other_layers_weight}")
        check_optional("hard_negatives", self.hard_negatives, least=0, integer=True)
        check_optional("mom2_update_weight", self.mom2_update_weight, above=0.0)
