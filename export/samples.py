"""Texts with what PyTorch says of them: ids, vectors, golden texts, and what the set covers. Runs no engine."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calibration.families import family_of
from calibration.texts import Text, texts_sha256
from export.reference import ReferenceVectors
from export.report.data import Coverage, TokenMismatch
from runtime.bundle import Bundle, Contract
from runtime.errors import BundleError
from runtime.golden import Golden
from runtime.tokenizer import Instruction, TextTokenizer

CODE_FAMILY = "Programming languages"
GOLDEN_TEXTS = 16
GOLDEN_TEXT_TOKENS = 64

Vectors = NDArray[np.float32]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Sample:
    """A text with the ids transformers gives it and the vector PyTorch gives those ids."""

    text: Text
    rendered: str
    ids: list[int]
    vector: Vectors


def make_samples(
    reference: ReferenceVectors, contract: Contract, texts: Sequence[Text], progress: Progress
) -> tuple[list[Sample], list[str]]:
    """Run the reference over all texts. Returns the samples and the names of prompts the checkpoint does not have."""
    samples, missing = [], set()
    for index, text in enumerate(texts):
        progress("PyTorch reference", index, len(texts))
        if text.prompt is not None and text.prompt not in contract.prompts:
            missing.add(text.prompt)
        rendered = contract.prompts.get(text.prompt or "", "") + text.text
        ids = reference.tokenize(rendered, contract.max_tokens)
        samples.append(Sample(text, rendered, ids, reference.embed(ids)))
    progress("PyTorch reference", len(texts), len(texts))
    return samples, sorted(missing)


def compare_tokenizers(bundle: Bundle, samples: Sequence[Sample]) -> list[TokenMismatch]:
    """Compare the runtime's ids with transformers' for every text; names what differs."""
    contract = bundle.manifest.contract
    try:
        tokenizer = TextTokenizer(bundle.path(bundle.manifest.tokenizer.file), contract)
    except BundleError as error:
        return [TokenMismatch("every text", 0, 0, 0, error.message)]
    encoded = tokenizer.encode([s.rendered for s in samples], Instruction(prompt=""))
    mismatches = []
    for sample, item in zip(samples, encoded, strict=True):
        found, expected = item.ids, sample.ids
        if found == expected:
            continue
        pairs = enumerate(zip(found, expected, strict=False))
        at = next((i for i, (a, b) in pairs if a != b), min(len(found), len(expected)))
        if expected[-1] == contract.eos_id and found == expected[:-1]:
            explanation = f"EOS ({contract.eos_id}) is missing at the end of the runtime's {len(found)} ids"
        else:
            explanation = (
                f"ids differ from position {at}: runtime {found[at : at + 4]}, transformers {expected[at : at + 4]} "
                f"({len(found)} and {len(expected)} ids)"
            )
        mismatches.append(TokenMismatch(sample.text.id, at, len(found), len(expected), explanation))
    return mismatches


def golden_of(samples: Sequence[Sample]) -> Golden:
    """Choose the golden texts: short ones, of every kind in turn, always the same for the same texts."""
    short = [s for s in samples if len(s.ids) <= GOLDEN_TEXT_TOKENS] or list(samples)
    by_kind: dict[str, list[Sample]] = {}
    for sample in sorted(short, key=lambda s: hashlib.sha256(s.text.id.encode()).digest()):
        by_kind.setdefault(sample.text.kind, []).append(sample)
    queues = [by_kind[kind] for kind in sorted(by_kind)]
    turns = max(map(len, queues))
    chosen = [queue[turn] for turn in range(turns) for queue in queues if turn < len(queue)][:GOLDEN_TEXTS]
    return Golden(
        texts=[s.rendered for s in chosen],
        ids=[s.ids for s in chosen],
        embeddings=np.stack([s.vector for s in chosen]),
    )


def coverage_of(samples: Sequence[Sample], contract: Contract, missing_prompts: list[str]) -> Coverage:
    """Count what the samples cover."""
    texts = [s.text for s in samples]
    code = {t.language for t in texts if t.kind == "code"}
    # Edge cases are no texts of a language; `ada` and `lua` are languages that people speak, too.
    natural = {t.language for t in texts if t.kind not in ("code", "edge")} - {"und", "zxx", "mul"}
    lengths = [len(s.ids) for s in samples]
    return Coverage(
        texts=len(texts),
        texts_sha256=texts_sha256(texts),
        languages=len(natural),
        scripts=len({t.script for t in texts} - {"Zyyy"}),
        programming_languages=len(code),
        by_kind=dict(sorted(Counter(t.kind for t in texts).items())),
        tokens_total=sum(lengths),
        tokens_longest=max(lengths),
        max_tokens=contract.max_tokens,
        truncated=sum(n == contract.max_tokens for n in lengths),
        prompts_missing=missing_prompts,
        by_script=_counted(t.script for t in texts),
        by_family=_counted(family(t) for t in texts),
        empty=sum(not t.text.strip() for t in texts),
        duplicates=len(texts) - len({(t.prompt, t.text) for t in texts}),
    )


def family(text: Text) -> str:
    """Return the group that a text's language belongs to; names of programming languages can be language codes too."""
    return CODE_FAMILY if text.kind == "code" else family_of(text.language)


def _counted(names: Iterable[str]) -> dict[str, int]:
    """Count, the largest first."""
    return dict(sorted(Counter(names).items(), key=lambda item: (-item[1], item[0])))
