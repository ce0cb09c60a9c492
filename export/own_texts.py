"""The user's own texts, for a comparison or for calibration: refused where they would say less than they seem to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from calibration.texts import Text, read_texts
from runtime.errors import InputError

_SHOWN_CHARS = 60


def read_own_texts(path: Path, besides: Sequence[Text]) -> list[Text]:
    """Read a user's texts, to be compared besides others.

    Raises InputError as `read_texts` does, and for a text that is empty, that is there twice, or that has the id of
    another; it names the first and counts them.
    """
    texts = read_texts(path)
    empty = [text for text in texts if not text.text.strip()]
    if empty:
        raise InputError(
            f"{path}: {len(empty)} of {len(texts)} texts are empty, the first is {empty[0].id!r}.",
            cure="Remove them: the shipped texts already hold the empty text.",
        )
    seen: dict[tuple[str | None, str], Text] = {(t.prompt, t.text): t for t in besides}
    ids = {text.id for text in besides}
    repeated: list[tuple[Text, Text]] = []
    for text in texts:
        other = seen.setdefault((text.prompt, text.text), text)
        if other is not text:
            repeated.append((text, other))
        if text.id in ids:
            raise InputError(
                f"{path}: the id {text.id!r} is that of a shipped text.",
                cure="Rename it: reports name texts by their ids.",
            )
    if repeated:
        text, other = repeated[0]
        raise InputError(
            f"{path}: {len(repeated)} of {len(texts)} texts repeat another with the same prompt; the first is "
            f"{text.id!r}, {text.text[:_SHOWN_CHARS]!r}, the same as {other.id!r}.",
            cure="Keep one of each: a text that counts twice only weighs more.",
        )
    return texts


def require_prompts(path: Path, texts: Sequence[Text], prompts: Collection[str]) -> None:
    """Refuse texts of a user's file that name a prompt the checkpoint does not have: they would be taken without one.

    Raises InputError that names the first such text, counts them, and says which prompts there are.
    """
    lost = [text for text in texts if text.prompt is not None and text.prompt not in prompts]
    if lost:
        known = ", ".join(map(repr, sorted(prompts)))
        cure = f"Name one of its prompts ({known}), or leave" if known else "It has no prompts: leave"
        raise InputError(
            f"{path}: {len(lost)} of {len(texts)} texts name a prompt that the checkpoint does not have; the first is "
            f"{lost[0].id!r}, with {lost[0].prompt!r}.",
            cure=f"{cure} the field out.",
        )


def missing_prompts(texts: Sequence[Text], prompts: Collection[str]) -> dict[str, int]:
    """Return how many texts name each prompt that there is none of."""
    return dict(sorted(Counter(t.prompt for t in texts if t.prompt is not None and t.prompt not in prompts).items()))
