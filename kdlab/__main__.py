"""``python -m kdlab``, and the console script."""

from __future__ import annotations

import sys
from typing import NoReturn


def entry() -> NoReturn:
    """Run the command line and exit with its status, which is 130 also where Ctrl-C comes during the imports."""
    try:
        from kdlab.cli.hydra.forking import allow_forks
        from kdlab.cli.main import main

        allow_forks()
        status = main()
    except KeyboardInterrupt:
        sys.stderr.write("kdlab: interrupted\n")
        status = 130
    sys.exit(status)


if __name__ == "__main__":
    entry()
