"""The `f2rt` command: the runtime's verbs, and those that make and prove bundles.

Heavy libraries are imported inside the verb that needs them, so that the runtime's verbs start fast and work where
only the runtime is installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from export.diff_cli import diff_command
from export.lock import WAIT_S, Wait
from export.options import WaitOption, export_extra
from export.parity_cli import parity_command
from runtime import console
from runtime.cli import app

BundleOption = Annotated[
    Path, typer.Option("--out", help="The bundle's folder; what is in a bundle there and still holds is kept.")
]


@app.command("export")
def export_command(
    out: BundleOption,
    model: Annotated[
        str | None,
        typer.Argument(help="Folder of a checkpoint, or a hub id (OWNER/NAME); may be left out when FROM_ONNX is one."),
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="Comma-separated: fp32, fp16, bf16, int8; default: fp32, or what FROM_ONNX is.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Your own calibration texts (JSON lines or plain text) in place of the shipped.")
    ] = None,
    int8_budget: Annotated[
        float | None,
        typer.Option(help="Part of the matrix work that must stay INT8; the rest may be left out. [default: 0.9]"),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    from_onnx: Annotated[
        Path | None,
        typer.Option(help="Take this feature-extraction graph (a folder of Optimum's, or an .onnx file) and not ours."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write everything again, whatever has changed.")] = False,
    wait: WaitOption = WAIT_S,
) -> None:
    """Turn a checkpoint into a bundle: ONNX graphs with pooling inside. Prove it with `f2rt parity`.

    What has not changed since the last export is kept, with its engines and verdicts.
    """
    with console.readable_errors(), export_extra():
        from calibration.texts import check_disjoint, read_texts, verification_texts
        from export import foreign
        from export.checkpoint import Checkpoint
        from export.hub import locate
        from export.own_texts import require_prompts
        from export.pipeline import export_bundle
        from export.precision import Precision, parse_precisions
        from export.quantize import DEFAULT_BUDGET
        from runtime.errors import InputError

        if model is None and from_onnx is None:
            raise InputError("no checkpoint was given.", cure="Call f2rt export MODEL --out BUNDLE.")
        if from_onnx is not None and calibration is not None:
            raise InputError("--calibration shapes graphs that f2rt writes itself.", cure=foreign.OWN_GRAPH)
        if from_onnx is not None and int8_budget is not None:
            raise InputError("--int8-budget shapes graphs that f2rt writes itself.", cure=foreign.OWN_GRAPH)
        texts = read_texts(calibration) if calibration else None
        if texts is not None:
            check_disjoint(texts, verification_texts(), str(calibration))
        precisions = parse_precisions(precision or "fp32")
        given = None
        if from_onnx is not None and (model is None or Path(model).absolute() == foreign.root_of(from_onnx).absolute()):
            foreign.find_graph(from_onnx)
            model = foreign.checkpoint_of(from_onnx)
        checkpoint = Checkpoint.open(locate(str(model), revision))
        if calibration is not None and texts is not None:
            require_prompts(calibration, texts, checkpoint.contract.prompts)
        if from_onnx is not None:
            given = foreign.open_foreign(from_onnx, checkpoint.config)
            foreign.require_precision(given, precisions if precision else [])
        screen = console.out()
        for notice in [*checkpoint.notices, *(given.notices if given else ())]:
            screen.print(f"notice: {notice}", markup=False)
        if texts is not None and precisions == [Precision.FP32]:
            screen.print(f"notice: {calibration} is not used: fp32 needs no calibration", markup=False)
        lines: list[str] = []
        with console.bars() as bars:
            bundle = export_bundle(
                checkpoint,
                out,
                precisions,
                lambda step, done: bars.update(step.label, done, step.total),
                calibration=texts,
                int8_budget=DEFAULT_BUDGET if int8_budget is None else int8_budget,
                foreign=given,
                force=force,
                tell=lines.append,
                wait=Wait(wait, bars.say),
            )
        contract = bundle.manifest.contract
        screen.print(
            f"{model}: {contract.architecture}, {contract.dim} dimensions, up to {contract.max_tokens} tokens, "
            f"EOS {contract.eos_id}"
        )
        for line in lines:
            screen.print(line, markup=False, soft_wrap=True)
        for graph in bundle.manifest.graphs:
            if graph.origin:
                screen.print(
                    f"it is the graph of {graph.origin.producer} ({graph.origin.id}), its {graph.origin.hidden_states} "
                    f"pooled at the last token and normalized; prove it with: f2rt parity {out}",
                    markup=False,
                )


@app.command("build")
def build_command(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder.")],
    backend: Annotated[str, typer.Option(help="tensorrt, tensorrt-rtx or onnxruntime-cuda.")],
    precision: Annotated[str, typer.Option(help="Comma-separated: fp16, bf16, int8.")] = "fp16",
    target: Annotated[str | None, typer.Option(help="Comma-separated: sm80, sm89, ...; default: this GPU.")] = None,
    profile: Annotated[str, typer.Option(help="latency, throughput, or buckets such as 1x64,8x256.")] = "latency",
    wait: WaitOption = WAIT_S,
) -> None:
    """Compile engines from a bundle's graphs, or record them where nothing is compiled. Without a GPU, name targets."""
    with console.readable_errors(), export_extra():
        from export.build import add_engine, check_request
        from export.precision import parse_precisions
        from export.profiles import parse_profiles
        from runtime.bundle import open_bundle

        profiles = parse_profiles(profile, open_bundle(bundle).manifest.contract.max_tokens)
        screen = console.out()
        precisions = parse_precisions(precision)
        targets = [part.strip().lower() for part in target.split(",")] if target else [None]
        with console.bars() as bars:
            check_request(bundle, backend, precisions, profiles, targets, Wait(wait, bars.say))
        for wanted in precisions:
            for gpu in targets:
                with console.bars() as bars:
                    turn = Wait(wait, bars.say)
                    done = add_engine(bundle, backend, wanted, profiles, target=gpu, progress=bars.update, wait=turn)
                verb = "built" if done.built else "kept"
                screen.print(f"{verb} {bundle / done.record.file}: {done.reason}", markup=False)


@app.command("synth")
def synth_command(
    size: Annotated[str, typer.Argument(help="80M, 160M, 330M, 0.6B, 1.7B, 4B, 8B or 14B.")],
    out: Annotated[Path, typer.Option("--out", help="The checkpoint's folder.")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="A checkpoint folder to take the tokenizer from; default: the bundled one.")
    ] = None,
) -> None:
    """Write a checkpoint of a family member's true shape with random weights, for benchmarks and scale tests."""
    with console.readable_errors(), export_extra():
        from export.synth import write_checkpoint

        with console.bars() as bars:
            write_checkpoint(size, out, tokenizer_from=tokenizer, progress=bars.update)
        console.out().print(f"wrote {out}")


app.command("parity")(parity_command)
app.command("diff")(diff_command)


def main() -> None:
    """Run the command."""
    app()
