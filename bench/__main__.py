"""The command: python -m bench NAME [options]. Without a name: export, latency, grpc and graphs with their defaults."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from bench.report import RESULTS, Result, machine, publish
from runtime import console

app = typer.Typer(name="python -m bench", pretty_exceptions_enable=False, help="Side-by-side measurements.")

WorkOption = Annotated[Path | None, typer.Option(help="Where large files go; a temporary folder by default.")]
ResultsOption = Annotated[Path, typer.Option(help="Where NAME.json and NAME.md go.")]


@contextlib.contextmanager
def _work_folder(work: Path | None) -> Iterator[Path]:
    """Yield a folder that is removed afterwards, inside `work` or where temporary files go."""
    if work is not None:
        work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="f2rt-bench-", dir=work) as folder:
        yield Path(folder)


def _publish(result: Result, packages: list[str], results: Path) -> None:
    publish(result, machine(packages), results)


@app.callback(invoke_without_command=True)
def everything(context: typer.Context) -> None:
    """Run the measurement named, or export, latency and grpc."""
    if context.invoked_subcommand is None:
        export_command()
        latency_command()
        grpc_command()
        graphs_command()


@app.command("export")
def export_command(
    sizes: Annotated[str, typer.Option(help="Comma-separated; 4B takes 40 GB of disk meanwhile.")] = "80M,0.6B,4B",
    repetitions: Annotated[int, typer.Option(min=1)] = 3,
    work: WorkOption = None,
    results: ResultsOption = RESULTS,
) -> None:
    """Time and peak memory of an export, beside a plain file write."""
    with console.readable_errors(), _work_folder(work) as folder:
        from bench.export_sizes import measure

        names = [name.strip() for name in sizes.split(",") if name.strip()]
        _publish(measure(names, folder, repetitions), ["numpy", "onnx-ir", "safetensors"], results)


@app.command("latency")
def latency_command(
    size: Annotated[str, typer.Option(help="A size of the family.")] = "0.6B",
    seconds: Annotated[float, typer.Option(help="For all shapes together; at least five repetitions each.")] = 240.0,
    work: WorkOption = None,
    results: ResultsOption = RESULTS,
) -> None:
    """Latency of the fp32 engine beside stock transformers."""
    with console.readable_errors(), _work_folder(work) as folder:
        from bench.latency import measure

        _publish(measure(size, folder, seconds), ["numpy", "onnxruntime", "torch", "transformers"], results)


@app.command("grpc")
def grpc_command(
    bundle: Annotated[Path | None, typer.Option(help="A proven bundle; made of checkpoints/mini by default.")] = None,
    seconds: Annotated[float, typer.Option(help="For all cases together.")] = 60.0,
    work: WorkOption = None,
    results: ResultsOption = RESULTS,
) -> None:
    """What gRPC adds to a request."""
    with console.readable_errors(), _work_folder(work) as folder:
        from bench.grpc_overhead import measure

        _publish(measure(bundle, folder, seconds), ["numpy", "onnxruntime", "grpcio", "protobuf"], results)


@app.command("serving")
def serving_command(
    size: Annotated[str, typer.Option(help="mini, or a size of the family.")] = "mini",
    engine: Annotated[str, typer.Option(help="The engine that f2rt serves.")] = "onnxruntime:fp32",
    bundle: Annotated[Path | None, typer.Option(help="A proven bundle; made by default.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="The checkpoint it was made of; made by default.")] = None,
    seconds: Annotated[float, typer.Option(help="For each phase of each server.")] = 15.0,
    per_request: Annotated[int, typer.Option(help="Texts in a request.")] = 16,
    callers: Annotated[int | None, typer.Option(help="Callers at saturation; by default 64 texts' worth.")] = None,
    limit: Annotated[float | None, typer.Option(help="Seconds after which a server is given up.")] = None,
    open_seconds: Annotated[
        float | None, typer.Option(help="For each phase of the open loop; by default --seconds.")
    ] = None,
    leave_out: Annotated[str, typer.Option(help="Peers not to measure, such as vllm,fastapi.")] = "",
    work: WorkOption = None,
    results: ResultsOption = RESULTS,
) -> None:
    """Throughput, overload and padding of the server, beside the raw engine and peer servers (make serve-peers)."""
    with console.readable_errors(), _work_folder(work) as folder:
        from bench.serving import Load, measure

        load = Load(seconds, per_request, callers, limit, open_seconds)
        left_out = [name.strip() for name in leave_out.split(",") if name.strip()]
        result = measure(size, bundle, checkpoint, engine, folder, load, left_out)
        _publish(result, ["grpcio", "numpy", "onnxruntime", "uvicorn"], results)


@app.command("queue")
def queue_command(
    seed: Annotated[int, typer.Option(help="Of the chances: when requests come, and how long texts are.")] = 0,
    results: ResultsOption = RESULTS,
) -> None:
    """The server's queue in simulated time: waits, refusals and padding, beside first come, first served."""
    with console.readable_errors():
        from bench.queue_table import measure

        _publish(measure(seed), ["numpy"], results)


