"""Recording a verdict never breaks a bundle: the process is killed at each change of the file system."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from runtime.bundle import Bundle

ROOT = Path(__file__).parent.parent

# As in test_export_pipeline: a child per point, killed at its N-th change. The golden vectors alternate between two
# values, so that each recording replaces them.
DRIVER = """
import dataclasses, json, os, signal, sys
from pathlib import Path
import msgspec, numpy as np
from export.prove import record
from export.report import ParityReport
from runtime import golden
from runtime.bundle import bundle_files, check_hash, open_bundle

folder = Path(sys.argv[1])
report = msgspec.json.decode((folder / "parity/report.json").read_bytes(), type=ParityReport)
first = golden.load(open_bundle(folder))
second = dataclasses.replace(first, embeddings=np.nextafter(first.embeddings, np.float32(2)))

def changes(event, args):
    if event == "open":
        return isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    return event in ("os.rename", "os.remove", "os.mkdir", "os.chmod", "tempfile.mkstemp")

def child(point, vectors):
    seen = 0
    def hook(event, args):
        nonlocal seen
        if changes(event, args):
            seen += 1
            if seen == point:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    record(open_bundle(folder), report, vectors)
    os._exit(0)

point, status = 0, -1
while status != 0:
    point += 1
    pid = os.fork()
    if pid == 0:
        try:
            child(point, second if point % 2 else first)
        finally:
            os._exit(3)
    _, status = os.waitpid(pid, 0)
    bundle = open_bundle(folder)
    for file in bundle_files(bundle.manifest):
        check_hash(bundle, file)
    proven = bundle.manifest.golden is not None
    if proven:
        golden.load(bundle)
    print(json.dumps({"status": status, "proven": proven}), flush=True)
"""


def test_killed_while_a_verdict_is_recorded(bundle_copy: Bundle) -> None:
    command = [sys.executable, "-c", DRIVER, str(bundle_copy.folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr  # the driver opens and hashes the bundle after each kill
    points = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(points) >= 8
    assert all(os.WTERMSIG(p["status"]) == signal.SIGKILL for p in points[:-1])
    assert points[-1] == {"status": 0, "proven": True}
    # In between the bundle may be unproven, and the runtime then refuses it; it is never broken.
    assert {p["proven"] for p in points} == {True, False}
