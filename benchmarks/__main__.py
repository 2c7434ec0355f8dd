"""All benchmarks, one after the other, each in a process of its own: ``python -m benchmarks``."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
SCRIPTS = ("startup", "steps", "loop", "throughput", "precision", "resources", "vocabulary", "language", "methods")

path = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
statuses = [
    subprocess.run(
        [sys.executable, HERE / f"{name}.py"], env={**os.environ, "PYTHONPATH": path}, check=False
    ).returncode
    for name in SCRIPTS
]
sys.exit(max(statuses))
