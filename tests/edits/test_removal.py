"""Requests taken out of an edit set: against the plain sums in fp64, on disk, and between writers."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from store_cases import D, M, assert_same
from torch import Tensor

from coachhook_fast import EditConfig, EditRequest, EditSet
from coachhook_fast.cli import main
from coachhook_fast.edits import store
from coachhook_fast.edits.delta import LowRankDelta
from coachhook_fast.edits.edit_set import Batch, EditOutcome, LayerUpdate, Removed
from coachhook_fast.edits.manifest import MANIFEST
from coachhook_fast.edits.removal import removed_keys, without, without_requests
from coachhook_fast.edits.threshold import Threshold
from coachhook_fast.edits.whitening import whitened

COUNT = 4  # requests a batch
# Of each batch: the columns of each layer, and how many of them are its own.
COLUMNS = ([(0, 2, 1, 3), (1, 3, 0, 2)], [(1, 0, 2, 3), (0, 2, 3, 1)], [(0, 1, 2, 3), (0, 1, 2, 3)])
OWN = ((2, 2), (1, 3), (4, 0))
GONE = {"batch0": [2], "batch2": [0, 3]}


def batch_number(number: int) -> Batch:
    generator = torch.Generator().manual_seed(number)

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator, dtype=torch.float64)

    layers = tuple(
        LayerUpdate(matrix(D, COUNT), matrix(M, own), matrix(D, own), spread=matrix(D, own), requests=columns)
        for columns, own in zip(COLUMNS[number], OWN[number], strict=True)
    )
    outcomes = tuple(
        EditOutcome(EditRequest("{} is", f"Ann {number} {each}", "red"), 0.1, 3, (1.0, 2.0), 0.2)
        for each in range(COUNT)
    )
    time_made = f"2025-01-0{number + 1}T00:00:00+00:00"
    return Batch(f"batch{number}", time_made, outcomes, 1.5, layers, (Threshold(1.0 + number),) * 2)


def edit_set(*, whitening: bool = False, **changes: Any) -> EditSet:
    config = EditConfig(layers=(1, 2), mom2_update_weight=10.0, threshold_whitened=whitening, **changes)
    batches = tuple(batch_number(number) for number in range(3))
    deltas = []
    for position in range(2):
        delta = LowRankDelta.zeros(M, D, dtype=torch.float64)
        for batch in batches:
            delta = delta.append(batch.layers[position].residuals, batch.layers[position].directions)
        if whitening:
            delta = whitened(delta, *(everything(batches, position, name) for name in ("residuals", "spread")))
        deltas.append(delta)
    return EditSet("0123456789abcdef", config, ("The cat.",), tuple(deltas), batches[-1].thresholds, batches)


def everything(batches: Any, position: int, name: str) -> Tensor:
    return torch.cat([getattr(batch.layers[position], name) for batch in batches], dim=1)


def columns_of(edits: EditSet, position: int) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Subject -> its k [d], and its r [m] and x [d] where it edits the layer; by the mapping that a batch tells."""
    found = {}
    for batch in edits.batches:
        update = batch.layers[position]
        assert update.requests is not None
        own = update.residuals.shape[1]
        assert sorted(update.requests) == list(range(len(batch.outcomes)))
        for column, place in enumerate(update.requests):
            mine = slice(column, column + 1) if column < own else slice(0, 0)
            parts = update.keys[:, column], update.residuals[:, mine], update.directions[:, mine]
            found[batch.requests[place].subject] = parts
    return found


def no_calibration(*_: Any) -> Threshold:
    raise AssertionError("nothing is to be calibrated")


