"""Where a server's settings come from, and what is said of those that cannot be."""

from __future__ import annotations

import re
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from runtime.bundle import Bundle
from runtime.config import ServeConfig, parse_assignments, resolve
from runtime.errors import InputError
from runtime.settings import PRESETS, EngineSettings, Limits, ModelSettings, SchedulingSettings
from tests.serving import ROOT, f2rt

# Settings with a flag of their own; the others are given with --set.
FLAGS = {"engine", "grpc", "http", "preset", "threads", "keys_file", "tls_cert", "tls_key", "shadow", "log_format"}


def made(*models: str, file: Path | None = None, env: dict[str, str] | None = None, **given: Any) -> ServeConfig:
    flags = {name: value for name, value in given.items() if name in FLAGS}
    assigned = {name: value for name, value in given.items() if name not in FLAGS}
    return resolve(models or ("build/mini",), flags, env or {}, file, assigned)


def test_flags_go_before_environment_before_file_before_preset(tmp_path: Path) -> None:
    file = tmp_path / "f2rt.toml"
    file.write_text('preset = "throughput"\nmax_wait_ms = 1.5\nmax_items = 7\nthreads = 3\n')
    config = made(file=file, env={"F2RT_MAX_ITEMS": "8", "F2RT_THREADS": "2"}, threads=1)
    assert config.settings.scheduling.efficiency == PRESETS["throughput"].efficiency
    assert config.settings.scheduling.max_wait_ms == 1.5
    assert config.settings.limits.max_items == 8
    assert config.engine.threads == 1
    assert config.sources == {
        "preset": str(file),
        "max_wait_ms": str(file),
        "max_items": "F2RT_MAX_ITEMS",
        "threads": "--threads",
    }


def test_every_setting_has_a_name() -> None:
    values = made().values
    for settings in (EngineSettings, Limits, SchedulingSettings):
        assert {f.name for f in fields(settings)} <= set(values)
    assert {"grpc", "http", "max_message_bytes", "max_connections", "drain_s", "golden_period_s"} <= set(values)
    assert made().settings.scheduling == PRESETS["latency"]
    assert made(preset="throughput").settings.scheduling == PRESETS["throughput"]


