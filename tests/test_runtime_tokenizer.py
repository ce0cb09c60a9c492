"""The runtime's tokenizer against transformers' on the verification texts; EOS, prompts, truncation, refusals."""

from __future__ import annotations

import ctypes
import gc
import json
import platform
import string
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.texts import Text, verification_texts
from export.checkpoint import Checkpoint
from runtime.bundle import Contract
from runtime.errors import BundleError, InputError, NotFoundError
from runtime.tokenizer import Instruction, TextTokenizer, Truncate

LONG = "The quick brown fox jumps over the lazy dog, 42 times. " * 20


@pytest.fixture(scope="module")
def contract(checkpoint: Checkpoint) -> Contract:
    return checkpoint.contract


@pytest.fixture(scope="module")
def path(mini: Path) -> Path:
    return mini / "tokenizer.json"


@pytest.fixture(scope="module")
def tokenizer(path: Path, contract: Contract) -> TextTokenizer:
    return TextTokenizer(path, contract)


@pytest.fixture(scope="module")
def theirs(mini: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(mini)


@pytest.fixture(scope="module")
def texts() -> list[Text]:
    return verification_texts()


class _Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "a", "b", "c", "mapped", "d", "e", "used", "f", "g")]


def native_bytes() -> int:
    """Return what the process has allocated from glibc: not what the allocator keeps, and not Python's own objects."""
    read = ctypes.CDLL(None).mallinfo2
    read.restype = _Mallinfo
    gc.collect()
    found = read()
    return int(found.used) + int(found.mapped)


def limited(path: Path, contract: Contract, max_tokens: int, **changes: Any) -> TextTokenizer:
    return TextTokenizer(path, replace(contract, max_tokens=max_tokens, **changes))


# --- the same ids as transformers


@pytest.mark.parametrize("name", [None, "query", "document"])
def test_ids_are_those_of_transformers(
    tokenizer: TextTokenizer, theirs: Any, contract: Contract, texts: list[Text], name: str | None
) -> None:
    prompt = contract.prompts[name] if name else ""
    items = tokenizer.encode([t.text for t in texts], Instruction(prompt_name=name))
    for text, item in zip(texts, items, strict=True):
        expected = theirs(prompt + text.text, truncation=True, max_length=contract.max_tokens)["input_ids"]
        assert item.ids == expected, text.id
        assert item.rendered == prompt + text.text
    assert any(item.truncated for item in items), "no text is long enough to be truncated"
    assert any(not item.truncated for item in items)


def test_one_by_one_is_the_same_as_together(tokenizer: TextTokenizer, texts: list[Text]) -> None:
    some = [t.text for t in texts[::10]]
    assert tokenizer.encode(some) == [tokenizer.encode([text])[0] for text in some]


def test_eos_is_last_exactly_once(tokenizer: TextTokenizer, contract: Contract, texts: list[Text]) -> None:
    plain = [t.text for t in texts if "<|" not in t.text]
    for truncate in (Truncate.END, Truncate.START):
        for item in tokenizer.encode(plain, truncate=truncate):
            assert item.ids[-1] == contract.eos_id
            assert item.ids.count(contract.eos_id) == 1
            assert len(item.ids) == min(item.original_tokens, contract.max_tokens)


def test_empty_text_is_eos_alone(tokenizer: TextTokenizer, contract: Contract) -> None:
    (item,) = tokenizer.encode([""])
    assert item.ids == [contract.eos_id]
    assert (item.original_tokens, item.truncated, item.rendered) == (1, False, "")


@pytest.mark.parametrize("text", [" ", "a", "a ", " a", "\n", "a\n\n", "\u00a0"])
def test_whitespace_counts(tokenizer: TextTokenizer, theirs: Any, text: str) -> None:
    (item,) = tokenizer.encode([text])
    assert item.ids == theirs(text)["input_ids"]
    assert len(item.ids) > 1


def test_decomposed_text_equals_composed(tokenizer: TextTokenizer) -> None:
    composed, decomposed = tokenizer.encode(["caf\u00e9", "cafe\u0301"])
    assert composed.ids == decomposed.ids


