"""Settings of the key statistics, and of the memory of the editor's passes."""

from __future__ import annotations

from dataclasses import dataclass

from coachhook_fast.config.checks import check_number, check_optional

# Most tokens in a pass of the editor, without a setting; on a GPU the first pass has as many, and shows what a token
# takes (models/passes/budget.py).
START_TOKENS = 8192


@dataclass(frozen=True)
class StatisticsSettings:
    """What E[kkᵀ] is read from, and how much at a time.

    Args:
        short_prefixes: share of the key statistics' tokens that are beginnings of texts, cut out of the corpus; they
            come on top of the token budget (docs/experiments/interfering-keys.md). None: .2 where `round_robin` is
            above 1, else 0.
        hard_negative_tokens: tokens of the corpus kept to find them in.
        mom2_n_tokens: token budget of the key statistics; None takes 20 d, or 10 d of the model's own text.
        mom2_tolerance: stop the statistics before the budget, once the estimated relative error of C⁻¹k is below it.
        stats_sequence_length: tokens a packed row of the statistics pass, capped by the model's context.
        max_batch_tokens: most tokens in one pass of the editor; bounds its memory. None: 8 192; for target values on a
            GPU, as many as its free memory is seen to hold.
    """

    short_prefixes: float | None = None
    hard_negative_tokens: int = 1_000_000
    mom2_n_tokens: int | None = None
    mom2_tolerance: float | None = None
    stats_sequence_length: int = 512
    max_batch_tokens: int | None = None

    def _check_statistics(self) -> None:
        check_optional("short_prefixes", self.short_prefixes, least=0.0)
        if self.short_prefixes is not None and self.short_prefixes >= 1:
            raise ValueError(f"short_prefixes must be a share under 1, got {self.short_prefixes}")
        check_number("hard_negative_tokens", self.hard_negative_tokens, least=0, integer=True)
        check_optional("mom2_n_tokens", self.mom2_n_tokens, least=1, integer=True)
        check_optional("mom2_tolerance", self.mom2_tolerance, above=0.0)
        check_number("stats_sequence_length", self.stats_sequence_length, least=2, integer=True)  # BOS and a token
        check_optional("max_batch_tokens", self.max_batch_tokens, least=1, integer=True)

    @property
    def pass_tokens(self) -> int:
        """Most tokens in a pass that is not differentiated."""
        return self.max_batch_tokens or START_TOKENS
