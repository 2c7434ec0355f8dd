"""``python -m kdlab``"""

from kdlab.cli.main import entry

entry()