@pytest.mark.parametrize(
    "text", ["<|im_end|>", "a<|im_end|>", "<|endoftext|>", "x <|im_end|> y <|im_start|>z", "<|im_end|><|im_end|>"]
)
def test_special_tokens_spelt_in_a_text_are_read_as_transformers_does(
    tokenizer: TextTokenizer, theirs: Any, contract: Contract, text: str
) -> None:
    (item,) = tokenizer.encode([text])
    assert item.ids == theirs(text)["input_ids"]
    assert item.ids[-1] == contract.eos_id
    # EOS of the post-processor comes on top of those in the text.
    assert item.ids.count(contract.eos_id) == text.count("<|im_end|>") + 1


@settings(max_examples=150)
@given(st.text(max_size=60))
def test_any_text_gives_the_ids_of_transformers(tokenizer: TextTokenizer, theirs: Any, text: str) -> None:
    assert tokenizer.encode([text])[0].ids == theirs(text)["input_ids"]


def test_many_threads_give_the_same_ids(tokenizer: TextTokenizer, texts: list[Text]) -> None:
    some = [t.text for t in texts[::4]]
    modes = [Truncate.END, Truncate.START]
    instruction = Instruction(prompt_name="query")
    expected = {mode: tokenizer.encode(some, instruction, mode) for mode in modes}
    with ThreadPoolExecutor(6) as pool:
        futures = [(mode, pool.submit(tokenizer.encode, some, instruction, mode)) for mode in modes * 6]
        assert all(future.result() == expected[mode] for mode, future in futures)


# --- truncation


@pytest.mark.parametrize("limit", [2, 3, 16, 100])
def test_end_keeps_the_beginning_and_eos(
    path: Path, contract: Contract, tokenizer: TextTokenizer, theirs: Any, limit: int
) -> None:
    (full,) = tokenizer.encode([LONG])
    (item,) = limited(path, contract, limit).encode([LONG], truncate=Truncate.END)
    assert item.ids == [*full.ids[: limit - 1], contract.eos_id]
    assert item.ids == theirs(LONG, truncation=True, max_length=limit)["input_ids"]
    assert item.truncated
    assert item.original_tokens == len(full.ids)


@pytest.mark.parametrize("limit", [2, 3, 16, 100])
def test_start_keeps_the_end_and_eos(path: Path, contract: Contract, tokenizer: TextTokenizer, limit: int) -> None:
    (full,) = tokenizer.encode([LONG])
    (item,) = limited(path, contract, limit).encode([LONG], truncate=Truncate.START)
    assert item.ids == full.ids[-limit:]
    assert item.ids[-1] == contract.eos_id
    assert item.original_tokens == len(full.ids)


@pytest.mark.parametrize("text", [LONG, "語" * 300, "é" * 300])
@pytest.mark.parametrize("limit", [32, 64])
def test_start_keeps_the_prompt(
    path: Path, contract: Contract, tokenizer: TextTokenizer, theirs: Any, text: str, limit: int
) -> None:
    prompt = contract.prompts["query"]
    (full,) = tokenizer.encode([text], Instruction(prompt_name="query"))
    # The prompt's tokens: the shortest beginning that spells all of it (its last token may reach into the text).
    size = next(n for n in range(len(full.ids)) if theirs.decode(full.ids[:n]).startswith(prompt))
    (item,) = limited(path, contract, limit).encode([text], Instruction(prompt_name="query"), Truncate.START)
    assert item.ids == full.ids[:size] + full.ids[size - limit :]
    assert item.ids[-1] == contract.eos_id
    assert len(item.ids) == limit


def test_text_of_exactly_the_limit_is_kept_whole(path: Path, contract: Contract, tokenizer: TextTokenizer) -> None:
    (full,) = tokenizer.encode([LONG])
    for truncate in Truncate:
        (item,) = limited(path, contract, len(full.ids)).encode([LONG], truncate=truncate)
        assert item.ids == full.ids
        assert not item.truncated


