"""All benchmarks, or those that are named, one after the other, each in a process of its own.

python -m benchmarks [NAME ...]
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
SCRIPTS = ("startup", "steps", "loop", "throughput", "precision", "resources", "vocabulary", "language", "methods")

parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.partition("\n")[0])
parser.add_argument("names", nargs="*", metavar="NAME", help=f"which; all without any: {', '.join(SCRIPTS)}")
names = parser.parse_args().names or SCRIPTS
if strange := set(names) - set(SCRIPTS):
    parser.error(f"no benchmark {min(strange)!r}; accepted: {', '.join(SCRIPTS)}")

path = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
statuses = [
    subprocess.run(
        [sys.executable, HERE / f"{name}.py"], env={**os.environ, "PYTHONPATH": path}, check=False
    ).returncode
    for name in names
]
sys.exit(max(statuses))
