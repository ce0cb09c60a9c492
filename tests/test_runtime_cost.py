"""Costs of batches and tokens of texts, learned from what comes."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.cost import CostModel, Density, _solved
from tests.queues import known


def test_tokens_are_foreseen_from_bytes() -> None:
    density = Density()
    assert density.tokens("", ["anything"], 100) == 0, "nothing is known yet"
    density.observe("", ["four char" * 4], 9)
    assert density.tokens("", ["x" * 400], 1000) == 100
    assert density.tokens("p" * 40, ["x" * 400] * 2, 1000) == 220, "the prompt stands before each text"
    assert density.tokens("", ["x" * 400, "x" * 40], 50) == 60, "cut to 50 tokens each"
    assert density.tokens("", ["щ" * 2000], 10**6) == 1000, "two bytes each"
    assert density.tokens("", ["x" * 40, "x" * 4] * 500, 1000) == 5500
    assert density.tokens("", [], 1000) == 0
    assert density.tokens("", ["\ud800"], 1000) == 0, "half a character is refused later"
    density.observe("", [""], 1)
    for _ in range(200):
        density.observe("", ["xx" * 50], 50)
    assert density.tokens("", ["x" * 400], 1000) == pytest.approx(200, abs=2), "it follows what comes"


def test_no_single_request_makes_up_what_others_are_foreseen_to_have() -> None:
    density = Density()
    for _ in range(20):
        density.observe("", ["x" * 400], 100)
    density.observe("p" * 200, ["a"], 51)  # a query of one letter after a long prompt
    density.observe("", ["a"], 2)
    assert density.tokens("", ["x" * 400], 1000) == pytest.approx(100, abs=2)
    density.observe("", ["\U0001f600" * 250_000], 1_000_000)  # a token for each byte
    assert density.tokens("", ["x" * 400], 1000) < 300


@given(st.floats(0.1, 100), st.floats(0.001, 5))
def test_the_cost_is_learned(fixed_ms: float, token_ms: float) -> None:
    cost = known(fixed_ms, token_ms)
    assert cost.batch_ms(500) == pytest.approx(fixed_ms + 500 * token_ms, rel=1e-3)
    for _ in range(300):  # the machine becomes twice as slow, and all batches are of one size
        cost.observe(100, 2 * (fixed_ms + 100 * token_ms))
    assert cost.batch_ms(100) == pytest.approx(2 * (fixed_ms + 100 * token_ms), rel=0.05)
    assert cost.fixed_ms >= 0
    assert cost.token_ms >= 0


@given(st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_few_equations_are_solved_as_numpy_does(size: int, seed: int) -> None:
    chance = np.random.default_rng(seed)
    rows = chance.lognormal(size=(8, size))
    left, right = rows.T @ rows + 0.0025 * np.eye(size), chance.normal(size=size)
    assert _solved(left.tolist(), right.tolist()) == pytest.approx(np.linalg.solve(left, right).tolist(), rel=1e-6)


def test_one_outlier_does_not_change_the_cost_much() -> None:
    cost = known(10.0, 1.0)
    for _ in range(50):
        cost.observe(100, 110.0)
        cost.observe(50, 60.0)
    cost.observe(100, 1e6)
    assert cost.batch_ms(100) < 150


def test_attention_of_long_texts_is_told_from_what_every_batch_costs() -> None:
    """A line through these has no fixed cost at all, and batches would be far too small to be efficient."""
    cost, chance = CostModel(), random.Random(0)

    def true_ms(rows: int, width: int) -> float:
        return 1.0 + rows * width * (0.06 + 9e-5 * width)

    for rows, width in ((1, 16), (4, 16), (1, 64), (4, 64), (1, 256), (4, 256)):
        cost.observe(rows * width, true_ms(rows, width), width)
    for _ in range(200):
        width = chance.choice([12, 20, 40, 80, 160, 300, 500])
        rows = max(1, chance.randrange(400) // width)
        cost.observe(rows * width, true_ms(rows, width) * chance.uniform(0.85, 1.15), width)
    assert cost.fixed_ms == pytest.approx(1.0, rel=0.2)
    for rows, width in ((32, 15), (1, 500), (4, 128)):
        assert cost.batch_ms(rows * width, width) == pytest.approx(true_ms(rows, width), rel=0.05)


def test_batches_of_one_shape_say_how_fast_the_machine_is_and_no_more() -> None:
    cost = CostModel()
    for rows, width in ((1, 16), (4, 16), (1, 64), (4, 64), (1, 256), (4, 256)) * 20:
        cost.observe(rows * width, 1.0 + rows * width * (0.06 + 9e-5 * width), width)
    for _ in range(400):
        cost.observe(20, 3 * (1.0 + 20 * (0.06 + 9e-5 * 20)), 20)
    assert cost.batch_ms(20, 20) == pytest.approx(3 * (1.0 + 20 * (0.06 + 9e-5 * 20)), rel=0.01)
    assert cost.batch_ms(1024, 256) == pytest.approx(3 * (1.0 + 1024 * (0.06 + 9e-5 * 256)), rel=0.2)


def test_full_batches_alone_do_not_make_up_another_fixed_cost() -> None:
    """Saturated, every batch has the size that was best, and says next to nothing of a smaller one."""
    cost, chance = CostModel(), random.Random(1)

    def observe(rows: int, width: int) -> None:
        true_ms = 1.0 + rows * width * (0.06 + 9e-5 * width)
        cost.observe(rows * width, true_ms * chance.uniform(0.9, 1.1), width)

    for rows, width in ((1, 16), (4, 16), (1, 64), (4, 64), (1, 256), (4, 256)):
        observe(rows, width)
    for _ in range(1000):
        width = chance.choice([12, 20, 40, 80, 160, 300, 500])
        observe(max(1, cost.efficient_tokens(0.97) // width), width)
        assert 200 < cost.efficient_tokens(0.97) < 800


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.05])
def test_batches_are_as_large_as_they_may_be_where_tokens_cost_nothing(noise: float) -> None:
    """As on a GPU whose time is that of starting its kernels: a small budget would throw nearly all of it away."""
    cost, chance = CostModel(), random.Random(1)
    for _ in range(300):
        for tokens in (16, 64, 256, 1024, 4096):
            cost.observe(tokens, 5.0 * chance.uniform(1 - noise, 1 + noise), 64)
    assert cost.break_even_tokens > 20_000
    assert cost.efficient_tokens(0.97) > 100_000
    assert CostModel().break_even_tokens == 0, "of which nothing is known"
