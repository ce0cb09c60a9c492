"""Costs of batches and tokens of texts, learned from what comes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.cost import Density
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


def test_one_outlier_does_not_change_the_cost_much() -> None:
    cost = known(10.0, 1.0)
    for _ in range(50):
        cost.observe(100, 110.0)
        cost.observe(50, 60.0)
    cost.observe(100, 1e6)
    assert cost.batch_ms(100) < 150
