"""How a server is set up: flags before environment before one TOML file before the preset. One name for each setting.

A setting called `max_wait_ms` is that key in the file, `F2RT_MAX_WAIT_MS` in the environment, and on the command line
its own flag or `--set max_wait_ms=...`. Models are `[NAME=]BUNDLE[@ENGINE]`, or `[[model]]` tables in the file.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from runtime.errors import InputError
from runtime.settings import (
    PRESETS,
    EngineSettings,
    Limits,
    ModelSettings,
    SchedulingSettings,
    ServeSettings,
    ShadowSettings,
    TlsSettings,
)
from runtime.tokenizer import Truncate
from runtime.toml_text import toml_value

Value = str | int | float | bool

_OWN: dict[str, Value] = {
    "preset": "latency",
    "engine": "auto",
    "grpc": "127.0.0.1:50051",
    "http": "",
    "truncate": "end",
    "tls_cert": "",
    "tls_key": "",
    "tls_client_ca": "",
    "keys_file": "",
    "shadow": "",
    "shadow_share": 0.05,
    "shadow_drift": 0.01,
    "log_format": "text",
}
_NESTED = ("grpc_address", "http_address", "truncate", "limits", "scheduling", "tls", "keys_file", "shadow")
_LOG_FORMATS = ("text", "json")
# Variables that are no settings of a server: of the command line, of other commands, and of the cache.
_OTHER_VARIABLES = ("F2RT_CONFIG", "F2RT_CACHE", "F2RT_API_KEY", "F2RT_WAIT")
# What Kubernetes sets for every Service, here for one called f2rt or f2rt-something; SERVICE_HOST is always there.
_SERVICE_VARIABLE = re.compile(r"(F2RT(?:_[A-Z0-9_]+?)??)_(?:SERVICE_HOST|SERVICE_PORT(?:_\w+)?|PORT(?:_\d+_\w+)?)")
_SECRETS_OF_URLS = re.compile(r"(?<=://)[^/?#]*@"), re.compile(r"(?<=\?).+")


def _defaults(preset: str) -> dict[str, Value]:
    """Return every setting's value under a preset."""
    found = dict(_OWN)
    for settings in (EngineSettings(), Limits(), PRESETS[preset]):
        found |= {f.name: getattr(settings, f.name) for f in fields(settings)}
    server = ServeSettings()
    return found | {f.name: getattr(server, f.name) for f in fields(server) if f.name not in _NESTED}


@dataclass(frozen=True)
class ServeConfig:
    """Everything `f2rt serve` was told, and where from."""

    models: list[ModelSettings]
    engine: EngineSettings
    settings: ServeSettings
    log_format: str
    values: dict[str, Value] = field(repr=False)
    sources: dict[str, str] = field(repr=False)

    def as_toml(self) -> str:
        """Return the settings as a file that says the same, but for what is secret in URLs, which it leaves out.

        Keys are in their own file, which is named, not shown.
        """
        lines = []
        for name, value in self.values.items():
            source = self.sources.get(name, "")
            comment = f"  # {source if source.isprintable() else ascii(source)}" if source else ""
            lines.append(f"{name} = {toml_value(_without_secrets(value))}{comment}")
        for model in self.models:
            table = {"name": model.name, "bundle": model.bundle, "engine": model.engine}
            lines += ["", "[[model]]", *(f"{name} = {toml_value(value)}" for name, value in table.items())]
        return "\n".join(lines) + "\n"


def resolve(
    models: Sequence[str],
    flags: Mapping[str, Any],
    environment: Mapping[str, str],
    file: Path | None,
    assigned: Mapping[str, str] | None = None,
) -> ServeConfig:
    """Put the settings together; `flags` that are None were not given, `assigned` is what `--set` says.

    Raises InputError, naming the place.
    """
    given: dict[str, tuple[Any, str]] = {}
    tables: list[Any] = []
    if file is not None:
        content = _read(file)
        tables = content.pop("model", [])
        given |= {name: (value, str(file)) for name, value in content.items()}
    known = _defaults("latency")
    _check_variables(environment, [f"F2RT_{name.upper()}" for name in known])
    for name in known:
        variable = f"F2RT_{name.upper()}"
        if variable in environment:
            given[name] = (environment[variable], variable)
    for name, value in flags.items():
        if value is not None:
            given[name] = (value, f"--{name.replace('_', '-')}")
    given |= {name: (value, "--set") for name, value in (assigned or {}).items()}
    for name, (_, source) in given.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            cure = f"Did you mean {close[0]}?" if close else "See f2rt serve --print-config for all of them."
            raise InputError(f"{source}: there is no setting {name!r}.", cure=cure)
    preset, source = given.get("preset", (known["preset"], ""))
    if not isinstance(preset, str) or preset not in PRESETS:
        raise InputError(f"{source}: there is no preset {preset!r}.", cure=f"Choose one of: {', '.join(PRESETS)}.")
    values = _defaults(preset)
    for name, (value, source) in given.items():
        values[name] = _typed(name, value, type(values[name]), source)
    return _build(models, tables, values, {name: source for name, (_, source) in given.items()}, file)


def _without_secrets(value: Value) -> Value:
    """Return a value without what a URL has of users, passwords, and keys in its query."""
    if not isinstance(value, str) or "://" not in value:
        return value
    users, queries = _SECRETS_OF_URLS
    return queries.sub("***", users.sub("***@", value))


