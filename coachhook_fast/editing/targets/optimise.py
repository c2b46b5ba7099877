"""Target values v* = v0 + δ of a whole batch at once (docs/method.md section 2, step 1).

For each request, δ minimises

    mean over contexts of NLL(target | context + prompt) + kl_factor KL(p0 || pδ) + v_weight_decay ||δ|| / ||v0||²
    + keep_factor mean over prompts to keep of KL(p0 || pδ) + continuation_factor KL(p0 || pδ after the target)

Paraphrases count among the contexts; targets of earlier facts about the subject add their NLL. The last two terms are
not the paper's (docs/experiments/specificity.md, docs/experiments/drift.md).

What does not depend on δ is computed once: the blocks up to the last edited one, and in the blocks above it the keys
and values of all tokens before the lookup position, which act as a fixed cache. A step then runs the upper blocks over
the few tokens from the lookup position on, and the output head at the target positions only. Every request has its own
δ, descent, projection and stopping rule; a request that has converged leaves the batch, on a GPU as soon as that
saves more than recording the smaller step anew costs (recorded.py).

Requests about one subject have nearly parallel keys: a layer cannot map one key to two values, and would give both the
mean of the two. Such requests share one δ, which minimises the mean of their losses, so that both can succeed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from coachhook_fast.config import EditConfig
from coachhook_fast.editing.targets.adam import ProjectedAdam
from coachhook_fast.editing.targets.descent import NormalisedDescent
from coachhook_fast.editing.targets.recorded import RecordedStep, Recording
from coachhook_fast.editing.targets.rows import TargetRows
from coachhook_fast.models.distributed import workers
from coachhook_fast.models.passes.budget import TokenBudget
from coachhook_fast.models.passes.forward import PartialModel
from coachhook_fast.models.passes.packed_rows import packed_modules
from coachhook_fast.models.tensor_parallel import is_tensor_parallel
from coachhook_fast.progress import Bar
from coachhook_fast.request import TokenisedRequest, TokenRow, by_subject

# Where rows are padded to the longest of their group: once a group has this many tokens a step, matrix products are
# at their full rate, and a cluster that would lengthen it by more than this share begins a group of its own. On a GPU a
# group also costs the recording of its step, worth some thousand tokens (docs/experiments/target-values-speed.md).
_ENOUGH_TOKENS = {"cpu": 256, "cuda": 4096}
_LENGTHENING = 1.2

# Without a learning rate of its own a request's δ moves by about this share of ||v0|| a step.
STEP_SHARE = 0.35

# Of the prompts to keep that are found for a request a step reads about so many, the next step others: all in every
# step would cost as many times more, ever the same few would keep nothing else (docs/experiments/specificity.md).
KEPT_A_STEP = 6

# A target that is not said after the steps planned gets up to so many times as many.
FURTHER_STEPS = 4


@dataclass(frozen=True)
class Target:
    """One request's target value.

    Attributes:
        value: v* [m]; loss: last loss; steps: Adam steps taken.
    """

    value: Tensor
    loss: float
    steps: int


def optimise(
    partial: PartialModel,
    last: int,
    batch: Sequence[TokenisedRequest],
    v0: Tensor,
    config: EditConfig,
    *,
    pad_id: int,
    whole_rows: bool,
    bar: Bar | None = None,
    only: Sequence[int] | None = None,
    known: Mapping[int, Target] | None = None,
    keep: Callable[[dict[int, Target]], None] | None = None,
    budget: TokenBudget | None = None,
    graphs: bool = True,
) -> list[Target]:
    """Target values of `batch`, or of its requests `only`, in their order.

    Args:
        last: last edited block; δ is added to its output.
        v0: [m, n] clean outputs at the lookup positions (`keys.bare_outputs`).
        whole_rows: feed the last target token too; only the `sequence` gate's statistics can tell the difference.
        bar: advanced by one a request.
        only: positions in the batch; with a request, all others about its subject.
        known: targets found before an interruption, by position in the batch; they are not sought again.
        keep: given the targets of each group as soon as they are found.
        budget: most tokens a group; it learns from every group. None: a fresh one of `max_batch_tokens`.
        graphs: record steps as CUDA graphs where the model allows it.

    Under torch.distributed the groups are shared out over the ranks, where each has a whole model, and every rank
    returns all targets.
    A group that does not fit the GPU's memory is halved.

    Raises:
        ValueError: a loss is not finite; the message names the request.
    """
    only = range(len(batch)) if only is None else only
    results = {index: _moved(target, v0.device) for index, target in (known or {}).items()}
    clusters = [members for members in by_subject(batch) if any(i in only and i not in results for i in members)]
    mine: dict[int, Target] = {}
    rank, world = workers(partial.model)
    budget = budget or TokenBudget(config.max_batch_tokens, partial.device)
    recording = Recording(partial.model, wanted=graphs)
    # groups are what ranks share, so several ranks want many
    enough: float = _ENOUGH_TOKENS["cpu" if world > 1 or partial.device.type != "cuda" else "cuda"]
    if world == 1 and packed_modules(partial, last, whole_rows) is not None:
        enough = math.inf
    waiting = _groups(clusters, batch, budget.tokens, enough)[rank::world]
    together = is_tensor_parallel(partial.model)  # all ranks are in one group, whatever the memory of one shows
    while waiting:
        if not together:  # what is left, by what the groups so far have shown
            left = [cluster for group in waiting for cluster in group]
            waiting = _groups(left, batch, budget.tokens, enough)
        group = waiting.pop(0)
        members = [index for cluster in group for index in cluster]
        tokens = _padded_tokens(members, batch)
        try:
            with budget.measured(tokens):
                rows = TargetRows.build(partial, last, [batch[index] for index in members], config, pad_id, whole_rows)
                sizes = [len(cluster) for cluster in group]
                if rows.inputs.masks is None:
                    recording.refuse("the model must make its attention masks in every pass")
                found = _Problem(partial, last, rows, v0[:, members].T, sizes, config, recording).solve()
        except torch.OutOfMemoryError:
            if len(group) == 1 or together:
                raise
            budget.too_many(tokens)
            waiting[:0] = [group[: len(group) // 2], group[len(group) // 2 :]]
            continue
        named = {members[position]: target for position, target in enumerate(found)}
        for index, target in named.items():
            if not bool(torch.isfinite(target.value).all()) or target.loss != target.loss:
                raise ValueError(f"requests[{index}] has a loss of {target.loss}: {batch[index].request.text!r}")
            if bar is not None:
                bar.advance(world, f"loss {target.loss:.3f} after {target.steps} steps")
        mine |= named
        if keep is not None:
            keep(named)
    for part in _from_all_ranks(mine, world):
        results |= {index: _moved(target, v0.device) for index, target in part.items()}
    return [results[index] for index in only]


class _Problem:
    """The optimisation of one group: clusters of requests, each cluster with one δ (most hold one request)."""

    def __init__(
        self,
        partial: PartialModel,
        last: int,
        rows: TargetRows,
        v0: Tensor,
        sizes: list[int],
        config: EditConfig,
        recording: Recording,
    ) -> None:
        self.partial = partial
        self.last = last
        # One part a step, in turns: more prompts are kept than a step has room for.
        self.parts = rows.parts(max(1, -(-(config.found_keep or 0) // KEPT_A_STEP)))
        # δ and its optimiser live in fp32 at least, whatever the model computes in.
        self.v0 = v0.to(torch.promote_types(v0.dtype, torch.float32))
        self.config = config
        self.recording = recording
        # The requests of each cluster at hand, by their order in the group.
        self.members = [list(range(sum(sizes[:c]), sum(sizes[: c + 1]))) for c in range(len(sizes))]
        self._number()
        lengths = torch.stack([part.min() for part in self.lengths.split(sizes)])
        bounds, width = config.clamp_norm_factor * lengths, self.v0.shape[1]
        self.planned = config.v_num_grad_steps
        self.taken = torch.zeros((), dtype=torch.int64, device=self.v0.device)
        self.descent: NormalisedDescent | ProjectedAdam
        if config.specific:
            self.descent = NormalisedDescent(STEP_SHARE * lengths, bounds, width, self.planned)
        else:
            # Adam moves each of m coordinates by about the rate, so δ by √m rates: a share of ||v0|| suits every model.
            rates = STEP_SHARE * lengths / width**0.5
            rates = torch.full_like(lengths, config.v_lr) if config.v_lr else rates
            self.descent = ProjectedAdam(rates, bounds, width)
        self.going = torch.ones_like(lengths, dtype=torch.bool)
        with torch.no_grad():
            self.clean = [part.log_p(torch.zeros_like(self.v0))[1] for part in self.parts]

    def _number(self) -> None:
        """What follows from `members`, on the device."""
        sizes = [len(members) for members in self.members]
        numbers = [c for c, size in enumerate(sizes) for _ in range(size)]
        self.cluster = torch.tensor(numbers, device=self.v0.device)  # [n] of each request at hand
        self.shares = self.v0.new_tensor([1.0 / size for size in sizes for _ in range(size)])
        self.lengths = self.v0[[i for members in self.members for i in members]].norm(dim=1)

    def solve(self) -> list[Target]:
        """Targets of the requests, in order."""
        found: dict[int, Target] = {}
        most = FURTHER_STEPS * self.planned if self.config.specific else self.planned
        steps = self._recorded_steps()
        for number in range(most):
            numbers = steps[number % len(steps)]()
            requests = [i for members in self.members for i in members]
            losses, going = dict(zip(requests, numbers, strict=False)), numbers[len(requests) :]
            gone = [c for c, goes in enumerate(going) if not goes and self.members[c][0] not in found]
            found |= self._targets(gone, losses, number)
            if not any(going):
                return [found[i] for i in range(len(found))]
            if steps[0].worth_shrinking(1 - sum(going) / len(going), most - number):
                self._keep([c for c, goes in enumerate(going) if goes])
                steps = self._recorded_steps()
        del steps  # a graph keeps the memory of its step
        self._keep([c for c, members in enumerate(self.members) if members[0] not in found])
        with torch.no_grad():
            losses_now = self._losses(0)[0].tolist()
        requests = [i for members in self.members for i in members]
        found |= self._targets(range(len(self.members)), dict(zip(requests, losses_now, strict=True)), most)
        return [found[i] for i in range(len(found))]

    def _recorded_steps(self) -> list[RecordedStep]:
        return [RecordedStep(functools.partial(self._step, part), self.recording) for part in range(len(self.parts))]

    def _places(self) -> list[range]:
        """Of each cluster: its requests' places among those at hand."""
        starts = [sum(map(len, self.members[:c])) for c in range(len(self.members))]
        return [range(start, start + len(members)) for start, members in zip(starts, self.members, strict=True)]

    def _targets(self, clusters: Sequence[int], losses: Mapping[int, float], step: int) -> dict[int, Target]:
        """Targets of the requests of `clusters` (positions among those at hand), by their δ of now."""
        with torch.no_grad():
            return {
                i: Target(self.v0[i] + self.descent.rows[c], losses[i], step) for c in clusters for i in self.members[c]
            }

    def _step(self, part: int) -> Tensor:
        """One step of the clusters that go on, on one part of the rows; [n + C] losses before it, then which clusters
        go on (0 or 1): those with a loss to lower and, once the steps planned are done, a target not said.

        Nothing in it waits for the device, so that it may be recorded.
        """
        losses, unsaid = self._losses(part)
        gradients = torch.autograd.grad((losses * self.shares).sum(), self.descent.rows)[0]
        with torch.no_grad():
            # NaN stops too, and is reported by the caller.
            is_open = (losses.double() >= self.config.v_loss_threshold) & (unsaid | (self.taken < self.planned))
            counts = torch.zeros_like(self.going, dtype=torch.float64).index_add(0, self.cluster, is_open.double())
            self.going &= counts > 0
            self.taken += 1
            self.descent.step(gradients, self.going)
            return torch.cat([losses.double(), self.going.double()])

    def _keep(self, clusters: list[int]) -> None:
        """Goes on with `clusters` alone (positions among those at hand)."""
        if len(clusters) == len(self.members):
            return
        places = self._places()
        kept = torch.tensor([place for c in clusters for place in places[c]], device=self.v0.device)
        self.clean = [clean[part.fixed_of(kept)] for clean, part in zip(self.clean, self.parts, strict=True)]
        self.parts = [part.select(kept) for part in self.parts]
        chosen = torch.tensor(clusters, device=self.v0.device)
        self.descent.select(chosen)
        self.going = self.going[chosen]
        self.members = [self.members[c] for c in clusters]
        self._number()

    def _losses(self, part: int) -> tuple[Tensor, Tensor]:
        """[n] losses of the n requests at hand on one part of the rows, and [n] whether the bare prompt gives another
        text than the target."""
        rows, clean = self.parts[part], self.clean[part]
        shifts = self.descent.rows.index_select(0, self.cluster)
        log_p, log_fixed = rows.log_p(shifts)
        nll = -log_p.gather(1, rows.targets[:, None])[:, 0] * rows.weights.to(log_p.dtype)
        kl = (clean.exp() * (clean - log_fixed)).sum(-1) * rows.fixed_weights.to(log_p.dtype)
        total = self.config.v_weight_decay * shifts.norm(dim=1) / self.lengths.square()
        total = total.to(log_p.dtype).index_add(0, rows.request, nll).index_add(0, rows.fixed_request, kl)
        wrong = ((log_p.detach().argmax(-1) != rows.targets) & rows.bare).double()
        return total, torch.zeros_like(total, dtype=torch.float64).index_add(0, rows.request, wrong) > 0