@app.command("soak")
def soak_command(
    bundle: Annotated[Path, typer.Option(help="A proven bundle.")] = Path("build/mini"),
    engine: Annotated[str, typer.Option(help="The engine that is served.")] = "onnxruntime:fp32",
    seconds: Annotated[float, typer.Option(help="How long.")] = 3600.0,
    work: WorkOption = None,
    results: ResultsOption = RESULTS,
) -> None:
    """Mixed traffic for an hour: memory growth and errors."""
    with console.readable_errors(), _work_folder(work) as folder:
        from bench.soak import measure

        _publish(measure(bundle, engine, folder, seconds), ["grpcio", "onnxruntime", "uvicorn"], results)


@app.command("graphs")
def graphs_command(
    size: Annotated[str, typer.Option(help="mini, or a size of the family.")] = "mini",
    seconds: Annotated[float, typer.Option(help="For all shapes together; at least five repetitions each.")] = 60.0,
    from_onnx: Annotated[Path | None, typer.Option(help="A graph of the same checkpoint, measured besides.")] = None,
    work: WorkOption = None,
    results: ResultsOption = RESULTS,
) -> None:
    """Our graph beside those of other exporters: nodes, latency, what TensorRT-RTX says."""
    with console.readable_errors(), _work_folder(work) as folder:
        from bench.graphs import measure

        packages = ["onnx-ir", "onnxruntime", "onnxscript", "tensorrt-rtx", "torch", "transformers"]
        _publish(measure(size, folder, seconds, from_onnx), packages, results)


@app.command("optimum")
def optimum_command(
    model: Annotated[Path, typer.Option(help="A checkpoint's folder.")] = Path("checkpoints/mini"),
    work: WorkOption = None,
    results: ResultsOption = RESULTS,
) -> None:
    """Optimum's real exports, taken in and proven; needs the environment that `make optimum-check` creates."""
    with console.readable_errors(), _work_folder(work) as folder:
        from bench.optimum import measure

        result = measure(model, folder)
        _publish(result, ["onnx-ir", "onnxruntime", "torch", "transformers"], results)
    raise typer.Exit(0 if result.data["passed"] else 1)


@app.command("int8-quality")
def int8_quality_command(
    checkpoints: Annotated[str, typer.Option(help="Comma-separated: mini, hard, and those of tests/hostile.py.")] = "",
    texts: Annotated[int | None, typer.Option(help="Verification texts; all by default.", min=1)] = None,
    calibration_texts: Annotated[int | None, typer.Option(help="Calibration texts; all by default.", min=1)] = None,
    work: WorkOption = None,
    results: ResultsOption = RESULTS,
) -> None:
    """Vectors of INT8 against PyTorch, beside what ONNX Runtime's tools make of the same graph."""
    with console.readable_errors(), _work_folder(work) as folder:
        from bench.int8_quality import CHECKPOINTS, measure

        names = [name.strip() for name in checkpoints.split(",") if name.strip()] or list(CHECKPOINTS)
        result = measure(names, folder, texts, calibration_texts)
        _publish(result, ["numpy", "onnx", "onnxruntime", "torch", "transformers"], results)


@app.command("int8-speed")
def int8_speed_command(
    size: Annotated[str, typer.Option(help="mini, or a size of the family.")] = "0.6B",
    seconds: Annotated[float, typer.Option(help="For all shapes together; at least three repetitions each.")] = 600.0,
    calibration_texts: Annotated[int, typer.Option(help="Short texts that INT8 is made on.", min=1)] = 64,
    bundle: Annotated[Path | None, typer.Option(help="A bundle with fp32 and int8 to measure; made otherwise.")] = None,
    work: WorkOption = None,
    results: ResultsOption = RESULTS,
) -> None:
    """Latency of INT8 on CPU beside fp32, other 8-bit forms and other tools (`make bench-peers` installs them)."""
    with console.readable_errors(), _work_folder(work) as folder:
        from bench.int8_speed import measure

        result = measure(size, folder, seconds, calibration_texts, bundle)
        _publish(result, ["numpy", "onnxruntime", "torch", "transformers"], results)


@app.command("scale")
def scale_command(
    size: Annotated[
        str, typer.Option(help="mini, or a size of the family; 4B takes 45 GB of disk meanwhile.")
    ] = "0.6B",
    calibration_texts: Annotated[int | None, typer.Option(help="Calibration texts; all by default.", min=1)] = None,
    target: Annotated[str, typer.Option(help="The GPU to compile for.")] = "sm89",
    profile: Annotated[str, typer.Option(help="latency, throughput, or buckets such as 1x64,8x256.")] = "latency",
    seconds: Annotated[float | None, typer.Option(help="End what runs then, and report how far it came.")] = None,
    work: WorkOption = None,
    results: ResultsOption = RESULTS,
) -> None:
    """Time and peak memory of every step from a checkpoint to TensorRT-RTX engines."""
    with console.readable_errors(), _work_folder(work) as folder:
        from bench.scale import measure

        result = measure(size, folder, calibration_texts, target, profile, seconds)
        _publish(result, ["numpy", "onnx-ir", "onnxruntime", "tensorrt-rtx"], results)


if __name__ == "__main__":
    app()
