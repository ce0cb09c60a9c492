"""`f2rt diff`: two bundles, two engines, or a bundle and a server on the command line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from runtime import console
from runtime.connecting import KEY, TLS_CA, TLS_CERT, TLS_KEY, connect
from runtime.errors import InputError


def diff_command(
    bundle_a: Annotated[Path, typer.Argument(metavar="BUNDLE_A", help="The bundle that made the index.")],
    bundle_b: Annotated[
        Path | None, typer.Argument(metavar="[BUNDLE_B]", help="The bundle to go to; may be the same.")
    ] = None,
    server: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Compare with what this server answers, in place of B.")
    ] = None,
    engine_a: Annotated[str | None, typer.Option(help="Engine of A; default: auto, or the server's.")] = None,
    engine_b: Annotated[str | None, typer.Option(help="Engine of B; default: auto.")] = None,
    texts: Annotated[Path | None, typer.Option(help="Your own texts in place of the shipped ones.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only N of the texts, taken evenly from all.")] = None,
    policy: Annotated[Path | None, typer.Option(help="A TOML file with other limits than the shipped ones.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    model: Annotated[str, typer.Option(help="Model of the server; its default without it.")] = "",
    key: Annotated[str, KEY] = "",
    tls_ca: Annotated[Path | None, TLS_CA] = None,
    tls_cert: Annotated[Path | None, TLS_CERT] = None,
    tls_key: Annotated[Path | None, TLS_KEY] = None,
) -> None:
    """Say what changed between two bundles, how far vectors move, and whether an index must be embedded again.

    With --server, whether a server answers with an engine of the bundle, and with its vectors. Exit status: 0 nothing
    moves beyond the limits, 1 something does, 2 could not compare.
    """
    with console.readable_errors():
        if (bundle_b is None) == (server is None):
            raise InputError(
                "give one thing to compare with: a second bundle or --server.",
                cure="Call f2rt diff BUNDLE_A BUNDLE_B, or f2rt diff BUNDLE --server HOST:PORT.",
            )
        if server is not None and engine_b is not None:
            raise InputError("--engine-b names an engine of B, and B is a server.", cure="Leave it out.")
        if server is None and (model or tls_ca or tls_cert or tls_key):
            raise InputError("--model and --tls-... are about a server.", cure="Name the --server, or leave them out.")
        from calibration.texts import read_texts, verification_texts
        from export.compare import choose, compare_bundles
        from export.diff_report import print_report, to_json
        from runtime.bundle import open_bundle
        from runtime.policy import read_policy

        limits = read_policy(policy)
        a = open_bundle(bundle_a)
        chosen = choose(
            read_texts(texts) if texts else verification_texts(),
            str(texts) if texts else "the shipped verification set",
            limit,
        )
        if server is None:
            assert bundle_b is not None
            b = open_bundle(bundle_b)
            with console.bars() as bars:
                report = compare_bundles(
                    a,
                    b,
                    chosen,
                    engine_a=engine_a or "auto",
                    engine_b=engine_b or "auto",
                    policy=limits,
                    progress=bars.update,
                )
        else:
            client = connect(server, key, tls_ca, tls_cert, tls_key)
            from export.audit import audit_server

            with client, console.bars() as bars:
                report = audit_server(
                    a, client, server, chosen, engine=engine_a, model=model, policy=limits, progress=bars.update
                )
        if as_json:
            sys.stdout.buffer.write(to_json(report))
        else:
            print_report(report, console.out())
    raise typer.Exit(int(report.moved))
