"""`f2rt diff` and vectors: how far they move, which texts move, and whether an index can be kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from calibration.texts import Text
from export import compare, embedded
from export.compare import choose
from export.diff import EVERY
from export.moves import excerpt, judge, less_precise, measure
from runtime.bundle import Bundle, Manifest, open_bundle, write_manifest
from runtime.errors import BundleError, InputError
from runtime.policy import Policy
from runtime.tolerances import TOLERANCES
from tests.bundles import forge_fingerprint
from tests.diffs import FP32, INT8, TEXTS, compared, said


def rewritten(bundle: Bundle, change: Callable[[Manifest], Manifest]) -> Bundle:
    """Write another manifest whose fingerprints and verdicts fit it."""
    write_manifest(bundle.folder, change(bundle.manifest))
    return forge_fingerprint(open_bundle(bundle.folder))


def test_a_bundle_against_itself_is_identical(int8_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.loader.has_fast_int8_products", lambda: True)
    report = compared(int8_bundle, int8_bundle)
    assert report.verdict == "identical vectors"
    assert report.changes == []
    assert not report.moved
    assert report.a.engine == report.b.engine == INT8  # the fastest
    assert report.moves is not None
    assert report.moves.top10_overlap == report.moves.mixed_top10_overlap == report.moves.mixed_found_again == 1.0
    assert [s.texts for s in report.moves.moved] == [0, 0, 0]
    assert report.notes == ["A and B are the same engine, by its fingerprint"]


def test_engines_of_one_bundle_are_compared_by_the_less_precise_ones_limits(int8_bundle: Bundle) -> None:
    report = compared(int8_bundle, int8_bundle, engine_a=FP32, engine_b=INT8)
    assert report.moves is not None
    assert report.moves.cosine is not None
    assert report.judgement is not None
    assert report.judgement.limits == TOLERANCES["int8"]
    assert TOLERANCES["int8"].min_cosine < report.moves.cosine.min < TOLERANCES["fp32"].min_cosine
    assert report.verdict.startswith("interchangeable within 0.0")
    assert report.verdict.endswith("no re-embed needed (the limit for int8 is 0.03)")
    assert report.moves.moved[0].share > 0.9
    lines = said(report.changes)
    assert lines["the two engines: precision"][:2] == ("fp32", "int8")
    assert lines["the two engines: quantization"][1].startswith("INT8, ")
    worst = report.moves.worst
    assert len(worst) == 10
    assert [t.cosine for t in worst] == sorted(t.cosine for t in worst)
    assert worst[0].cosine == report.moves.cosine.min
    strict = Policy("strict", {**TOLERANCES, "int8": TOLERANCES["fp32"]})
    again = compared(int8_bundle, int8_bundle, engine_a=FP32, engine_b=INT8, policy=strict)
    assert again.moved
    assert again.verdict.startswith("re-embed: the smallest cosine is 0.9")


def test_changed_prompts_are_named_and_move_the_texts_that_use_them(bundle_copy: Bundle, bundle: Bundle) -> None:
    prompts = {**bundle.manifest.contract.prompts, "query": "Something else altogether: ", "title": "T: "}
    other = rewritten(bundle_copy, lambda m: replace(m, contract=replace(m.contract, prompts=prompts)))
    report = compared(bundle, other)
    lines = said(report.changes)
    assert lines["contract: prompt query"][1:] == ('"Something else altogether: "', "texts with prompt query")
    assert lines["contract: prompt title"][0] == "not there"
    assert report.moved
    assert report.verdict.startswith("re-embed: the smallest cosine is ")
    assert report.judgement is not None
    assert report.judgement.reasons[1].startswith("the mean cosine is ")
    assert report.moves is not None
    assert {t.prompt for t in report.moves.worst} == {"query"}
    assert report.notes == ["prompt title differs and no text names it: what it moves was not measured"]
    documents = compared(bundle, other, [t for t in TEXTS if t.prompt != "query"])
    assert documents.verdict == "identical vectors"
    assert documents.notes[0].startswith("prompt query differs and no text names it")


def test_a_prompt_that_only_one_side_has_is_counted(bundle_copy: Bundle, bundle: Bundle) -> None:
    other = rewritten(bundle_copy, lambda m: replace(m, contract=replace(m.contract, prompts={"document": ""})))
    report = compared(bundle, other)
    queries = sum(t.prompt == "query" for t in TEXTS)
    assert f"B has no prompt 'query': {queries} texts were embedded without one there" in report.notes
    assert report.moved


def test_texts_without_a_prompt_get_the_default_one(bundle_copy: Bundle, bundle: Bundle) -> None:
    """What a caller who names no prompt gets has changed, and that is what an index holds."""
    other = rewritten(bundle_copy, lambda m: replace(m, contract=replace(m.contract, default_prompt_name="query")))
    report = compared(bundle, other, [replace(t, prompt=None) for t in TEXTS])
    assert report.moved
    named = compared(bundle, other, [t for t in TEXTS if t.prompt])
    assert named.verdict == "identical vectors"
    assert named.notes == ["the default prompt differs and every text names one: what it moves was not measured"]


def test_a_shorter_limit_moves_long_texts_alone(bundle_copy: Bundle, bundle: Bundle) -> None:
    other = rewritten(bundle_copy, lambda m: replace(m, contract=replace(m.contract, max_tokens=96)))
    long = Text("long", "The quick brown fox jumps over the lazy dog. " * 30)
    report = compared(bundle, other, [*TEXTS, long])
    assert report.moves is not None
    far = [t for t in report.moves.worst if t.cosine < 1 - 1e-6]
    assert "long" in {t.id for t in far}
    assert all(t.tokens > 96 for t in far)
    few = compared(bundle, other, [t for t in TEXTS if len(t.text) < 40])
    assert few.verdict == "identical vectors"
    assert few.notes[0].startswith("max_tokens differs and no text is that long (")


def test_other_weights_of_other_dimensions_cannot_be_compared(bundle: Bundle, tiny_bundle: Bundle) -> None:
    report = compared(bundle, tiny_bundle)
    assert report.moved
    assert report.verdict.startswith(
        "re-embed: vectors of 256 and of 16 dimensions cannot be compared, nor be in one index"
    )
    assert report.moves is not None
    assert report.moves.cosine is None
    assert report.moves.mixed_top10_overlap is None
    assert report.moves.top10_overlap < 0.9  # random weights: own neighbours need no common space
    lines = said(report.changes)
    assert lines["contract: dim"] == ("256", "16", EVERY)
    assert lines["source: model.safetensors"][2] == EVERY


def unit(rows: int, dim: int = 32, seed: int = 0) -> Any:
    values = np.random.default_rng(seed).standard_normal((rows, dim))
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def made(count: int) -> list[Text]:
    return [Text(str(i), f"text {i}") for i in range(count)]


def test_neighbours_alone_can_demand_a_re_embed() -> None:
    """Rows that barely move in an index where all are alike: cosines see nothing, the ten nearest are others."""
    crowd = unit(1, seed=2)[0] + np.float32(0.05) * unit(200)
    a = (crowd / np.linalg.norm(crowd, axis=1, keepdims=True)).astype(np.float32)
    moved = a + 0.1 * unit(200, seed=1)
    b = (moved / np.linalg.norm(moved, axis=1, keepdims=True)).astype(np.float32)
    moves = measure(made(200), [1] * 200, a, b)
    assert moves.cosine is not None
    assert moves.cosine.min > TOLERANCES["int8"].min_cosine
    judgement = judge(moves, "int8")
    assert judgement.answer == "re-embed"
    assert [r.split(" is ")[0] for r in judgement.reasons] == [
        "the top-10 overlap",
        "the top-10 overlap of B's queries in an index of A",
    ]


def test_shares_count_what_moved_further() -> None:
    a = np.zeros((4, 2), np.float32)
    a[:, 0] = 1
    angles = np.arccos(1 - np.array([0, 1e-5, 1e-3, 0.1]))
    b = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    moves = measure(made(4), [1, 2, 3, 4], a, b)
    assert [(s.more_than, s.texts, s.share) for s in moves.moved] == [(1e-6, 3, 0.75), (1e-4, 2, 0.5), (1e-2, 1, 0.25)]
    assert [(t.id, t.tokens) for t in moves.worst] == [("3", 4), ("2", 3), ("1", 2), ("0", 1)]


@pytest.mark.parametrize("texts", [1, 2])
def test_few_texts_are_enough(texts: int) -> None:
    a = unit(texts)
    assert judge(measure(made(texts), [1] * texts, a, a), "fp32").line == "identical vectors"


def test_a_precision_without_limits_is_refused() -> None:
    with pytest.raises(BundleError, match="there are no limits for the precision 'fp4'"):
        less_precise(["fp32", "fp4"], Policy())


def test_an_excerpt_does_nothing_to_a_terminal() -> None:
    assert (
        excerpt("a\x1b[31m\n\tred\x00 " + "x" * 100)
        == "a\N{REPLACEMENT CHARACTER}[31m red\N{REPLACEMENT CHARACTER} " + "x" * 36
    )


def test_repeated_texts_count_once_and_samples_are_even() -> None:
    texts = [Text(str(i), f"t{i // 2}", "query" if i == 0 else None) for i in range(40)]
    chosen = choose(texts, "here")
    assert (len(chosen.texts), chosen.used.duplicates) == (21, 19)  # the first two differ in their prompts
    assert [t.id for t in chosen.texts][:4] == ["0", "1", "2", "4"]
    taken = choose(made(100), "here", 10)
    assert [t.id for t in taken.texts] == [str(i) for i in range(0, 100, 10)]
    assert (taken.used.texts, taken.used.of) == (10, 100)
    assert choose(made(5), "here", 50).used.texts == 5
    with pytest.raises(InputError, match="--limit is 0"):
        choose(made(5), "here", 0)
    with pytest.raises(InputError, match="here has no text"):
        choose([], "here")


def test_batches_and_order_do_not_mix_texts_up(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row i is text i whatever the chunks are: seen by embedding the same texts backwards and in chunks of 3."""
    report = compared(bundle, bundle)
    assert report.verdict == "identical vectors"
    texts = choose(TEXTS, "here").texts
    record = bundle.manifest.engines[0]
    _, forward = compare.embed_with(bundle, record, texts, "A", lambda *progress: None)
    monkeypatch.setattr(embedded, "_CHUNK_TEXTS", 3)
    _, backward = compare.embed_with(bundle, record, texts[::-1], "A", lambda *progress: None)
    assert forward.tokens == backward.tokens[::-1]
    assert np.abs(forward.vectors - backward.vectors[::-1]).max() < 1e-5
    assert len({v.tobytes() for v in forward.vectors}) == len(texts)