def test_error_names_both_numbers(path: Path, contract: Contract, tokenizer: TextTokenizer) -> None:
    count = len(tokenizer.encode([LONG])[0].ids)
    with pytest.raises(InputError, match=f"text 1 has {count} tokens; the limit is {count - 1}") as caught:
        limited(path, contract, count - 1).encode(["short", LONG], truncate=Truncate.ERROR)
    assert "end or start" in caught.value.cure


@pytest.mark.parametrize("truncate", [Truncate.END, Truncate.START])
def test_prompt_that_leaves_no_room_is_refused(path: Path, contract: Contract, truncate: Truncate) -> None:
    with pytest.raises(InputError, match=r"prompt of text 0 has \d+ tokens; .* is 8") as caught:
        limited(path, contract, 10).encode([LONG], Instruction(prompt_name="query"), truncate)
    assert "prompt" in caught.value.cure


@settings(max_examples=100)
@given(st.text(min_size=1, max_size=40), st.integers(2, 12), st.sampled_from([Truncate.END, Truncate.START]))
def test_truncated_text_ends_with_eos(
    path: Path, contract: Contract, tokenizer: TextTokenizer, text: str, limit: int, truncate: Truncate
) -> None:
    changed = tokenizer.contract
    tokenizer.contract = replace(contract, max_tokens=limit)
    try:
        (item,) = tokenizer.encode([text], truncate=truncate)
    finally:
        tokenizer.contract = changed
    (full,) = tokenizer.encode([text])
    kept = full.ids[: limit - 1] if truncate is Truncate.END else full.ids[-limit:-1]
    assert item.ids == ([*kept, contract.eos_id] if len(full.ids) > limit else full.ids)


# --- prompts


def test_prompt_name_and_prompt_text_agree(tokenizer: TextTokenizer, contract: Contract) -> None:
    by_name = tokenizer.encode(["a text"], Instruction(prompt_name="query"))
    by_text = tokenizer.encode(["a text"], Instruction(prompt=contract.prompts["query"]))
    assert by_name == by_text
    assert by_name != tokenizer.encode(["a text"])


def test_default_prompt_applies_unless_another_is_given(path: Path, contract: Contract) -> None:
    tokenizer = limited(path, contract, contract.max_tokens, default_prompt_name="query")
    assert tokenizer.prompt_text(Instruction()) == contract.prompts["query"]
    assert tokenizer.prompt_text(Instruction(prompt_name="document")) == ""
    assert tokenizer.prompt_text(Instruction(prompt="")) == ""
    assert tokenizer.prompt_text(Instruction(prompt="x: ")) == "x: "


def test_unknown_prompt_is_refused_with_those_there_are(tokenizer: TextTokenizer) -> None:
    with pytest.raises(NotFoundError, match=r"'passage'.*document, query") as caught:
        tokenizer.encode(["a"], Instruction(prompt_name="passage"))
    assert "prompt" in caught.value.cure


def test_both_prompt_forms_are_refused(tokenizer: TextTokenizer) -> None:
    with pytest.raises(InputError, match="both given"):
        tokenizer.encode(["a"], Instruction(prompt_name="query", prompt="q: "))


# --- what cannot be tokenized


@pytest.mark.parametrize(
    ("text", "at"), [("\ud800", 0), ("ab\udfff", 2), ("\ud83d \ude42", 0)], ids=["high", "low", "split-pair"]
)
def test_half_of_a_surrogate_pair_is_refused(tokenizer: TextTokenizer, text: str, at: int) -> None:
    for instruction in (Instruction(), Instruction(prompt_name="query")):
        with pytest.raises(InputError, match=f"text 1 holds half of a surrogate pair at character {at}\\.") as caught:
            tokenizer.encode(["fine", text], instruction)
        assert caught.value.cure


def test_half_of_a_surrogate_pair_in_the_prompt_is_refused(tokenizer: TextTokenizer) -> None:
    with pytest.raises(InputError, match="the prompt holds half of a surrogate pair at character 1"):
        tokenizer.encode(["fine"], Instruction(prompt="a\ud800"))