def test_what_is_left_is_the_sum_over_the_others() -> None:
    before = edit_set()
    asked: list[tuple[int, Tensor]] = []

    def calibrate(position: int, delta: LowRankDelta, own: Tensor) -> Threshold:
        asked.append((position, own))
        return Threshold(100.0 + position, 1.0, 2.0)

    after = without_requests(before, GONE, calibrate)
    gone = {"Ann 0 2", "Ann 2 0", "Ann 2 3"}
    assert {request.subject for request in before.requests} - {request.subject for request in after.requests} == gone
    for position in range(2):
        old, new = columns_of(before, position), columns_of(after, position)
        assert new.keys() == old.keys() - gone
        for subject, parts in new.items():
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(parts, old[subject], strict=True))
        plain = torch.zeros(M, D, dtype=torch.float64)
        for _, r, x in new.values():
            plain += r @ x.T
        torch.testing.assert_close(after.deltas[position].dense(), plain, rtol=1e-12, atol=1e-12)
        keys = removed_keys(before, GONE)[position]
        lost = torch.stack([old[subject][0] for subject in sorted(gone)], dim=1)
        torch.testing.assert_close(keys @ keys.T, lost @ lost.T)
    # τ is found anew where Δ is another, with the keys of the edits that are left
    assert [position for position, _ in asked] == [0]
    assert asked[0][1].shape == (D, 1 + 1 + 2)
    assert torch.equal(after.deltas[1].B, before.deltas[1].B)
    assert [threshold.value for threshold in after.thresholds] == [100.0, before.thresholds[1].value]
    assert [batch.thresholds for batch in after.batches] == [(), (), after.thresholds]
    # nothing of the old tensors is held on to
    kept = after.batches[0].layers[0].keys
    assert kept.untyped_storage().nbytes() == kept.nbytes == 3 * D * 8


def test_one_by_one_is_all_at_once() -> None:
    one = edit_set(whitening=True)
    for batch_id, place in (("batch2", 3), ("batch0", 2), ("batch2", 0)):
        one = without_requests(one, {batch_id: [place]}, lambda *_: Threshold(5.0))
    other = without_requests(edit_set(whitening=True), GONE, lambda *_: Threshold(5.0))
    assert_same(one, other)
    for mine, theirs in zip(one.deltas, other.deltas, strict=True):
        assert torch.equal(mine.B, theirs.B)
        assert torch.equal(mine.W, theirs.W)  # type: ignore[arg-type]
    assert one.thresholds == other.thresholds
    fresh = whitened(
        LowRankDelta(other.deltas[0].U, other.deltas[0].B),
        everything(other.batches, 0, "residuals"),
        everything(other.batches, 0, "spread"),
    )
    torch.testing.assert_close(other.deltas[0].W, fresh.W)


def test_all_of_a_batch_is_its_rollback_to_the_bit() -> None:
    """The last batch's too, of which the ledger knows the thresholds before it."""
    for name, calibrate in (("batch1", lambda *_: Threshold(7.0)), ("batch2", no_calibration)):
        one = without(edit_set(), name, calibrate)
        other = without_requests(edit_set(), {name: [3, 1, 0, 2]}, calibrate)
        assert_same(one, other)
        assert one.thresholds == other.thresholds
        assert all(torch.equal(a.B, b.B) for a, b in zip(one.deltas, other.deltas, strict=True))
        assert name not in [batch.id for batch in other.batches]
    nothing = without_requests(edit_set(), {f"batch{n}": range(COUNT) for n in range(3)}, no_calibration)
    assert nothing.batches == ()
    assert [delta.rank for delta in nothing.deltas] == [0, 0]
    assert [threshold.value for threshold in nothing.thresholds] == [float("inf")] * 2


def test_alpha_is_that_of_the_requests_that_are_left() -> None:
    edits = edit_set(gate="sequence", alpha=9.0)
    alphas = [((4.0, 2.0, 3.0, 5.0), (4.0,) * 4), ((8.0,) * 4, (1.5, 6.0, 6.0, 6.0)), ((), ())]
    batches = []
    for batch, of_layers in zip(edits.batches, alphas, strict=True):
        layers = [
            replace(up, alphas=a, alpha=min(a, default=3.5)) for up, a in zip(batch.layers, of_layers, strict=True)
        ]
        batches.append(replace(batch, layers=tuple(layers)))
    edits = replace(edits, batches=tuple(batches))

    def left(**gone: list[int]) -> list[float]:
        return [threshold.value for threshold in without_requests(edits, gone, no_calibration).thresholds]

    assert left(batch2=[0]) == [2.0, 1.5]
    assert left(batch0=[1]) == [3.0, 1.5]
    assert left(batch0=[1, 2], batch1=[0]) == [3.5, 3.5]  # nobody noted the requests' own in the last batch: it stands
    assert left(batch0=[1, 2], batch1=[0], batch2=[0, 1, 2, 3]) == [4.0, 4.0]
    assert left(batch0=range(4), batch1=range(4), batch2=range(4)) == [9.0, 9.0]  # type: ignore[arg-type]


