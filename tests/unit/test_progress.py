"""The place in a run, and how it goes on where batches or data have changed."""

from __future__ import annotations

import copy
import itertools
import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fundamentallm.data.sampler import Start, StepSampler
from fundamentallm.run.progress import Progress, sampler_of

CPU = torch.device("cpu")


def progress(
    samples: int = 10, batch_size: int = 4, seed: int | None = 3, content: str = "a", **options: Any
) -> Progress:
    return Progress(StepSampler(samples, batch_size, seed, **options), [content, None], CPU)


def at(step: int, made: Progress) -> Progress:
    made.step = step
    return made


def restored(state: dict[str, Any], made: Progress) -> Progress:
    """As from a checkpoint: no object is shared."""
    made.load_state_dict(copy.deepcopy(state))
    return made


def test_a_saved_place_comes_back_whole() -> None:
    before = at(5, progress())
    before.tokens += 70
    before.loss.add(torch.tensor(6.0), torch.tensor(3))
    before.validation_due = True
    again = restored(before.state_dict(), progress())
    assert repr(again.state_dict()) == repr(before.state_dict())
    assert (again.step, again.samples.start, len(again.segments)) == (5, Start(), 1)


def test_all_but_the_counts_is_json() -> None:
    state = at(5, progress()).state_dict()
    del state["tokens"], state["loss"]
    assert json.loads(json.dumps(state)) == state


