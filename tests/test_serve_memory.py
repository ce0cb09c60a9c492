"""Memory that engines leave behind goes back to the system, and replaced engines are held by nobody."""

from __future__ import annotations

import asyncio
import gc
import os
import platform
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import pytest

from runtime.bundle import Bundle
from runtime.cores import usable_cores
from runtime.server import run
from runtime.serving import memory
from runtime.serving.model import load
from runtime.settings import EngineSettings, ModelSettings, ServeSettings

ROOT = Path(__file__).parent.parent

# What loading and closing an engine on another thread does to its arena: one large block, then many smaller ones.
SCRIPT = """
import ctypes, re, sys, threading
from pathlib import Path
from runtime.serving.memory import give_back, keep_little

def private_mib():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

if sys.argv[1] == "held":
    keep_little()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def block(size):
    found = libc.malloc(size)
    ctypes.memset(found, 1, size)
    return found

blocks = (ctypes.c_void_p * 100)()  # made here: a list that grows would leave a block of its own between the others

def work():
    libc.free(block(30_000_000))
    for i in range(100):
        blocks[i] = block(300_000)
    for i in range(100):
        libc.free(blocks[i])

def round():
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    give_back()

before = private_mib()
round()
print(private_mib() - before)
"""

# Threads that live at the same time and each ask for memory: glibc gives each an arena, as long as there may be more.
ARENAS = """
import ctypes, sys, threading
from runtime.cores import usable_cores
from runtime.serving.memory import keep_little

if sys.argv[1] == "held":
    keep_little()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.fdopen.restype = ctypes.c_void_p
number = usable_cores() + 4
together = threading.Barrier(number)

def work():
    together.wait()
    libc.malloc(1000)
    together.wait()

threads = [threading.Thread(target=work) for _ in range(number)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
out = libc.fdopen(1, b"w")
libc.malloc_info(0, ctypes.c_void_p(out))
libc.fflush(ctypes.c_void_p(out))
"""

# How many blocks are mapped by themselves: before an engine is loaded, during it, with two at a time, with one left,
# and after it.
LOADING = """
import ctypes
from runtime.serving.memory import keep_little, loading

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks".split()]
    _fields_ += [("rest", ctypes.c_size_t * 6)]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]

def mapped():
    before = libc.mallinfo2().hblks
    libc.malloc(300_000)
    return libc.mallinfo2().hblks - before

keep_little()
found = [mapped()]
with loading():
    found.append(mapped())
    with loading():
        found.append(mapped())
    found.append(mapped())
found.append(mapped())
print(*found)
"""

needs_glibc = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="glibc's thresholds; this system has another malloc"
)


def printed(script: str, how: str) -> str:
    """Run a script with glibc's own settings, whatever shapes this process's memory."""
    shaping = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(shaping)}
    command = [sys.executable, "-c", script, how]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout


@needs_glibc
def test_a_threads_memory_goes_back() -> None:
    """Without the thresholds 28 MiB stay, which shows that this test can fail."""
    assert float(printed(SCRIPT, "as it is")) > 15
    assert float(printed(SCRIPT, "held")) < 5


@needs_glibc
def test_threads_share_arenas() -> None:
    """One for a core, two at least: what lives on among freed memory then lies in few places."""
    assert printed(ARENAS, "as it is").count("<heap ") > usable_cores() + 2
    assert printed(ARENAS, "held").count("<heap ") <= max(usable_cores(), 2)


@needs_glibc
def test_an_engines_blocks_lie_by_themselves_and_an_answers_do_not() -> None:
    assert printed(LOADING, "").split() == ["0", "1", "1", "1", "0"]


def test_a_running_server_leaves_its_engines_to_their_models(bundle: Bundle) -> None:
    """What a reload replaces is then held by nobody: neither its tokenizer nor its golden vectors."""
    spec, settings = ModelSettings("mini", str(bundle.folder)), ServeSettings(grpc_address="127.0.0.1:0")
    proven = [(spec, load(spec, EngineSettings(), settings))]
    first = weakref.ref(proven[0][1])
    left: list[object] = []

    def started(grpc: str, http: str) -> None:
        gc.collect()
        left.extend([first(), *proven])
        os.kill(os.getpid(), signal.SIGTERM)

    asyncio.run(run(proven, EngineSettings(), settings, started=started))
    assert left == [None]


def test_memory_is_given_back_when_much_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    resident = {"mib": 100}
    free = {"mib": 0}

    def trim() -> None:
        resident["mib"] -= free["mib"]
        free["mib"] = 0

    monkeypatch.setattr(memory, "resident_bytes", lambda: resident["mib"] << 20)
    monkeypatch.setattr(memory, "_trim", trim)
    look = memory.Resident().look
    resident["mib"] = 120
    assert not look(), "little has come"
    resident["mib"] = 300
    assert look()
    assert resident["mib"] == 300, "all of it is in use"
    free["mib"] = 190
    assert look()
    assert resident["mib"] == 110
    assert not look()