# ------------------------------------------------------------------ what cannot be


@pytest.mark.parametrize("places", [[], [4], [-1], [True], ["0"], [0.0]])
def test_places_that_are_none(places: Any) -> None:
    with pytest.raises(ValueError, match="places in batch 'batch1' must be one or more of 0 to 3"):
        without_requests(edit_set(), {"batch1": places}, no_calibration)
    with pytest.raises(ValueError, match="batch_id 'other' is not in the ledger"):
        without_requests(edit_set(), {"other": [0]}, no_calibration)


def test_a_batch_of_an_earlier_version_tells_what_is_certain() -> None:
    """Where all requests edit a layer, or none, its columns are in their order; else the batch goes whole or not."""
    edits = edit_set()
    layers = [tuple(replace(up, requests=None) for up in batch.layers) for batch in edits.batches]
    edits = replace(edits, batches=tuple(replace(b, layers=up) for b, up in zip(edits.batches, layers, strict=True)))
    after = without_requests(edits, {"batch2": [1]}, lambda *_: Threshold(1.0))
    assert after.batches[2].layers[0].requests == (0, 1, 2)
    assert torch.equal(after.batches[2].layers[0].keys, edits.batches[2].layers[0].keys[:, [0, 2, 3]])
    for use in (
        lambda: without_requests(edits, {"batch0": [1]}, no_calibration),
        lambda: removed_keys(edits, {"batch0": [1]}),
    ):
        with pytest.raises(
            ValueError, match=r"batch 'batch0' was made by an earlier version.* roll the whole batch back"
        ):
            use()
    assert len(without(edits, "batch0", lambda *_: Threshold(1.0)).batches) == 2


def test_numbers_stay_those_of_the_batch_as_it_was_made() -> None:
    edits = edit_set()
    request = edits.batches[0].requests[1]
    edits = without_requests(edits, {"batch0": [1]}, lambda *_: Threshold(1.0))
    edits = edits.with_removed([Removed("batch0", 1, edits.batches[0].time, request, "today", "superseded", "batch2")])
    assert edits.numbers(edits.batches[0]) == (0, 2, 3)
    assert [edits.place_of("batch0", number) for number in (0, 2, 3)] == [0, 1, 2]
    with pytest.raises(
        ValueError, match="request 1 of batch 'batch0' is not there any more: superseded by batch 'batch2' at"
    ):
        edits.place_of("batch0", 1)
    with pytest.raises(ValueError, match=r"batch 'batch0' has no request 4: it has \[0, 2, 3\]"):
        edits.place_of("batch0", 4)
    with pytest.raises(ValueError, match="'other' is not in the ledger"):
        edits.place_of("other", 0)
    for index in (True, "1", 1.0, None):
        with pytest.raises(TypeError, match="index must be an integer"):
            edits.place_of("batch0", index)  # type: ignore[arg-type]


# ------------------------------------------------------------------ on disk


def taken_out(edits: EditSet, **gone: list[int]) -> EditSet:
    """As an editor does it: with a line for each in the ledger."""
    lines = [
        Removed(batch.id, edits.numbers(batch)[place], batch.time, batch.requests[place], "2025-02-01", "removed")
        for batch in edits.batches
        for place in gone.get(batch.id, ())
    ]
    return without_requests(edits, gone, lambda *_: Threshold(3.0)).with_removed(lines)


