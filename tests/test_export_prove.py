"""Recording a verdict never breaks a bundle: the process is killed at each change of the file system."""

from __future__ import annotations

from runtime.bundle import Bundle
from tests import killing

# The golden vectors alternate between two values, so that each recording replaces them.
DRIVER = """
import dataclasses, sys
from pathlib import Path
import msgspec, numpy as np
from export.prove import record
from export.report.data import ParityReport
from runtime import golden
from runtime.bundle import bundle_files, check_hash, open_bundle
from tests.killing import at_every_change

folder = Path(sys.argv[1])
report = msgspec.json.decode((folder / "parity/report.json").read_bytes(), type=ParityReport)
first = golden.load(open_bundle(folder))
second = dataclasses.replace(first, embeddings=np.nextafter(first.embeddings, np.float32(2)))

def check():
    bundle = open_bundle(folder)
    for file in bundle_files(bundle.manifest):
        check_hash(bundle, file)
    golden.load(bundle)
    return {"proven": all(e.parity.verdict == "pass" for e in bundle.manifest.engines)}

at_every_change(
    lambda _: None, lambda point: record(open_bundle(folder), report, second if point % 2 else first), check
)
"""


def test_killed_while_a_verdict_is_recorded(bundle_copy: Bundle) -> None:
    points = killing.run(DRIVER, bundle_copy.folder)
    assert len(points) >= 8
    # Old golden vectors or new ones: the bundle is proven at every point, and the runtime serves it.
    assert all(p["proven"] for p in points)