def test_whole_surrogate_pairs_are_text(tokenizer: TextTokenizer, theirs: Any) -> None:
    assert tokenizer.encode(["\U0001f642"])[0].ids == theirs("\U0001f642")["input_ids"]


# --- token ids used verbatim


def test_verbatim_ids_are_untouched(tokenizer: TextTokenizer, contract: Contract) -> None:
    rows = [[1], [0, contract.vocab_size - 1], [5, 6, 7], list(range(contract.max_tokens))]
    items = tokenizer.verbatim(rows)
    assert [item.ids for item in items] == rows
    assert [item.original_tokens for item in items] == [len(row) for row in rows]
    assert not any(item.truncated for item in items)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([], "token_ids 1 is empty"),
        ([0] * 1025, "token_ids 1 has 1025 ids; the limit is 1024"),
        ([3, 16000], "token_ids 1 holds 16000; ids go from 0 to 15999"),
        ([-1], "token_ids 1 holds -1; ids go from 0 to 15999"),
    ],
)
def test_verbatim_ids_outside_the_limits_are_refused(tokenizer: TextTokenizer, row: list[int], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        tokenizer.verbatim([[1], row])
    assert caught.value.cure


def test_spelling(tokenizer: TextTokenizer, contract: Contract) -> None:
    ids = [*tokenizer.encode(["a"])[0].ids, contract.vocab_size - 1]
    assert tokenizer.spell(ids) == ["a", "<|im_end|>", ""]


# --- files that are not the contract's tokenizer


def test_truncation_and_padding_in_the_file_are_ignored(path: Path, contract: Contract, tmp_path: Path) -> None:
    raw = json.loads(path.read_text(encoding="utf-8"))
    raw["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    raw["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": contract.pad_id,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    changed = tmp_path / "tokenizer.json"
    changed.write_text(json.dumps(raw), encoding="utf-8")
    texts = ["a", LONG]
    assert TextTokenizer(changed, contract).encode(texts) == TextTokenizer(path, contract).encode(texts)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what is allocated is asked of glibc")
def test_dropped_tokenizers_leave_nothing_in_the_threads_that_used_them(path: Path, contract: Contract) -> None:
    letters = string.ascii_lowercase
    texts = [" ".join(f"wo{a}{b}{c}rd" for c in letters) for a in letters[:8] for b in letters[:16]]

    def reload(times: int) -> None:
        for _ in range(times):
            TextTokenizer(path, contract).encode(texts)

    with ThreadPoolExecutor(2) as threads:  # as a server's, they outlive every tokenizer
        list(threads.map(reload, [1, 1]))
        before = native_bytes()
        list(threads.map(reload, [8, 8]))
        grown = native_bytes() - before
    assert grown < 1 << 20


def test_tokenizer_with_another_eos_is_refused(path: Path, contract: Contract) -> None:
    with pytest.raises(BundleError, match=rf"\[{contract.eos_id}\].* EOS id 7"):
        limited(path, contract, 16, eos_id=7)


def test_tokenizer_without_eos_is_refused(path: Path, contract: Contract, tmp_path: Path) -> None:
    raw = json.loads(path.read_text(encoding="utf-8")) | {"post_processor": None}
    changed = tmp_path / "tokenizer.json"
    changed.write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(BundleError, match=r"empty text into \[\]"):
        TextTokenizer(changed, contract)


@pytest.mark.parametrize("content", ["", "{}", "not json"])
def test_file_that_is_no_tokenizer_is_refused(contract: Contract, tmp_path: Path, content: str) -> None:
    changed = tmp_path / "tokenizer.json"
    changed.write_text(content)
    with pytest.raises(BundleError, match="is not a tokenizer"):
        TextTokenizer(changed, contract)
    with pytest.raises(BundleError, match="is not a tokenizer"):
        TextTokenizer(tmp_path / "absent.json", contract)
