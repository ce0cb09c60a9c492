"""Shell scripts in a mount namespace of their own: small disks, full disks, disks nobody may write."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def in_small_file_system(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a shell script in a mount namespace of its own; it may mount at `$D`, `$F2RT` and `$PYTHON` run ours."""
    unshare = shutil.which("unshare")
    probe = [unshare or "unshare", "-rm", "mount", "-t", "tmpfs", "none", str(folder)]
    if unshare is None or subprocess.run(probe, capture_output=True, check=False).returncode != 0:
        pytest.skip("this machine lets no test mount a file system of its own (unshare -rm)")
    f2rt = f"{sys.executable} -c 'from export.cli import main; main()'"
    return subprocess.run(
        [unshare, "-rm", "sh", "-c", script],
        cwd=ROOT,
        env={**os.environ, "D": str(folder), "F2RT": f2rt, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
