"""The verbs of a server: serve, reload. Their settings come together in `runtime.config`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from runtime import console
from runtime.config import ServeConfig, parse_assignments, resolve
from runtime.connecting import KEY, TLS_CA, TLS_CERT, TLS_KEY, connect
from runtime.errors import missing_extra
from runtime.serving import logs


def serve_command(
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME=]BUNDLE[@ENGINE]...", help="Models to serve; the first one is the default."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML file with settings and models.", envvar="F2RT_CONFIG")
    ] = None,
    engine: Annotated[str | None, typer.Option(help="auto, or a name such as onnxruntime:int8.")] = None,
    grpc: Annotated[str | None, typer.Option(help="HOST:PORT; port 0 takes a free one. [127.0.0.1:50051]")] = None,
    http: Annotated[str | None, typer.Option(help="HOST:PORT of the OpenAI API, /metrics and /docs; off.")] = None,
    preset: Annotated[str | None, typer.Option(help="latency or throughput.")] = None,
    threads: Annotated[int | None, typer.Option(help="Engine threads; 0: one per core.")] = None,
    cuda_graphs: Annotated[bool | None, typer.Option(help="On a GPU, replay shapes that come back.")] = None,
    keys_file: Annotated[Path | None, typer.Option(help="File of API keys, one a line; read again on reload.")] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate, PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key, PEM.")] = None,
    tls_client_ca: Annotated[Path | None, typer.Option(help="Ask clients for a certificate of this CA.")] = None,
    policy: Annotated[
        Path | None, typer.Option(help="TOML file of limits that engines must be proven under; read again on reload.")
    ] = None,
    allow_unverified: Annotated[
        bool | None, typer.Option("--allow-unverified", help="Serve engines without such a proof, and say so.")
    ] = None,
    shadow: Annotated[str | None, typer.Option(help="BUNDLE or BUNDLE@ENGINE that looks on; see shadow_share.")] = None,
    log_format: Annotated[str | None, typer.Option(help="text or json.")] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Any other setting, see --print-config.")
    ] = None,
    print_config: Annotated[bool, typer.Option(help="Print all settings as TOML and end.")] = False,
    check: Annotated[bool, typer.Option(help="Load and prove the engines, and end.")] = False,
) -> None:
    """Serve proven engines over gRPC and HTTP until SIGTERM or Ctrl-C; SIGHUP loads them again.

    Every setting NAME also has the environment variable F2RT_NAME, and a line in the file.
    """
    with console.readable_errors():
        flags = {
            "engine": engine,
            "grpc": grpc,
            "http": http,
            "preset": preset,
            "threads": threads,
            "cuda_graphs": cuda_graphs,
            "keys_file": _text(keys_file),
            "tls_cert": _text(tls_cert),
            "tls_key": _text(tls_key),
            "tls_client_ca": _text(tls_client_ca),
            "policy": _text(policy),
            "allow_unverified": allow_unverified,
            "shadow": shadow,
            "log_format": log_format,
        }
        resolved = resolve(models or [], flags, os.environ, config, parse_assignments(assignments or []))
        if print_config:
            sys.stdout.write(resolved.as_toml())
            return
        _serve(resolved, check)


def reload_command(
    server: Annotated[str, typer.Option(metavar="HOST:PORT", help="The server.")] = "127.0.0.1:50051",
    model: Annotated[str, typer.Option(help="Name of the model; the default one without it.")] = "",
    engine: Annotated[str, typer.Option(help="Another engine of the bundle.")] = "",
    key: Annotated[str, KEY] = "",
    tls_ca: Annotated[Path | None, TLS_CA] = None,
    tls_cert: Annotated[Path | None, TLS_CERT] = None,
    tls_key: Annotated[Path | None, TLS_KEY] = None,
) -> None:
    """Have a server load a model's bundle again, prove it beside the running engine, and switch."""
    with console.readable_errors():
        with connect(server, key, tls_ca, tls_cert, tls_key, timeout_s=3600.0) as client:
            done = client.reload(model=model, engine=engine)
        what = "the same" if done.old_fingerprint == done.new_fingerprint else "switched"
        print(f"{done.model}: {done.engine}, {what}: {done.old_fingerprint} -> {done.new_fingerprint}")


def _serve(config: ServeConfig, check: bool) -> None:
    # gRPC's own log goes past ours: at its default level with a line for every handshake that fails.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    if not check:  # by default it ends a process; whatever it is about is not read yet
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        import runtime.server as server
    except ModuleNotFoundError as error:
        raise missing_extra(str(error.name), "serve") from error
    try:
        if check:
            for line in server.check(config.models, config.engine, config.settings):
                print(line)
        else:
            server.serve(config.models, config.engine, config.settings, log_style=config.log_format)
    finally:
        logs.flush()  # an error is told after what led to it


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
