"""The Triton kernels on a CPU: tests/interpreted under Triton's interpreter, which needs a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / "interpreted"


def test_interpreted_kernels():
    """Exit status 0 means that tests were collected and that all passed; 5 that there were none."""
    command = [sys.executable, "-m", "pytest", "--tb=short", "-p", "no:cacheprovider", str(FOLDER)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, cwd=FOLDER.parent.parent)
    print(done.stdout + done.stderr)
    assert done.returncode == 0, f"the interpreted tests ended with status {done.returncode}; their output is below"
    files = {path.name for path in FOLDER.glob("test_*.py")}
    assert files and all(name in done.stdout for name in files), "a file of the folder was not collected"
