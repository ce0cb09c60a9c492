"""A policy file: what it may say, what is refused with file, key, value, limit and cure, and what its hash counts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from runtime.errors import InputError
from runtime.policy import Policy, read_policy, to_toml
from runtime.tolerances import TOLERANCES


def written(folder: Path, text: str, name: str = "limits.toml") -> Policy:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return read_policy(path)


def test_no_file_is_the_shipped_policy(tmp_path: Path) -> None:
    assert read_policy(None) == Policy()
    assert read_policy(None).limits == TOLERANCES
    assert written(tmp_path, "").sha256 == Policy().sha256
    assert written(tmp_path, "").name == "limits"


def test_a_file_changes_what_it_names_and_nothing_else(tmp_path: Path) -> None:
    policy = written(tmp_path, 'name = "search"\n[int8]\nmin_cosine = 0.98\n[fp16]\ntop10_overlap = 1\n')
    assert policy.name == "search"
    assert policy.tolerance("int8") == replace(TOLERANCES["int8"], min_cosine=0.98)
    assert policy.tolerance("fp16") == replace(TOLERANCES["fp16"], top10_overlap=1.0)
    assert {p: policy.tolerance(p) for p in ("fp32", "bf16")} == {p: TOLERANCES[p] for p in ("fp32", "bf16")}


def test_the_hash_is_that_of_the_limits_alone(tmp_path: Path) -> None:
    first = written(tmp_path, 'name = "a"\n[int8]\nmin_cosine = 0.98\nmean_cosine = 0.995\n')
    second = written(tmp_path, 'name = "b"  # another\n[int8]\nmean_cosine = 0.9950\nmin_cosine = 98e-2\n[fp32]\n')
    assert first.sha256 == second.sha256
    assert len(first.sha256) == 64
    assert first.sha256 != Policy().sha256
    assert written(tmp_path, "[int8]\nmin_cosine = 0.9800001\nmean_cosine = 0.995\n").sha256 != first.sha256
    assert written(tmp_path, "[fp16]\nmin_cosine = 0.98\nmean_cosine = 0.995\n").sha256 != first.sha256
    shuffled = Policy("x", dict(reversed(first.limits.items())))
    assert shuffled.sha256 == first.sha256
    # A whole number asks for the same as one with a point.
    assert (
        written(tmp_path, "[int8]\ntop10_overlap = 1\n").sha256
        == written(tmp_path, "[int8]\ntop10_overlap = 1.0\n").sha256
    )


@pytest.mark.parametrize("name", ["search", 'quo"ted \\ and # more', "Größe 图 😀", "del \x7f tab \t line \n"])
def test_what_is_written_reads_the_same(tmp_path: Path, name: str) -> None:
    tight = replace(TOLERANCES["bf16"], min_cosine=0.1 + 0.2, max_abs_diff=1e-7, retrieval_loss_points=0.0)
    policy = Policy(name, dict(TOLERANCES) | {"bf16": tight})
    again = written(tmp_path, to_toml(policy))
    assert again == policy
    assert again.sha256 == policy.sha256
    assert written(tmp_path, to_toml(Policy())) == Policy()


def test_a_byte_order_mark_is_no_part_of_it(tmp_path: Path) -> None:
    assert written(tmp_path, "\ufeff" + to_toml(Policy())) == Policy()


WRONG = {
    "not TOML": (b"[int8\n", "is not TOML", "--print-policy"),
    "not UTF-8": (b'name = "\xff"\n', "is not TOML", "--print-policy"),
    "too many digits": (b"[int8]\nmin_cosine = " + b"9" * 5000, "is not TOML", "--print-policy"),
    "too deep": (b"a = " + b"[" * 3000, "is not TOML", "--print-policy"),
    "twice": (b"[int8]\n[int8]\n", "is not TOML", "--print-policy"),
    "unknown key": (b"[int8]\nmin_cosin = 0.9\n", "[int8] min_cosin is no limit; there are: min_cosine", "name"),
    "unknown precision": (b"[int4]\nmin_cosine = 0.9\n", "[int4] is no section of a policy; there are: bf16", "below"),
    "limit outside": (b"min_cosine = 0.9\n", "[min_cosine] is no section", "below the precision"),
    "section is no table": (b"int8 = 0.9\n", "[int8] is no section", "below the precision"),
    "text": (b"[int8]\nmin_cosine = '0.9'\n", "[int8] min_cosine is '0.9'; it must be a number from -1 to 1", "0.97"),
    "boolean": (b"[int8]\nmin_cosine = true\n", "min_cosine is True; it must be a number", "shipped limit is 0.97"),
    "list": (b"[int8]\nmin_cosine = [0.9]\n", "min_cosine is [0.9]; it must be a number", "0.97"),
    "NaN": (b"[fp16]\nmin_cosine = nan\n", "min_cosine is nan; it must be a number from -1 to 1", "0.9995"),
    "infinite": (b"[fp16]\nretrieval_loss_points = inf\n", "is inf; it must be a number from 0 to 100", "is 1"),
    "too high": (b"[fp16]\nmin_cosine = 1.5\n", "min_cosine is 1.5; it must be a number from -1 to 1", "0.9995"),
    "below zero": (b"[fp16]\nnorm_error = -0.1\n", "norm_error is -0.1; it must be a number from 0 to 1", "1e-05"),
    "name is a number": (b"name = 3\n", "name is 3", "as text"),
    "name is empty": (b"name = ''\n", "name is ''", "as text"),
}


@pytest.mark.parametrize("case", list(WRONG))
def test_a_wrong_file_is_refused_with_the_place_and_the_cure(tmp_path: Path, case: str) -> None:
    data, message, cure = WRONG[case]
    path = tmp_path / "limits.toml"
    path.write_bytes(data)
    with pytest.raises(InputError) as caught:
        read_policy(path)
    assert str(path) in caught.value.message
    assert message in caught.value.message
    assert cure in caught.value.cure


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.toml", tmp_path):
        with pytest.raises(InputError, match="cannot read") as caught:
            read_policy(path)
        assert str(path) in caught.value.message
        assert caught.value.cure
