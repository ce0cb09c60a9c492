"""Planning by its properties: nothing lost, nothing twice, no budget exceeded, always the same plan."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import InputError
from runtime.scheduler import plan
from runtime.settings import Limits

LENGTHS = st.lists(st.integers(1, 200), max_size=60)
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
