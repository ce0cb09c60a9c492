"""Text to token ids, exactly as the checkpoint's own tokenizer gives them.

Uses the `tokenizers` library and the checkpoint's tokenizer.json byte for byte. EOS comes from the post-processor in
that file; this module never adds a second one. It verifies it, and keeps it last when it truncates.
"""

from __future__ import annotations

import bisect
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from tokenizers import Encoding, Tokenizer
from tokenizers.models import BPE

from runtime.bundle import Contract
from runtime.errors import BundleError, InputError, NotFoundError


class Truncate(StrEnum):
    """What to do with a text longer than `max_tokens`."""

    ERROR = "error"
    END = "end"
    START = "start"


@dataclass(frozen=True)
class Instruction:
    """The prompt of a request: a name in the contract, or the exact text. Neither: the checkpoint's default."""

    prompt_name: str | None = None
    prompt: str | None = None


@dataclass(frozen=True)
class TokenizedText:
    """`ids` as the engine sees them, and how many there were before truncation."""

    ids: list[int]
    original_tokens: int
    rendered: str = ""

    @property
    def truncated(self) -> bool:
        """True when tokens were dropped."""
        return len(self.ids) < self.original_tokens


class TextTokenizer:
    """A thread-safe tokenizer for one contract."""

    def __init__(self, path: Path, contract: Contract) -> None:
        """Load tokenizer.json. Raises BundleError when it cannot be read or does not append the contract's EOS."""
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:
            raise BundleError(f"{path} is not a tokenizer: {error}", cure="Export the checkpoint again.") from error
        # A file may carry its own truncation or padding: both are this class's business.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        _disable_cache(self._tokenizer)
        self.contract = contract
        ids = self._tokenizer.encode("").ids
        if ids != [contract.eos_id]:
            raise BundleError(
                f"{path} turns an empty text into {ids}; the contract expects only the EOS id {contract.eos_id}.",
                cure="The tokenizer does not belong to this bundle. Export the checkpoint again.",
            )

    def prompt_text(self, instruction: Instruction) -> str:
        """Return the text put before each input. Raises InputError when both forms are given, NotFoundError."""
        contract = self.contract
        if instruction.prompt is not None:
            if instruction.prompt_name is not None:
                raise InputError("prompt and prompt_name were both given.", cure="Give one of them.")
            return instruction.prompt
        named = instruction.prompt_name
        name = contract.default_prompt_name if named is None else named
        if name is None:
            return ""
        if name not in contract.prompts:
            known = ", ".join(sorted(contract.prompts)) or "none"
            raise NotFoundError(
                f"there is no prompt {name!r}; this model has: {known}.",
                cure="Choose one of these, or give the text itself as `prompt`.",
            )
        return contract.prompts[name]

    def encode(
        self,
        texts: Sequence[str],
        instruction: Instruction = Instruction(),
        truncate: Truncate = Truncate.END,
        *,
        first: int = 0,
    ) -> list[TokenizedText]:
        """Tokenize `texts` in order, each with its prompt and EOS. `first` is the number of the first one, for errors.

        Raises InputError when a text is too long under `Truncate.ERROR`, or its prompt alone fills the limit.
        """
        prompt = self.prompt_text(instruction)
        _check_unicode("the prompt", prompt)
        for index, text in enumerate(texts, first):
            _check_unicode(f"text {index}", text)
        rendered = [prompt + text for text in texts]
        encodings = self._tokenizer.encode_batch(rendered)
        return [
            self._finish(e, r, len(prompt), truncate, i)
            for i, (e, r) in enumerate(zip(encodings, rendered, strict=True), first)
        ]

    def verbatim(self, sequences: Collection[Sequence[int]]) -> list[TokenizedText]:
        """Accept token ids as they are. Raises InputError for an empty or long row, or an unknown id."""
        contract = self.contract
        for row, ids in enumerate(sequences):
            if not ids:
                raise InputError(f"token_ids {row} is empty.", cure="Give at least the EOS id.")
            if len(ids) > contract.max_tokens:
                raise InputError(
                    f"token_ids {row} has {len(ids)} ids; the limit is {contract.max_tokens}.",
                    cure="Shorten it.",
                )
            bad = next((i for i in ids if not 0 <= i < contract.vocab_size), None)
            if bad is not None:
                raise InputError(
                    f"token_ids {row} holds {bad}; ids go from 0 to {contract.vocab_size - 1}.",
                    cure="Use this model's own tokenizer.",
                )
        return [TokenizedText(list(ids), len(ids)) for ids in sequences]

    def spell(self, ids: Sequence[int]) -> list[str]:
        """Return the vocabulary's spelling of each id, or "" for an id that has none."""
        return [self._tokenizer.id_to_token(i) or "" for i in ids]

    def _finish(
        self, encoding: Encoding, rendered: str, prompt_chars: int, truncate: Truncate, index: int
    ) -> TokenizedText:
        count, limit, eos = len(encoding), self.contract.max_tokens, self.contract.eos_id
        if count <= limit:
            return TokenizedText(encoding.ids, count, rendered)
        if truncate is Truncate.ERROR:
            raise InputError(
                f"text {index} has {count} tokens; the limit is {limit}.",
                cure="Shorten it, or ask for truncate end or start.",
            )
        # Tokens that begin in the prompt; one that straddles its end belongs to it. Offsets are looked up one by one:
        # a list of a million pairs would hold up every other thread for most of a second.
        prompt_tokens = bisect.bisect_left(
            range(count - 1), prompt_chars, key=lambda token: (encoding.token_to_chars(token) or (0, 0))[0]
        )
        if prompt_tokens > limit - 2:
            raise InputError(
                f"the prompt of text {index} has {prompt_tokens} tokens; the limit with text and EOS is {limit - 2}.",
                cure="Shorten the prompt.",
            )
        ids = encoding.ids
        if truncate is Truncate.START:
            ids = ids[:prompt_tokens] + ids[count - 1 - (limit - 1 - prompt_tokens) : count - 1] + [eos]
        else:
            ids = [*ids[: limit - 1], eos]
        return TokenizedText(ids, count, rendered)


def _disable_cache(tokenizer: Tokenizer) -> None:
    """Have the library remember no words.

    It keeps up to 10,000 of them, megabytes, for every thread and every BPE model that the thread has ever used, and
    frees them when the thread ends, not when the tokenizer does. A server's threads live as long as it does: each of
    them would hold the words of every tokenizer since the start, and every reload would add one. A word is split anew
    instead: tokenization takes up to half as long again, about 1 % of the smallest model's inference on a CPU.
    """
    model = tokenizer.model
    # The capacity has no public setter once the model is loaded. Other models' caches go with the tokenizer.
    resize = getattr(model, "_resize_cache", None) if isinstance(model, BPE) else None
    if resize is not None:
        resize(0)


def _check_unicode(what: str, text: str) -> None:
    """Refuse what has no UTF-8: the tokenizers library would fail on it with a foreign error."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{what} holds half of a surrogate pair at character {error.start}.", cure="Send valid Unicode text."
        ) from error