def given_file(folder: Path, text: str, name: str = "given.toml") -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_what_is_printed_says_the_same_when_it_is_read(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("a-secret-of-some-length")
    config = made("one=a/b@onnxruntime:int8", "c/d", keys_file=str(keys), gather_ms="2", http="127.0.0.1:8080")
    printed = config.as_toml()
    assert "a-secret" not in printed
    assert "gather_ms = 2.0  # --set" in printed
    file = tmp_path / "printed.toml"
    file.write_text(printed)
    again = resolve([], {}, {}, file)
    assert (again.models, again.engine, again.settings) == (config.models, config.engine, config.settings)
    assert tomllib.loads(printed)["model"][0] == {"name": "one", "bundle": "a/b", "engine": "onnxruntime:int8"}


def test_what_is_secret_in_a_url_is_not_printed() -> None:
    for given, shown in (
        ("http://user:secret@host:4318/v1/traces", "http://***@host:4318/v1/traces"),
        ("https://user:se@cret@host", "https://***@host"),
        ("http://host/a@b?api_key=secret&c@d", "http://host/a@b?***"),
    ):
        printed = made(otlp_endpoint=given).as_toml()
        assert tomllib.loads(printed)["otlp_endpoint"] == shown
        assert made(otlp_endpoint=given).settings.otlp_endpoint == given


@pytest.mark.parametrize(
    ("variable", "cure"),
    [
        ("F2RT_KEYSFILE", "Did you mean F2RT_KEYS_FILE?"),
        ("F2RT_KEY_FILE", "Did you mean F2RT_KEYS_FILE?"),
        ("F2RT_TLS_CERTIFICATE", "Did you mean F2RT_TLS_CERT?"),
        ("F2RT_keys_file", "Did you mean F2RT_KEYS_FILE?"),
        ("F2RT_SOMETHING_ELSE", "--print-config"),
        ("F2RT_PORT", "Did you mean"),
    ],
)
def test_a_variable_that_nothing_reads_is_refused(variable: str, cure: str) -> None:
    with pytest.raises(InputError, match=f"{variable}: there is no such variable") as caught:
        made(env={"F2RT_THREADS": "1", "PATH": "/bin", variable: "x"})
    assert cure in caught.value.cure


def test_variables_of_other_commands_and_of_kubernetes_are_left_alone() -> None:
    source = "".join(
        file.read_text(encoding="utf-8") for folder in ("runtime", "export") for file in (ROOT / folder).rglob("*.py")
    )
    read = set(re.findall(r"""(?:envvar=|environ\.get\(|environ\[|getenv\()["'](F2RT_[A-Z_]+)["']""", source))
    assert {"F2RT_CACHE", "F2RT_CONFIG", "F2RT_API_KEY", "F2RT_WAIT"} <= read
    made(env=dict.fromkeys(read - {"F2RT_ALLOW_UNVERIFIED", "F2RT_POLICY"}, "x"))
    for name in ("F2RT", "F2RT_GRPC"):
        port = f"{name}_PORT"
        made(
            env={
                f"{name}_SERVICE_HOST": "10.0.0.1",
                f"{name}_SERVICE_PORT": "50051",
                f"{name}_SERVICE_PORT_GRPC": "50051",
                port: "tcp://10.0.0.1:50051",
                f"{port}_50051_TCP": "tcp://10.0.0.1:50051",
                f"{port}_50051_TCP_PROTO": "tcp",
                f"{port}_50051_TCP_PORT": "50051",
                f"{port}_50051_TCP_ADDR": "10.0.0.1",
            }
        )


def test_names_that_toml_wants_escaped_are_read_back(tmp_path: Path) -> None:
    config = made('"🐝\\ü"=a\x7f/b', max_wait_ms="inf")
    again = resolve([], {}, {}, given_file(tmp_path, config.as_toml()))
    assert (again.models, again.settings) == (config.models, config.settings)
    odd = given_file(tmp_path, "gather_ms = 2", name="a\nb\x7f.toml")
    printed = resolve(["a"], {}, {}, odd).as_toml()
    assert tomllib.loads(printed)["gather_ms"] == 2
    assert repr(str(odd)) in printed


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("build/mini", ModelSettings("mini", "build/mini", "auto")),
        ("build/mini/", ModelSettings("mini", "build/mini/", "auto")),
        ("fast=build/mini@onnxruntime:int8", ModelSettings("fast", "build/mini", "onnxruntime:int8")),
        ("build/m@tensorrt-rtx:fp16@sm89", ModelSettings("m", "build/m", "tensorrt-rtx:fp16@sm89")),
        ("a@b/mini", ModelSettings("mini", "a@b/mini", "auto")),
        ("x=y/z=mini", ModelSettings("x", "y/z=mini", "auto")),
        ("y/z=mini", ModelSettings("z=mini", "y/z=mini", "auto")),
        ("mini@auto", ModelSettings("mini", "mini", "auto")),
    ],
)
def test_models_are_name_bundle_engine(text: str, expected: ModelSettings) -> None:
    assert made(text).models == [expected]


WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "unknown": ({"max_wait": "1"}, "--set: there is no setting 'max_wait'", "Did you mean max_wait_ms?"),
    "unlike any": ({"zzz": "1"}, "there is no setting 'zzz'", "--print-config"),
    "not a number": ({"max_items": "many"}, "--set: max_items is 'many'; it is a whole number", "whole number"),
    "half a number": ({"max_items": "1.5"}, "max_items is '1.5'; it is a whole number", "whole number"),
    "not a boolean": ({"access_log": "maybe"}, "access_log is 'maybe'; it is true or false", "true or false"),
    "too small": ({"max_items": "0"}, "max_items is 0; it must be at least 1", "Set max_items"),
    "not a number at all": ({"golden_period_s": "nan"}, "golden_period_s is nan; it must be at least 0.01", "Set"),
    "endless": ({"drain_s": "inf"}, "drain_s is inf; it must be at most 1e+08", "three years"),
    "shadow's drift": ({"shadow": "x", "shadow_drift": "nan"}, "shadow_drift is nan", "Set shadow_drift"),
    "efficiency": ({"efficiency": "1"}, "efficiency is 1.0", "between 0 and 1"),
    "preset": ({"preset": "fast"}, "--preset: there is no preset 'fast'", "latency, throughput"),
    "log format": ({"log_format": "xml"}, "no log_format 'xml'", "text or json"),
    "truncate": ({"truncate": "middle"}, "no truncate 'middle'", "error, end or start"),
    "half of TLS": ({"tls_cert": "a.pem"}, "TLS needs tls_cert and tls_key", "PEM"),
    "CA alone": ({"tls_client_ca": "a.pem"}, "TLS needs tls_cert and tls_key", "PEM"),
    "shadow's share": ({"shadow": "x", "shadow_share": "2"}, "the shadow's share is 2.0", "up to 1"),
    "a URL": ({"http": "http://127.0.0.1:80"}, "the address 'http://127.0.0.1:80' is not HOST:PORT", "127.0.0.1:8080"),
    "port": ({"grpc": "localhost:65536"}, "the address 'localhost:65536' is not HOST:PORT", "127.0.0.1:50051"),
    "address": ({"http": "nonsense"}, "the address 'nonsense' is not HOST:PORT", "127.0.0.1:8080"),
}