@given(st.integers(1, 30), st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=2, max_size=5))
def test_after_changes_of_the_batch_size_every_sample_of_every_epoch_is_still_seen_once(
    samples: int, stretches: list[tuple[int, int]]
) -> None:
    state, seen = None, list[int]()
    for batch_size, steps in stretches:
        run = progress(samples, batch_size)
        if state is not None:
            run.load_state_dict(copy.deepcopy(state))
        for _ in range(steps):
            assert run.samples.samples_before(run.step) == len(seen)
            seen += run.samples.batch(run.step)
            run.step += 1
        state = run.state_dict()
    for _ in range(samples):  # to the end of the epoch, at most
        if len(seen) % samples:
            seen += run.samples.batch(run.step)
            run.step += 1
    order = StepSampler(samples, samples, 3)
    assert seen == list(itertools.chain(*(order.batch(epoch) for epoch in range(len(seen) // samples))))


def test_every_stretch_stays_known_and_names_its_batches() -> None:
    runs = [at(3, progress(batch_size=4))]
    for step, batch_size in ((5, 3), (9, 2)):
        runs.append(at(step, restored(runs[-1].state_dict(), progress(batch_size=batch_size))))
    assert [stretch["start"][0] for stretch in runs[-1].segments] == [0, 3, 5]
    for run, stretch in zip(runs, runs[-1].segments, strict=True):
        first = stretch["start"][0]
        assert [sampler_of(stretch).batch(first + i) for i in range(9)] == [
            run.samples.batch(first + i) for i in range(9)
        ]


@pytest.mark.parametrize("other", [{"samples": 12}, {"seed": 4}, {"seed": None}, {"content": "b"}, {"drop_last": True}])
def test_other_data_begins_at_the_next_epoch(other: dict[str, Any]) -> None:
    saved = at(4, progress()).state_dict()  # 3 steps an epoch: in the middle of the second
    again = restored(saved, progress(**other))
    assert again.samples.start == Start(step=4, epoch=2, place=0, samples=14)
    assert again.samples.samples_before(4) == saved["samples"] == 14


def test_other_data_between_two_epochs_leaves_none_out() -> None:
    again = restored(at(3, progress()).state_dict(), progress(content="b"))
    assert again.samples.start == Start(step=3, epoch=1, place=0, samples=10)


def broken(**changes: Any) -> dict[str, Any]:
    state = copy.deepcopy(at(5, progress()).state_dict())
    return {**state, **changes}


def with_start(*start: Any) -> dict[str, Any]:
    stretch = progress().segments[0]
    return broken(stretches=[{**stretch, "start": list(start)}])


@pytest.mark.parametrize(
    "state",
    [
        broken(step=-1), broken(step="5"), broken(step=None), broken(step=5.0), broken(step=6), broken(samples=17),
        broken(tokens=torch.zeros(2)), broken(loss={"totals": torch.zeros(())}),
        with_start(6, 0, 0, 0), with_start(0, -1, 0, 0), with_start(0, 0, -4, 0), with_start(0, 0, 10, 0),
        with_start(0, 0, 0, -1), with_start(0, 0, 0.0, 0), with_start(0, 0, "0", 0), with_start(True, 0, 0, 0),
    ],
)  # fmt: skip
def test_a_place_that_no_run_can_be_at_is_refused(state: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"step|place|samples|shape"):
        progress().load_state_dict(state)


schedules = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 9)), max_size=3).map(
    lambda gaps: [[sum(gap for gap, _ in gaps[: i + 1]), size] for i, (_, size) in enumerate(gaps)]
)


def size_at(step: int, batch_size: int, schedule: list[list[int]]) -> int:
    return [size for begins, size in [[0, batch_size], *schedule] if begins <= step][-1]


@given(st.integers(1, 30), st.integers(1, 9), schedules, st.integers(1, 4), st.booleans())
def test_batches_follow_the_schedule_and_see_every_sample_of_every_epoch_once(
    samples: int, batch_size: int, schedule: list[list[int]], processes: int, drop_last: bool
) -> None:
    if drop_last and samples < max(batch_size, *(size for _, size in schedule), 1):
        return
    options = {"num_processes": processes, "schedule": schedule, "drop_last": drop_last}
    shares = [StepSampler(samples, batch_size, 3, rank, **options) for rank in range(processes)]
    made, order, seen, epochs = shares[0], StepSampler(samples, samples, 3), list[int](), [0]
    for step in range(25):
        epoch, place = made.place(step)
        parts = [share.rank_batch(step) for share in shares]
        batch = [index for part in parts for index in part.indices[: part.rows]]
        assert batch == made.batch(step) == order.batch(epoch)[place : place + size_at(step, batch_size, schedule)]
        assert made.samples_before(step) == len(seen)
        assert made.epochs_before(step) == epoch + place / samples < made.epochs_before(step + 1)
        sizes = sorted({size_at(step, batch_size, schedule), size_at(99, batch_size, schedule)})
        assert sorted(map(int, made.sizes_from(step).split(" to "))) == sizes
        assert len(batch) == size_at(step, batch_size, schedule) or (not drop_last and place + len(batch) == samples)
        assert all(len(part.indices) >= part.micro_batches == 1 for part in parts)
        if epoch == len(epochs):
            epochs.append(step)
            assert made.steps_before_epoch(epoch) == step
        seen += batch
    if not drop_last:
        assert seen == [index for epoch in range(len(epochs)) for index in order.batch(epoch)][: len(seen)]


@given(st.integers(1, 30), st.integers(1, 9), schedules, st.integers(1, 3), st.none() | st.integers(1, 9))
def test_even_micro_batches_are_filled_up_for_their_own_batch_size_only(
    samples: int, batch_size: int, schedule: list[list[int]], processes: int, micro_batch_size: int | None
) -> None:
    made = StepSampler(samples, batch_size, 3, 0, processes, micro_batch_size, pad=True, schedule=schedule)
    for step in range(25):
        share, size = made.rank_batch(step), min(size_at(step, batch_size, schedule), samples)
        rows = len(share.indices) // share.micro_batches
        assert len(share.indices) == rows * share.micro_batches
        assert rows <= (micro_batch_size or size)
        alone = StepSampler(samples, size, 3, 0, processes, micro_batch_size, pad=True).rank_batch(0)
        assert rows == len(alone.indices) // alone.micro_batches


@given(st.integers(1, 30), st.integers(1, 9), schedules, schedules, st.integers(0, 12), st.booleans())
def test_a_saved_place_within_a_schedule_goes_on_also_in_another(
    samples: int, batch_size: int, one: list[list[int]], other: list[list[int]], step: int, changes: bool
) -> None:
    before = at(step, progress(samples, batch_size, schedule=one))
    schedule = other if changes else one
    state = json.loads(json.dumps({k: v for k, v in before.state_dict().items() if k not in ("tokens", "loss")}))
    again = progress(samples, batch_size, schedule=schedule)
    again.load_state_dict({**before.state_dict(), **state})
    for later in range(step, step + 12):
        epoch, place = again.samples.place(later)
        assert (
            again.samples.batch(later)
            == StepSampler(samples, samples, 3).batch(epoch)[place : place + size_at(later, batch_size, schedule)]
        )
        assert sampler_of(again.segments[-1]).batch(later) == again.samples.batch(later)
    assert again.samples.samples_before(step) == before.samples.samples_before(step)
    assert len(again.segments) == 1 + (one != schedule)