def _groups(
    clusters: Sequence[list[int]], batch: Sequence[TokenisedRequest], max_tokens: int, enough: float
) -> list[list[list[int]]]:
    """Clusters of like length together, at most `max_tokens` padded tokens a group (one cluster at least). `enough`:
    tokens of a step after which length matters."""

    def length(cluster: Sequence[int]) -> int:
        return max(_from_lookup(batch[i]) for i in cluster)

    def fits(group: Sequence[list[int]], cluster: list[int]) -> bool:
        shortest = length(group[0])
        step_tokens = sum(_rows(batch[i]) for members in group for i in members) * shortest
        lengthens = step_tokens >= enough and length(cluster) > _LENGTHENING * shortest
        return not lengthens and _padded_tokens([i for one in (*group, cluster) for i in one], batch) <= max_tokens

    groups: list[list[list[int]]] = []
    for cluster in sorted(clusters, key=length):
        if groups and fits(groups[-1], cluster):
            groups[-1].append(cluster)
        else:
            groups.append([cluster])
    return groups


def _padded_tokens(members: Sequence[int], batch: Sequence[TokenisedRequest]) -> int:
    """Tokens of the members' rows in one pass, their KL rows among them."""
    before = max(row.lookup for i in members for row in _all_rows(batch[i]))
    return sum(_rows(batch[i]) for i in members) * (before + max(_from_lookup(batch[i]) for i in members))


def _from_lookup(tokens: TokenisedRequest) -> int:
    return max(len(row.prompt) + len(row.target) - row.lookup for row in _all_rows(tokens))


def _all_rows(tokens: TokenisedRequest) -> tuple[TokenRow, ...]:
    return (*tokens.asking, *tokens.held, *tokens.keep)


def _rows(tokens: TokenisedRequest) -> int:
    """Rows of a step: these, and that of the KL term."""
    return len(_all_rows(tokens)) + 1


def _from_all_ranks(mine: dict[int, Target], world: int) -> list[dict[int, Target]]:
    if world == 1:
        return [mine]
    gathered: list[dict[int, Target]] = [{}] * world
    dist.all_gather_object(gathered, {index: _moved(target, torch.device("cpu")) for index, target in mine.items()})
    return gathered


def _moved(target: Target, device: torch.device) -> Target:
    return Target(target.value.to(device), target.loss, target.steps)