@pytest.mark.parametrize("case", list(WRONG))
def test_a_wrong_setting_is_named_with_its_cure(case: str) -> None:
    flags, message, cure = WRONG[case]
    with pytest.raises(InputError) as caught:
        made(**flags)
    assert message in caught.value.message
    assert cure in caught.value.cure


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"grpc = ", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"threads = 'two'", "threads is 'two'; it is a whole number"),
        (b"preset = ['latency']", "there is no preset ['latency']"),
        (b"threads = [1]", "threads is [1]; it is a whole number"),
        (b"[[model]]\nname = 'a'", "model 1 is not right (bundle is missing"),
        (b"[[model]]\nbundle = 'a'\npath = 'b'", "model 1 is not right (unknown: path)"),
        (b"model = 3", "model 1 is not right (unknown: no table)"),
        (b"[[model]]\nbundle = 'a/x'\n[[model]]\nbundle = 'b/x'", "two models are called 'x'"),
        (b"", "no bundle was given"),
    ],
)
def test_a_wrong_file(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "f2rt.toml"
    file.write_bytes(content)
    with pytest.raises(InputError) as caught:
        resolve([], {}, {}, file)
    assert message in caught.value.message
    with pytest.raises(InputError, match="cannot be read"):
        resolve([], {}, {}, tmp_path / "nowhere.toml")


def test_assignments() -> None:
    assert parse_assignments(["a=b", "max-items = 3", "x=y=z"]) == {"a": "b", "max_items": "3", "x": "y=z"}
    with pytest.raises(InputError, match="has no value"):
        parse_assignments(["a"])


def test_print_config_and_check(bundle: Bundle, tmp_path: Path) -> None:
    printed = f2rt("serve", str(bundle.folder), "--set", "max_items=5", "--print-config", env={"F2RT_DRAIN_S": "2"})
    assert printed.returncode == 0, printed.stderr.decode()
    content = tomllib.loads(printed.stdout.decode())
    assert (content["max_items"], content["drain_s"]) == (5, 2.0)
    checked = f2rt("serve", str(bundle.folder), "--check")
    assert checked.returncode == 0, checked.stderr.decode()
    assert bundle.manifest.engines[0].fingerprint in checked.stdout.decode()
    assert "reproduces PyTorch's golden vectors" in checked.stdout.decode()
    refused = f2rt("serve", str(bundle.folder), "--check", "--keys-file", str(tmp_path / "nowhere"))
    assert refused.returncode == 2
    assert "the keys in" in refused.stderr.decode()


def test_check_opens_the_shadow_as_well(bundle: Bundle, tmp_path: Path) -> None:
    checked = f2rt("serve", str(bundle.folder), "--check", "--shadow", f"{bundle.folder}@onnxruntime:fp32")
    assert checked.returncode == 0, checked.stderr.decode()
    assert "the shadow of mini: onnxruntime:fp32 reproduces PyTorch's golden vectors" in checked.stdout.decode()
    for shadow, words in ((str(tmp_path / "nowhere"), "is not there"), (f"{bundle.folder}@x:y", "has no engine 'x:y'")):
        refused = f2rt("serve", str(bundle.folder), "--check", "--shadow", shadow)
        assert refused.returncode == 2
        assert words in refused.stderr.decode()
