"""Our use of TensorRT's API, type-checked against both libraries as they are, without a GPU.

Neither ships type stubs. The bindings carry every signature in their docstrings, so the stubs are written from the
modules themselves: TensorRT-RTX as installed, and TensorRT 11 from its bindings alone. Those cannot be imported without
TensorRT's libraries, which are not to be had everywhere; all they need of them at import are nine functions, which a
stand-in library supplies.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [
    "runtime/engines/tensorrt.py",
    "runtime/engines/tensorrt_library.py",
    "runtime/engines/tensorrt_rtx.py",
    "export/builder.py",
    "export/builder_callbacks.py",
    "export/engine_types.py",
    "export/timing_cache.py",
]
STAND_IN = """
void *createInferBuilder_INTERNAL(void) { return 0; }
void *createInferRefitter_INTERNAL(void) { return 0; }
void *createInferRuntime_INTERNAL(void) { return 0; }
void *createNvOnnxParserRefitter_INTERNAL(void) { return 0; }
void *createNvOnnxParser_INTERNAL(void) { return 0; }
void *getBuilderPluginRegistry(void) { return 0; }
void *getPluginRegistry(void) { return 0; }
int getNvOnnxParserVersion(void) { return 0; }
int initLibNvInferPlugins(void) { return 0; }
"""
LIBRARIES = ["libnvinfer", "libnvinfer_plugin", "libnvonnxparser"]


@pytest.fixture(scope="module")
def tensorrt_stub(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The stub of TensorRT 11, from its bindings with stand-ins for its libraries."""
    if importlib.util.find_spec("tensorrt_bindings") is None:
        pytest.skip("tensorrt-cu13-bindings is not installed")
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler to build the stand-in libraries")
    folder = tmp_path_factory.mktemp("tensorrt")
    (folder / "stand_in.c").write_text(STAND_IN)
    for name in LIBRARIES:
        soname = f"{name}.so.11"
        command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{soname}", "-o", soname, "stand_in.c"]
        subprocess.run(command, cwd=folder, check=True)
    return stub_of("tensorrt_bindings.tensorrt", folder, {"LD_LIBRARY_PATH": str(folder)})


@pytest.fixture(scope="module")
def rtx_stub(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The stub of TensorRT-RTX as installed."""
    pytest.importorskip("tensorrt_rtx")
    return stub_of("tensorrt_rtx_bindings.tensorrt_rtx", tmp_path_factory.mktemp("rtx"), {})


def stub_of(module: str, folder: Path, env: dict[str, str]) -> str:
    stubgen = "from mypy.stubgen import main; main()"
    command = [sys.executable, "-c", stubgen, "--inspect-mode", "--quiet", "-m", module, "-o", str(folder)]
    done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return repair((folder / f"{module.replace('.', '/')}.pyi").read_text())


def repair(stub: str) -> str:
    """Mend what docstrings cannot say: a variable called bool, a bad order of defaults, buffers, shapes as tuples."""
    stub = re.sub(r"(?<!^)\bbool\b", "_bool", stub, flags=re.MULTILINE)
    memory = "class IHostMemory:\n"
    stub = stub.replace(memory, f"{memory}    def __buffer__(self, flags: int, /) -> memoryview: ...\n")
    stub = stub.replace("class Dims:\n", "class Dims:\n    def __iter__(self) -> typing.Iterator[int]: ...\n")
    shape = "min: Dims, opt: Dims, max: Dims"
    assert shape in stub
    stub = stub.replace(shape, shape.replace("Dims", "Dims | tuple[int, ...]"))
    stub = f"from builtins import bool as _bool\n{stub}\n__version__: str\n"
    while (line := unreadable(stub)) is not None:
        lines = stub.split("\n")
        loose = re.sub(r"\(self.*\)", "(self, *args, **kwargs)", lines[line])
        assert loose != lines[line], loose
        lines[line] = loose
        stub = "\n".join(lines)
    return stub


def unreadable(stub: str) -> int | None:
    """Return the index of the first line that is no Python, or None."""
    try:
        ast.parse(stub)
    except SyntaxError as error:
        return (error.lineno or 1) - 1
    return None


def check(folder: Path, stubs: dict[str, str], files: list[str]) -> tuple[int, str]:
    """Run mypy as `make type` does, with these stubs in place of the modules; errors inside stubs do not count."""
    for name, text in stubs.items():
        (folder / name).mkdir()
        (folder / name / "__init__.pyi").write_text(text)
    config = folder / "mypy.ini"
    silent = "".join(f"[mypy-{name}.*]\nignore_errors = True\n" for name in [*stubs, "runtime._pb"])
    config.write_text(
        f"[mypy]\nstrict = True\nwarn_unused_ignores = False\ndisallow_untyped_calls = False\n"
        f"follow_imports = silent\nignore_missing_imports = True\ndisable_error_code = import-untyped\n{silent}"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mypy",
            "--config-file",
            str(config),
            "--cache-dir",
            str(folder.parent / "cache"),
            *files,
        ],
        cwd=ROOT,
        env=os.environ | {"MYPYPATH": f"{folder}:{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_use_of_tensorrt_11_fits_its_api(tmp_path: Path, tensorrt_stub: str, rtx_stub: str) -> None:
    status, output = check(tmp_path, {"tensorrt": tensorrt_stub, "tensorrt_rtx": rtx_stub}, FILES)
    assert status == 0, output


def test_use_of_tensorrt_rtx_fits_its_api(tmp_path: Path, rtx_stub: str) -> None:
    """The shared part with TensorRT-RTX in the place of TensorRT."""
    status, output = check(tmp_path, {"tensorrt": rtx_stub, "tensorrt_rtx": rtx_stub}, FILES)
    assert status == 0, output


def test_the_check_notices_what_the_other_flavour_lacks(tmp_path: Path, tensorrt_stub: str, rtx_stub: str) -> None:
    """Without this the two tests above could pass by seeing nothing."""
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "import tensorrt\n"
        "def f(c: tensorrt.IExecutionContext) -> bool:\n"
        "    return c.is_stream_capturable(0)\n"  # only TensorRT-RTX has it
        "def g(c: tensorrt.IExecutionContext) -> bool:\n"
        "    return c.set_input_shape(1, (1, 1))\n"
    )
    status, output = check(tmp_path, {"tensorrt": tensorrt_stub, "tensorrt_rtx": rtx_stub}, [str(wrong)])
    assert status == 1
    assert '"IExecutionContext" has no attribute "is_stream_capturable"' in output
    assert 'No overload variant of "set_input_shape"' in output
