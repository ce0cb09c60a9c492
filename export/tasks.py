"""Task agreement: whether what an index is used for still comes out as PyTorch's vectors have it.

Neighbours and similarities are taken over all texts. The labelled sets follow from how the shipped texts came about, so
they need no annotation: the same article in another language, a docstring and its function, a title and a text in its
language. nDCG@10 as in Järvelin and Kekäläinen 2002 with binary gains; R@1 is the share of queries whose first hit is
relevant, what BEIR and MTEB call accuracy at 1.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calibration.texts import Text
from export.neighbours import top_k_overlap
from export.report.data import Retrieval, Tasks

MIN_QUERIES = 10
_SPEARMAN_TEXTS = 1500  # a million pairs
_ARTICLE = re.compile(r"udhr/([^/]+)/article(\d+)")
_TITLE = re.compile(r"udhr/([^/]+)/title\d+")
_PASSAGE = re.compile(r"udhr/([^/]+)/(?:articles?\d[\d-]*|declaration)")

Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class LabelledSet:
    """Queries and documents as positions in the texts; `relevant[i]` are those of query i's right answers."""

    name: str
    queries: list[int]
    documents: list[int]
    relevant: list[set[int]]


def labelled_sets(texts: Sequence[Text]) -> list[LabelledSet]:
    """Return the sets that these texts hold, those with at least `MIN_QUERIES` queries."""
    found = [_parallel_articles(texts), _docstrings(texts), _titles(texts)]
    return [s for s in found if len(s.queries) >= MIN_QUERIES]


def _parallel_articles(texts: Sequence[Text]) -> LabelledSet:
    numbers = {i: m[2] for i, t in enumerate(texts) if (m := _ARTICLE.fullmatch(t.id))}
    groups: dict[str, set[int]] = {}
    for i, number in numbers.items():
        groups.setdefault(number, set()).add(i)
    queries = [i for i, number in numbers.items() if len(groups[number]) > 1]
    relevant = [groups[numbers[i]] - {i} for i in queries]
    return LabelledSet("article to its translations", queries, list(numbers), relevant)


def _docstrings(texts: Sequence[Text]) -> LabelledSet:
    place = {t.id: i for i, t in enumerate(texts) if t.kind == "code"}
    queries = [i for i, t in enumerate(texts) if t.id.endswith("?") and t.id[:-1] in place]
    return LabelledSet("docstring to code", queries, list(place.values()), [{place[texts[i].id[:-1]]} for i in queries])


def _titles(texts: Sequence[Text]) -> LabelledSet:
    language = {i: m[1] for i, t in enumerate(texts) if (m := _PASSAGE.fullmatch(t.id))}
    passages: dict[str, set[int]] = {}
    for i, name in language.items():
        passages.setdefault(name, set()).add(i)
    titles = [(i, m[1]) for i, t in enumerate(texts) if (m := _TITLE.fullmatch(t.id)) and m[1] in passages]
    return LabelledSet(
        "title to text in its language",
        [i for i, _ in titles],
        list(language),
        [passages[name] for _, name in titles],
    )


def measure(texts: Sequence[Text], found: Vectors, expected: Vectors) -> Tasks:
    """Compare an engine's unit vectors with PyTorch's, both [texts, dim], on neighbours, order and labelled sets."""
    return Tasks(
        texts=len(texts),
        top10_overlap=top_k_overlap(expected, found, 10),
        top100_overlap=top_k_overlap(expected, found, 100),
        spearman=spearman(found[:_SPEARMAN_TEXTS], expected[:_SPEARMAN_TEXTS]),
        retrieval=[_retrieval(s, found, expected) for s in labelled_sets(texts)],
    )


def _retrieval(labelled: LabelledSet, found: Vectors, expected: Vectors) -> Retrieval:
    here, there = scores(labelled, found), scores(labelled, expected)
    return Retrieval(labelled.name, len(labelled.queries), len(labelled.documents), *here, *there)


def scores(labelled: LabelledSet, vectors: Vectors) -> tuple[float, float]:
    """Return nDCG@10 and R@1, means over the queries. A query is no hit for itself."""
    documents = np.array(labelled.documents)
    similarities = vectors[labelled.queries].astype(np.float64) @ vectors[documents].astype(np.float64).T
    discounts = 1 / np.log2(np.arange(2, 12))
    gains, firsts = [], []
    for query, row, relevant in zip(labelled.queries, similarities, labelled.relevant, strict=True):
        row = np.where(documents == query, -np.inf, row)
        hits = [int(d) in relevant for d in documents[np.argsort(-row, kind="stable")[:10]]]
        ideal = discounts[: min(len(relevant), 10)].sum()
        gains.append(float((discounts[: len(hits)] * hits).sum() / ideal))
        firsts.append(hits[0])
    return float(np.mean(gains)), float(np.mean(firsts))


def spearman(found: Vectors, expected: Vectors) -> float:
    """Return the rank correlation of the pairwise similarities of rows; 1.0 where there are no two pairs."""
    upper = np.triu_indices(len(found), 1)
    if len(upper[0]) < 2:
        return 1.0
    here, there = (_ranks((v.astype(np.float64) @ v.astype(np.float64).T)[upper]) for v in (found, expected))
    flat = [np.ptp(ranks) == 0 for ranks in (here, there)]
    if any(flat):
        return 1.0 if all(flat) else 0.0
    return float(np.corrcoef(here, there)[0, 1])


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return ranks; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks: NDArray[np.float64] = (ends - (counts - 1) / 2)[inverse]
    return ranks
