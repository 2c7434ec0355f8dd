"""The command line's way in: help, a verb, or an experiment; and exit statuses.

0 done; 1 failed while running; 2 a user's mistake, one line on standard error; 130 interrupted;
143 terminated.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from kdlab.errors import NOT_WRITABLE, CannotWrite, RunFailed, UserError, unknown
from kdlab.terminal import clean_terminal, one_line, say
from kdlab.termination import TERMINATED, Terminated, exit_as_failure

if TYPE_CHECKING:
    from kdlab.cli.plan import Flags


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (without the program's name), and return its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    clean_terminal()
    try:
        return _dispatch(argv)
    except UserError as error:
        return _say(error, 2)
    except RunFailed as error:
        return _say(error, 1)
    except KeyboardInterrupt:
        return _stopped("interrupted", 130)
    except Terminated:
        return _stopped("terminated", TERMINATED)
    except SystemExit as end:
        if _is_of_argparse(end):  # after --help
            raise
        if os.environ.get("KDLAB_TRACEBACK"):
            traceback.print_exc()
        return _say(exit_as_failure(end), 1)
    except BrokenPipeError:  # as in ``kdlab list | head``
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _say(CannotWrite(error.filename, error), 1) if error.errno in NOT_WRITABLE else _unexpected(error)
    except Exception as error:
        return _unexpected(error)


def _unexpected(error: Exception) -> int:
    """Report a defect, or a machine that lacks something: not the user's mistake."""
    if os.environ.get("KDLAB_TRACEBACK"):
        say(traceback.format_exc(), file=sys.stderr)
    return _say(f"{type(error).__name__}: {error} (KDLAB_TRACEBACK=1 prints the traceback)", 1)


def entry() -> NoReturn:
    """The console script."""
    from kdlab.cli.forking import allow_forks

    allow_forks()
    sys.exit(main())


def _stopped(how: str, status: int) -> int:
    say(f"kdlab: {how}; the same command with resume=auto goes on (a sweep: without)", file=sys.stderr)
    return status


def _is_of_argparse(end: SystemExit) -> bool:
    *_, (frame, _) = traceback.walk_tb(end.__traceback__)
    return frame.f_globals.get("__name__") == argparse.__name__


def _say(message: object, status: int) -> int:
    say(f"kdlab: error: {one_line(message)}", file=sys.stderr)
    return status


def _dispatch(argv: list[str]) -> int:
    from kdlab.cli import verbs

    if not argv or argv[0] in ("-h", "--help", "help"):
        from kdlab.cli.helptext import helptext

        say(helptext())
        return 0
    if argv[0] == "--version":
        from kdlab import __version__

        say(f"kdlab {__version__}")
        return 0
    first = argv[0]
    if first[0] in "-+~" or "=" in first:
        return _experiment(argv)
    if first not in verbs.names():
        raise unknown("kdlab", first, verbs.names(), "verb")
    return int(importlib.import_module(f"kdlab.cli.verbs.{first}").main(argv[1:]) or 0)


def _experiment(argv: list[str]) -> int:
    if {"-h", "--help"} & set(argv):
        return _dispatch([])
    if {"-sc", "--shell-completion"} & set(argv):
        from kdlab.cli.completion import complete

        return complete([word for word in argv if word not in ("-sc", "--shell-completion")])
    gc.disable()  # a sixth of the time to compose; nothing made until then is garbage
    try:
        flags = parse_flags(argv)
        from kdlab.cli.start import start

        return start(flags)
    finally:
        gc.enable()


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` whose complaints are one line, like all others."""

    def error(self, message: str) -> NoReturn:
        usage = " ".join(self.format_usage().split())
        raise UserError(f"{message}; {usage}")


def parse_flags(argv: Sequence[str]) -> Flags:
    """Split a command line into Hydra's flags and overrides.

    Raises:
        UserError: an unknown flag, or a word that is no override.
    """
    from kdlab.cli.plan import Flags

    parser = Parser(prog="kdlab", add_help=False, allow_abbrev=False)
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("-c", "--cfg", choices=("job", "hydra", "all"))
    parser.add_argument("--resolve", action="store_true")
    parser.add_argument("-p", "--package")
    parser.add_argument("-i", "--info", nargs="?", const="all")
    parser.add_argument("-cd", "--config-dir", type=Path)
    parser.add_argument("overrides", nargs="*")
    found = parser.parse_intermixed_args(argv)
    if found.config_dir is not None and not found.config_dir.is_dir():
        raise UserError(f"--config-dir: no folder {str(found.config_dir)!r}; accepted: a folder like conf/")
    for word in found.overrides:
        if "=" not in word and word[0] not in "~+":
            raise UserError(f"{word!r}: not an override; accepted: key=value, group=option (a verb comes first)")
    return Flags(**{**vars(found), "overrides": tuple(found.overrides)})
