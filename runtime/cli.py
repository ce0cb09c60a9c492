"""The verbs that need only the runtime: embed, inspect, serve, reload. `export.cli` adds the others."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

import runtime
from runtime import console
from runtime.connecting import KEY, TLS_CA, TLS_CERT, TLS_KEY, connect
from runtime.errors import InputError
from runtime.serve_cli import reload_command, serve_command

app = typer.Typer(
    name="f2rt",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Qwen3 embedding checkpoints to proven engines, served over gRPC.",
)


# The same setting, and the same variable, as a server's: see `runtime.config`.
_POLICY = typer.Option(
    help="TOML file of limits that the bundle's engines must be proven under.",
    envvar="F2RT_POLICY",
    show_envvar=True,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"f2rt {runtime.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Qwen3 embedding checkpoints to proven engines, served over gRPC."""


@app.command("embed")
def embed_command(
    context: typer.Context,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[BUNDLE] TEXT...",
            help="Bundle (without --server) and texts; no text: one per line of standard input.",
        ),
    ] = None,
    server: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Ask a server instead of opening a bundle.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Name of a prompt, for example query.")] = None,
    instruction: Annotated[str | None, typer.Option(help="The prompt's text itself.")] = None,
    dim: Annotated[int | None, typer.Option(help="Only the first N dimensions, normalized again.")] = None,
    engine: Annotated[str, typer.Option(help="Engine of the bundle.")] = "auto",
    policy: Annotated[Path | None, _POLICY] = None,
    allow_unverified: Annotated[
        bool,
        typer.Option(
            "--allow-unverified",
            envvar="F2RT_ALLOW_UNVERIFIED",
            show_envvar=True,
            help="Use an engine of the bundle without such a proof, and say so.",
        ),
    ] = False,
    model: Annotated[str, typer.Option(help="Model of the server; its default without it.")] = "",
    key: Annotated[str, KEY] = "",
    tls_ca: Annotated[Path | None, TLS_CA] = None,
    tls_cert: Annotated[Path | None, TLS_CERT] = None,
    tls_key: Annotated[Path | None, TLS_KEY] = None,
    output_format: Annotated[str, typer.Option("--format", help="json (a line per text) or npy (one array).")] = "json",
) -> None:
    """Embed texts, here or on a server, and print the vectors."""
    with console.readable_errors():
        if output_format not in ("json", "npy"):
            raise InputError(f"there is no format {output_format!r}.", cure="Choose json or npy.")
        _check_place(context, server)
        arguments = list(words or [])
        if server is None and not arguments:
            raise InputError("no bundle was given.", cure="Call f2rt embed BUNDLE TEXT..., or name a --server.")
        bundle = Path(arguments.pop(0)) if server is None else None
        texts = arguments or _lines(sys.stdin.buffer.read())
        if not texts:
            raise InputError("there is no text to embed.", cure="Give texts as arguments or on standard input.")
        if output_format == "npy" and sys.stdout.isatty():
            raise InputError("npy is binary and standard output is a terminal.", cure="Redirect it: ... > vectors.npy")
        if server is not None:
            from runtime.bundle import MANIFEST

            if arguments and (Path(arguments[0]) / MANIFEST).is_file():
                console.warn(f"{arguments[0]} is embedded as a text: with --server no bundle is named.")
            with connect(server, key, tls_ca, tls_cert, tls_key) as client:
                answer = client.embed(texts, prompt_name=prompt, prompt=instruction, dimensions=dim, model=model)
                vectors, tokens, fingerprint = (
                    answer.vectors,
                    [i.tokens for i in answer.items],
                    answer.fingerprint,
                )
        else:
            from runtime.bundle import open_bundle
            from runtime.embedder import open_embedder
            from runtime.gate import Gate
            from runtime.policy import read_policy

            assert bundle is not None
            gate = Gate(read_policy(policy), allow_unverified)
            embedder = open_embedder(open_bundle(bundle), engine, gate=gate)
            if embedder.loaded.unverified:
                name = embedder.loaded.record.full_name
                console.warn(f"the engine {name} is unverified: {embedder.loaded.unverified}.")
            result = embedder.embed(texts, prompt_name=prompt, prompt=instruction, dimensions=dim)
            vectors, tokens, fingerprint = (
                result.vectors,
                [len(i.ids) for i in result.items],
                result.fingerprint,
            )
        if output_format == "npy":
            import numpy as np

            np.save(sys.stdout.buffer, vectors)
            return
        for text, row, count in zip(texts, vectors.tolist(), tokens, strict=True):
            line = {"text": text, "tokens": count, "fingerprint": fingerprint, "embedding": row}
            # JSON is UTF-8, whatever the locale says.
            sys.stdout.buffer.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")