def _check_variables(environment: Mapping[str, str], settings: Sequence[str]) -> None:
    """Raise InputError for a F2RT_ variable that nothing reads: mistyped, it would leave a server without its keys."""
    known = {*settings, *_OTHER_VARIABLES}
    for variable in sorted(environment):
        if not variable.startswith("F2RT_") or variable in known:
            continue
        service = _SERVICE_VARIABLE.fullmatch(variable)
        if service is not None and f"{service[1]}_SERVICE_HOST" in environment:
            continue
        name = variable.removeprefix("F2RT_").upper()
        close = difflib.get_close_matches(name, [one.removeprefix("F2RT_") for one in sorted(known)], 1)
        cure = f"Did you mean F2RT_{close[0]}?" if close else "Unset it; f2rt serve --print-config shows all settings."
        raise InputError(f"{variable}: there is no such variable.", cure=cure)


def parse_assignments(assignments: Sequence[str]) -> dict[str, str]:
    """Return the settings of `--set NAME=VALUE`. Raises InputError."""
    found = {}
    for assignment in assignments:
        name, sign, value = assignment.partition("=")
        if not sign:
            raise InputError(f"--set {assignment!r} has no value.", cure="Give --set NAME=VALUE.")
        found[name.strip().replace("-", "_")] = value.strip()
    return found


def _build(
    models: Sequence[str], tables: Any, values: dict[str, Value], sources: dict[str, str], file: Path | None
) -> ServeConfig:
    def settings(kind: type) -> Any:
        return kind(**{f.name: values[f.name] for f in fields(kind)})

    v: dict[str, Any] = values
    if v["log_format"] not in _LOG_FORMATS:
        raise InputError(f"there is no log_format {v['log_format']!r}.", cure="Choose text or json.")
    if v["truncate"] not in list(Truncate):
        raise InputError(f"there is no truncate {v['truncate']!r}.", cure="Choose error, end or start.")
    if bool(v["tls_cert"]) != bool(v["tls_key"]) or (v["tls_client_ca"] and not v["tls_cert"]):
        raise InputError("TLS needs tls_cert and tls_key; tls_client_ca comes on top.", cure="Give both, as PEM files.")
    tls = TlsSettings(v["tls_cert"], v["tls_key"], v["tls_client_ca"]) if v["tls_cert"] else None
    shadow = None
    if v["shadow"]:
        bundle, engine = _split_engine(v["shadow"], "auto")
        shadow = ShadowSettings(bundle, engine, v["shadow_share"], v["shadow_drift"])
    server = ServeSettings(
        grpc_address=v["grpc"],
        http_address="" if v["http"] == "off" else v["http"],
        truncate=Truncate(v["truncate"]),
        limits=settings(Limits),
        scheduling=settings(SchedulingSettings),
        tls=tls,
        keys_file=v["keys_file"],
        shadow=shadow,
        **{f.name: v[f.name] for f in fields(ServeSettings) if f.name not in _NESTED},
    )
    wanted = [_model(text, v["engine"]) for text in models] or _tables(tables, v["engine"], file)
    if not wanted:
        raise InputError("no bundle was given.", cure="Call f2rt serve BUNDLE, or write [[model]] into the file.")
    names = [model.name for model in wanted]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"two models are called {twice!r}.", cure="Give them names: NAME=BUNDLE[@ENGINE].")
    return ServeConfig(wanted, settings(EngineSettings), server, v["log_format"], values, sources)


def _model(text: str, engine: str) -> ModelSettings:
    """Return the model of `[NAME=]BUNDLE[@ENGINE]`; without a name it is called like the bundle's folder."""
    name, sign, rest = text.partition("=")
    if not sign or "/" in name:
        name, rest = "", text
    bundle, engine = _split_engine(rest, engine)
    return ModelSettings(name or Path(bundle).resolve().name, bundle, engine)


def _split_engine(text: str, engine: str) -> tuple[str, str]:
    """Split BUNDLE@ENGINE. An @ in the folder's own name stays: an engine has a colon, or is `auto`."""
    bundle, sign, own = text.rpartition("@")
    if sign and (":" in own or own == "auto") and "/" not in own:
        # ENGINE may have a target of its own: tensorrt-rtx:fp16@sm89.
        return bundle, own
    bundle, sign, own = text.partition("@")
    if sign and ":" in own and "/" not in own:
        return bundle, own
    return text, engine


def _tables(tables: Any, engine: str, file: Path | None) -> list[ModelSettings]:
    models = []
    for number, table in enumerate(tables if isinstance(tables, list) else [tables], 1):
        unknown = sorted(set(table) - {"name", "bundle", "engine"}) if isinstance(table, dict) else ["no table"]
        if unknown or not all(isinstance(value, str) for value in table.values()) or "bundle" not in table:
            problem = f"unknown: {', '.join(unknown)}" if unknown else "bundle is missing, or a value is no text"
            raise InputError(
                f"{file}: model {number} is not right ({problem}).", cure="Give name, bundle and engine as texts."
            )
        bundle = table["bundle"]
        name = table.get("name") or Path(bundle).resolve().name
        models.append(ModelSettings(name, bundle, table.get("engine", engine)))
    return models


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"the configuration {file} cannot be read: {error}.", cure="Give a TOML file.") from error


def _typed(name: str, value: Any, kind: type, source: str) -> Value:
    """Return a value as its setting's type: as it stands in TOML, or read from text. Raises InputError."""
    if type(value) is kind:
        return value  # type: ignore[return-value]
    if kind is float and type(value) is int:
        return float(value)
    if isinstance(value, str):
        text = value.strip().lower()
        if kind is bool and text in ("1", "true", "yes", "on", "0", "false", "no", "off"):
            return text in ("1", "true", "yes", "on")
        try:
            if kind is int:
                return int(text)
            if kind is float:
                return float(text)
        except ValueError:
            pass
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    raise InputError(f"{source}: {name} is {value!r}; it is {words[kind]}.", cure=f"Give {words[kind]}.")