def test_it_is_gone_from_the_files_and_noted_in_the_ledger(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "edits"
    edits = edit_set(whitening=True)
    store.save(edits, folder)
    before = {path.name: path.stat() for path in folder.glob("*.safetensors")}
    less = taken_out(store.load(folder), batch1=[2])
    store.save(less, folder)
    after = {path.name: path.stat() for path in folder.glob("*.safetensors")}
    kept = before.keys() & after.keys()
    assert len(after) == 4
    assert len(kept) == 2  # the other batches' files: nobody wrote them again
    assert all(before[name].st_mtime_ns == after[name].st_mtime_ns for name in kept)
    (old,), (new,) = ({name for name in files if name.startswith("batch-")} - kept for files in (before, after))
    assert before[old].st_size - after[new].st_size > 0.2 * before[old].st_size  # a fourth of it, and the header
    found = store.load(folder)
    assert_same(found, less)
    assert found.removed == less.removed
    assert [up.requests for up in found.batches[1].layers] == [up.requests for up in less.batches[1].layers]
    assert main(["verify-edits", str(folder)]) == 0
    assert main(["log", "--edits", str(folder), "--facts"]) == 0
    assert capsys.readouterr().out.count("Ann 1 2 is") == 1  # among the removed ones alone
    # without: the same bytes as a set that it was never in, but for what the ledger says
    again = tmp_path / "again"
    store.save(replace(less, removed=()), again)
    assert {path.name for path in again.glob("*.safetensors")} == after.keys()


def test_columns_that_do_not_fit_the_keys_are_refused(tmp_path: Path) -> None:
    edits = edit_set()
    update = edits.batches[0].layers[0]
    wrong = replace(edits.batches[0], layers=(replace(update, keys=update.keys[:, :3]), edits.batches[0].layers[1]))
    store.save(replace(edits, batches=(wrong, *edits.batches[1:])), tmp_path)
    with pytest.raises(ValueError, match=r"batch 'batch0', 0.keys has 3 columns, of the requests"):
        store.load(tmp_path)


def test_two_writers_that_remove_from_one_batch(tmp_path: Path) -> None:
    """The batch keeps its id: what it holds tells that the other was there. Nothing acknowledged is lost."""
    store.save(edit_set(), tmp_path)
    first, second = store.load(tmp_path), store.load(tmp_path)
    store.save(taken_out(first, batch1=[0]), tmp_path)
    stale: list[Callable[[], EditSet]] = [
        lambda: taken_out(second, batch1=[1]),
        lambda: taken_out(second, batch1=[0]),
        lambda: second,
        lambda: without(second, "batch2", lambda *_: Threshold(1.0)),
    ]
    for make in stale[:1] + stale[2:]:
        with pytest.raises(store.ConflictError, match="of 3 batches up to 'batch2' and 1 removed edits"):
            store.save(make(), tmp_path)
    store.save(stale[1](), tmp_path)  # the same version, made twice
    store.save(taken_out(store.load(tmp_path), batch1=[0]), tmp_path)
    assert [one.index for one in store.load(tmp_path).removed] == [0, 1]


def test_a_kill_leaves_the_version_before_or_after(tmp_path: Path) -> None:
    folder, whole = tmp_path / "edits", edit_set()
    sets = [whole, taken_out(whole, batch1=[2]), taken_out(whole, batch0=[0, 1, 2, 3])]
    store.save(whole, folder)
    context = get_context("fork")
    rng = random.Random(0)
    for _ in range(20):
        ours, theirs = context.Pipe(duplex=False)
        writer = context.Process(target=_write, args=(sets, folder, theirs))
        writer.start()
        theirs.close()
        ours.recv()  # the first version is on disk
        time.sleep(rng.uniform(0, 0.02))
        assert writer.pid is not None
        writer.kill()
        writer.join()
        assert writer.exitcode == -signal.SIGKILL
        found = store.load(folder)  # which checks that updates and weights agree
        (wanted,) = [one for one in sets if store.state_of(one) == store.state_of(found)]
        assert_same(found, wanted)
    store.save(whole, folder, overwrite=True)
    assert len(list(folder.glob("*.safetensors"))) == 4
    assert (folder / MANIFEST).is_file()


def _write(sets: list[EditSet], folder: Path, started: Any) -> None:
    torch.set_num_threads(1)  # a forked process has none of its parent's OpenMP threads and would wait for them
    while True:
        for one in sets:
            store.save(one, folder, overwrite=True)
            started.send(None)