def _check_place(context: typer.Context, server: str | None) -> None:
    """Raise InputError for a flag that says nothing where texts are embedded: it would be ignored.

    Variables are for all commands, so they are no mistake.
    """
    of_a_server = ("model", "key", "tls_ca", "tls_cert", "tls_key")
    for name in of_a_server if server is None else ("engine", "policy", "allow_unverified"):
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            flag = f"--{name.replace('_', '-')}"
            if server is not None:
                raise InputError(f"{flag} is about a bundle, and {server} is a server.", cure=f"Leave {flag} out.")
            raise InputError(f"{flag} is about a server.", cure=f"Name the --server, or leave {flag} out.")


def _lines(data: bytes) -> list[str]:
    """Split standard input at line feeds only: a text may hold U+2028 or a form feed."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is not UTF-8 at byte {error.start}.", cure="Convert it first.") from error
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []


@app.command("inspect")
def inspect_command(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder.")],
    full: Annotated[bool, typer.Option("--json", help="Print the whole manifest.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Read all files and compare their hashes.")] = False,
    policy: Annotated[Path | None, _POLICY] = None,
) -> None:
    """Show what a bundle holds: source, contract, graphs, engines and their verdicts."""
    with console.readable_errors():
        from rich.table import Table
        from rich.text import Text

        from runtime.bundle import MANIFEST, bundle_files, check_hash, engine_files, open_bundle
        from runtime.gate import refusal
        from runtime.policy import read_policy

        opened, limits = open_bundle(bundle), read_policy(policy)
        if verify:
            for record in [*bundle_files(opened.manifest), *engine_files(opened)]:
                check_hash(opened, record)
        if full:
            sys.stdout.write((bundle / MANIFEST).read_text(encoding="utf-8"))
            return
        manifest, screen = opened.manifest, console.out()
        contract = manifest.contract
        facts = Table(show_header=False, show_edge=False, pad_edge=False)
        facts.add_column(style="bold")
        facts.add_column()
        source = manifest.source
        rows = [
            ("source", source.id + (f" @ {source.revision}" if source.revision else "")),
            ("license", source.license or "not declared"),
            ("fingerprint", manifest.fingerprint),
            ("made", f"{manifest.created_at} by f2rt {manifest.versions.get('f2rt', '?')}"),
            ("policy", f"{limits.name}, {limits.sha256[:12]}"),
            ("dimensions", f"{contract.dim}; trained: {', '.join(map(str, contract.trained_dims))}"),
            ("tokens", f"up to {contract.max_tokens}; EOS {contract.eos_id}, pad {contract.pad_id}"),
            *((f"prompt {name}", json.dumps(text, ensure_ascii=False)) for name, text in contract.prompts.items()),
            *(
                (f"{g.precision} graph", f"by {g.origin.producer}, given as {g.origin.id}, not f2rt's own")
                for g in manifest.graphs
                if g.origin
            ),
            *(("notice", notice) for notice in manifest.notices),
        ]
        for name, value in rows:
            facts.add_row(Text(name), Text(value))  # Text: a prompt may hold what rich takes for markup
        screen.print(facts)
        table = Table("engine", "fingerprint", "file", "verdict", "min cosine", show_edge=False, pad_edge=False)
        for engine in manifest.engines:
            executed = engine.parity is not None and engine.parity.verdict != "not_executed"
            cosine = f"{engine.parity.min_cosine:.7f}" if engine.parity and executed else ""
            refused = refusal(opened, engine, limits)
            verdict = refused.reason if refused else "pass"
            table.add_row(engine.full_name, engine.fingerprint, engine.file, verdict, cosine)
        screen.print(table)
        if verify:
            screen.print("all files have the recorded hashes")


app.command("serve")(serve_command)
app.command("reload")(reload_command)


def main() -> None:
    """Run the runtime's verbs alone."""
    app()
