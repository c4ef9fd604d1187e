"""The position of a run, and how it resumes after its batch size or its data changed."""

import copy
import json
from typing import Any

import pytest
import torch
from hypothesis import assume, given, strategies as st

from fundamentallm.data.sampler import Start, StepSampler
from fundamentallm.errors import ConfigError
from fundamentallm.run.progress import Progress, sampler_of
from tests.unit.test_hostile_input import scaled

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


def test_progress_restores_everything_it_saved() -> None:
    before = progress()
    for _ in range(5):
        before.count(torch.tensor(6.0), torch.tensor(3))
    before.validation_due = True
    again = restored(before.state_dict(), progress())
    assert repr(again.state_dict()) == repr(before.state_dict())
    assert (again.step, again.samples.start, len(again.segments)) == (5, Start(), 1)


@pytest.mark.parametrize("other", [{"samples": 12}, {"seed": 4}, {"seed": None}, {"content": "b"}, {"drop_last": True}])
def test_progress_with_other_data_begins_at_the_next_epoch(other: dict[str, Any]) -> None:
    saved = at(4, progress()).state_dict()  # 3 steps an epoch: in the middle of the second
    again = restored(saved, progress(**other))
    assert again.samples.start == Start(step=4, epoch=2, place=0, samples=14)
    assert again.samples.at(4).samples == saved["samples"] == 14
    at_epoch = restored(at(3, progress()).state_dict(), progress(**other))  # which skips no sample
    assert at_epoch.samples.start == Start(step=3, epoch=1, place=0, samples=10)


def broken(**changes: Any) -> dict[str, Any]:
    state = copy.deepcopy(at(5, progress()).state_dict())
    return {**state, **changes}


def with_start(*start: Any) -> dict[str, Any]:
    return broken(stretches=[{**progress().segments[0], "start": list(start)}])


@pytest.mark.parametrize(
    "state",
    [
        broken(step="5"), broken(step=6), with_start(6, 0, 0, 0), with_start(0, -1, 0, 0), with_start(0, 0, 10, 0),
        with_start(0, 0, 0.0, 0),
    ],
)  # fmt: skip
def test_progress_that_no_run_can_have_is_refused(state: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"step|samples"):
        progress().load_state_dict(state)


schedules = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 9)), max_size=3).map(
    lambda gaps: [[sum(gap for gap, _ in gaps[: i + 1]), size] for i, (_, size) in enumerate(gaps)]
)


def size_at(step: int, batch_size: int, schedule: list[list[int]]) -> int:
    return [size for begins, size in [[0, batch_size], *schedule] if begins <= step][-1]


@scaled(0.3)
@given(st.integers(1, 30), st.integers(1, 9), schedules, st.integers(1, 4), st.booleans())
def test_batches_follow_the_schedule_over_all_processes(
    samples: int, batch_size: int, schedule: list[list[int]], processes: int, drop_last: bool
) -> None:
    assume(not drop_last or samples >= max(batch_size, *(size for _, size in schedule), 1))
    options = {"num_processes": processes, "schedule": schedule, "drop_last": drop_last}
    ranks = [StepSampler(samples, batch_size, 3, rank, **options) for rank in range(processes)]
    made, order, seen, epochs = ranks[0], StepSampler(samples, samples, 3), list[int](), [0]
    for step in range(25):
        _, epoch, place, _ = made.at(step)
        size = size_at(step, batch_size, schedule)
        parts = [rank.rank_batch(step) for rank in ranks]
        batch = [index for part in parts for index in part.indices[: part.rows]]
        assert batch == made.batch(step) == order.batch(epoch)[place : place + size]
        assert made.at(step).samples == len(seen)
        assert made.epochs_before(step) == epoch + place / samples < made.epochs_before(step + 1)
        assert len(batch) == size or (not drop_last and place + len(batch) == samples)
        if epoch == len(epochs):
            epochs.append(step)
            assert made.steps_before_epoch(epoch) == step
        seen += batch
    if not drop_last:
        assert seen == [index for epoch in range(len(epochs)) for index in order.batch(epoch)][: len(seen)]


@scaled(0.3)
@given(st.integers(1, 30), st.integers(1, 9), schedules, st.integers(1, 3), st.none() | st.integers(1, 9))
def test_padded_micro_batches_follow_the_schedule(
    samples: int, batch_size: int, schedule: list[list[int]], processes: int, micro_batch_size: int | None
) -> None:
    rank = processes - 1
    padded, plain = (
        StepSampler(samples, batch_size, 3, rank, processes, micro_batch_size, pad=pad, schedule=schedule)
        for pad in (True, False)
    )
    for step in range(25):
        part, unpadded = padded.rank_batch(step), plain.rank_batch(step)
        assert part.indices[: part.rows] == unpadded.indices[: unpadded.rows]
        largest = -(-min(size_at(step, batch_size, schedule), samples) // processes)
        parts = -(-largest // (micro_batch_size or largest))
        assert len(part.indices) == part.micro_batches * -(-largest // parts)
        assert part.micro_batches <= parts


@given(st.integers(1, 30), st.integers(1, 9), st.integers(1, 9), schedules, schedules, st.integers(0, 12))
def test_progress_resumes_at_the_next_sample_with_other_batches(
    samples: int, before_size: int, size: int, one: list[list[int]], other: list[list[int]], step: int
) -> None:
    before = at(step, progress(samples, before_size, schedule=one))
    state = before.state_dict()
    counts = {name: state.pop(name) for name in ("tokens", "loss")}
    again = progress(samples, size, schedule=other)
    again.load_state_dict({**counts, **json.loads(json.dumps(state))})  # all else is JSON
    assert again.samples.at(step) == before.samples.at(step)
    for later in range(step, step + 12):
        _, epoch, place, _ = again.samples.at(later)
        expected = StepSampler(samples, samples, 3).batch(epoch)[place : place + size_at(later, size, other)]
        assert again.samples.batch(later) == sampler_of(again.segments[-1]).batch(later) == expected
        if place == 0 and epoch > again.samples.start.epoch:
            assert again.samples.steps_before_epoch(epoch) == later
    assert len(again.segments) == 1 + ((before_size, one) != (size, other))


def test_skip_holds_for_steps_after_the_checkpoint_and_is_recorded() -> None:
    plain = StepSampler(31, 4, 3)
    saved = at(4, progress(31)).state_dict()
    first = restored(saved, progress(31, skip=[[5, 6]]))  # the next step is left out
    assert [first.samples.batch(step) for step in (4, 5, 9)] == [plain.batch(step) for step in (6, 7, 11)]
    for step in (4, 7):  # again from the same checkpoint's step, and from later
        again = restored(at(step, first).state_dict(), progress(31, skip=[[5, 6]]))
        assert again.samples.batch(7) == plain.batch(9)
        assert sampler_of(again.segments[-1]).batch(7) == plain.batch(9)  # as `checkpoints samples` looks it up
        other = restored(at(step, first).state_dict(), progress(31, schedule=[[20, 5]], skip=[[5, 6]]))
        assert len(other.segments) == len(first.segments) + 1
        assert other.samples.batch(7) == plain.batch(9)  # they are not left out twice


def test_skip_of_steps_already_trained_is_refused() -> None:
    saved = at(5, progress(31, skip=[[2, 2]])).state_dict()
    restored(saved, progress(31, skip=[[2, 2], [6, 6]]))
    with pytest.raises(ConfigError) as caught:
        restored(saved, progress(31, skip=[[2, 2], [5, 9]]))
    assert [(problem.setting, problem.value) for problem in caught.value.problems] == [("data.skip", [[5, 9]])]
