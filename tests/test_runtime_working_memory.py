"""An engine gives back the memory of a large batch once batches are small again, and not before."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from runtime.batch import make_batch
from runtime.bundle import Bundle
from runtime.embedder import open_embedder
from runtime.engines.working_memory import WorkingMemory

SMALL, LARGE = (1, 16), (16, 512)


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def memory(clock: Clock) -> WorkingMemory:
    return WorkingMemory(clock)


def after(clock: Clock, memory: WorkingMemory, seconds: float, shape: tuple[int, int] = SMALL) -> bool:
    clock.now_s += seconds
    return memory.is_excessive(*shape)


def test_a_large_batch_is_remembered_for_a_period_and_the_rest_of_its_own(clock: Clock, memory: WorkingMemory) -> None:
    assert not memory.is_excessive(*LARGE)
    assert [after(clock, memory, 10) for _ in range(7)] == [False] * 5 + [True, False]


def test_large_batches_now_and_then_keep_it(clock: Clock, memory: WorkingMemory) -> None:
    assert not any(after(clock, memory, 1, LARGE if second % 25 == 0 else SMALL) for second in range(600))


def test_it_goes_once_and_what_was_still_in_use_a_period_later(clock: Clock, memory: WorkingMemory) -> None:
    memory.is_excessive(*LARGE)
    assert [after(clock, memory, 20) for _ in range(12)] == [False, False, True, False, True, *[False] * 7]


def test_after_an_idle_time_the_first_batch_gives_it_back(clock: Clock, memory: WorkingMemory) -> None:
    memory.is_excessive(*LARGE)
    assert after(clock, memory, 3600)


def test_after_an_idle_time_a_large_batch_keeps_it(clock: Clock, memory: WorkingMemory) -> None:
    memory.is_excessive(*LARGE)
    assert not after(clock, memory, 3600, LARGE)


def test_nothing_goes_for_less_than_half(clock: Clock, memory: WorkingMemory) -> None:
    memory.is_excessive(4, 64)
    assert not any(after(clock, memory, 10, (2, 64)) for _ in range(20))
    assert any(after(clock, memory, 10, (1, 64)) for _ in range(20))


def test_long_rows_weigh_more_than_as_many_tokens_in_short_ones(clock: Clock, memory: WorkingMemory) -> None:
    memory.is_excessive(1, 8192)
    assert any(after(clock, memory, 10, (64, 128)) for _ in range(7))


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads resident memory from /proc")
def test_the_systems_memory_is_given_back(bundle: Bundle) -> None:
    """A batch of 8,192 tokens holds some 150 MiB of the mini checkpoint's engine."""
    embedder = open_embedder(bundle, "onnxruntime:fp32")
    clock = Clock()
    engine = embedder.loaded.engine
    engine._memory = WorkingMemory(clock)  # type: ignore[attr-defined]
    small, large = (make_batch([[9] * width] * rows, embedder.contract.pad_id) for rows, width in (SMALL, LARGE))
    vectors = engine.run(small)
    before = private_mib()
    engine.run(large)
    engine.run(small)
    assert private_mib() > before + 100
    clock.now_s += 100
    assert np.array_equal(engine.run(small), vectors)
    assert private_mib() < before + 20
    embedder.close()


def private_mib() -> float:
    found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1024
