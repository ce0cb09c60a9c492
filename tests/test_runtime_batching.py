"""Planning by its properties: nothing lost, nothing twice, no budget exceeded, always the same plan."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.batching import fill, plan
from runtime.errors import InputError
from runtime.settings import Limits

LENGTHS = st.lists(st.integers(1, 200), max_size=60)
SIMILAR = st.sampled_from([1, 20, 150]).flatmap(
    lambda least: st.lists(st.integers(least, 200), min_size=1, max_size=40)
)
LIMITS = st.builds(Limits, max_batch_tokens=st.integers(1, 400), max_batch_rows=st.integers(1, 12))


def cost(batch: list[int], lengths: list[int]) -> int:
    return len(batch) * max(lengths[i] for i in batch)


@given(LENGTHS, LIMITS)
def test_each_item_is_in_exactly_one_batch(lengths: list[int], limits: Limits) -> None:
    batches = plan(lengths, limits)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(batches)


@given(LENGTHS, LIMITS)
def test_no_budget_is_exceeded(lengths: list[int], limits: Limits) -> None:
    for batch in plan(lengths, limits):
        assert len(batch) <= limits.max_batch_rows
        assert len(batch) == 1 or cost(batch, lengths) <= limits.max_batch_tokens


@given(LENGTHS, LIMITS)
def test_item_over_the_budget_travels_alone(lengths: list[int], limits: Limits) -> None:
    for batch in plan(lengths, limits):
        if any(lengths[i] > limits.max_batch_tokens for i in batch):
            assert len(batch) == 1


@given(LENGTHS, LIMITS)
def test_neighbouring_batches_could_not_be_one(lengths: list[int], limits: Limits) -> None:
    """A batch is closed only because its successor's first item did not fit."""
    batches = plan(lengths, limits)
    for batch, following in itertools.pairwise(batches):
        more = [*batch, following[0]]
        assert len(more) > limits.max_batch_rows or cost(more, lengths) > limits.max_batch_tokens


@given(LENGTHS, LIMITS)
def test_plan_is_deterministic_and_leaves_its_input_alone(lengths: list[int], limits: Limits) -> None:
    before = list(lengths)
    assert plan(lengths, limits) == plan(tuple(lengths), limits)
    assert lengths == before


@given(LENGTHS, LIMITS)
def test_order_of_arrival_does_not_change_the_batches_costs(lengths: list[int], limits: Limits) -> None:
    there, back = plan(lengths, limits), plan(lengths[::-1], limits)
    assert [cost(b, lengths) for b in there] == [cost(b, lengths[::-1]) for b in back]


def test_similar_lengths_share_a_batch() -> None:
    assert plan([3, 100, 4, 90], Limits(max_batch_tokens=200, max_batch_rows=8)) == [[1, 3], [2, 0]]


def test_equal_lengths_keep_their_order() -> None:
    assert plan([5] * 5, Limits(max_batch_rows=2)) == [[0, 1], [2, 3], [4]]


def test_nothing_to_plan() -> None:
    assert plan([], Limits()) == []


@pytest.mark.parametrize("length", [0, -1])
def test_item_without_tokens_is_refused(length: int) -> None:
    with pytest.raises(InputError, match=f"item 1 has {length} tokens") as caught:
        plan([3, length], Limits())
    assert caught.value.cure


@pytest.mark.parametrize(
    "name", ["max_items", "max_text_chars", "max_request_tokens", "max_batch_tokens", "max_batch_rows"]
)
def test_limit_below_one_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} is 0; it must be at least 1"):
        Limits(**{name: 0})


@given(SIMILAR, st.integers(1, 8000), st.integers(1, 40), st.floats(0.1, 100))
def test_a_batch_has_the_first_item_and_keeps_within_its_limits(
    lengths: list[int], tokens: int, rows: int, break_even: float
) -> None:
    batch = fill(lengths, tokens, rows, break_even)
    assert 0 in batch
    assert len(set(batch)) == len(batch)
    found = [lengths[k] for k in batch]
    assert found == sorted(found)
    if len(batch) > 1:
        assert len(batch) <= rows
        assert len(batch) * found[-1] <= tokens
        padding = len(batch) * found[-1] - sum(found)
        assert padding <= max(break_even, 0.04 * len(batch) * found[-1])


@given(SIMILAR, st.integers(1, 8000), st.integers(1, 40), st.floats(0.1, 100))
def test_no_run_of_similar_lengths_would_do_more_for_its_cost(
    lengths: list[int], tokens: int, rows: int, break_even: float
) -> None:
    """Beside the batch that is chosen stand all runs of sorted items that leave out none of a length in between."""

    def worth(run: list[int]) -> float:
        return sum(run) / (break_even + len(run) * run[-1])

    batch = fill(lengths, tokens, rows, break_even)
    ascending, chosen = sorted(lengths), worth([lengths[k] for k in batch])
    for first, last in itertools.combinations(range(len(ascending) + 1), 2):
        run = ascending[first:last]
        if not run[0] <= lengths[0] <= run[-1] or (last < len(ascending) and ascending[last] == run[-1]):
            continue
        fits = all(
            len(part) == 1 or (len(part) <= rows and len(part) * run[-1] <= tokens)
            for part in (run[k:] for k in range(len(run)))
        )
        pads = max((len(run) - k) * run[-1] - sum(run[k:]) for k in range(len(run)))
        if fits and pads <= break_even:
            assert worth(run) <= chosen + 1e-9


def test_of_equal_lengths_the_first_in_turn_are_taken() -> None:
    assert fill([50, 50, 50, 50], 100, 8, 10.0) == [0, 1]
