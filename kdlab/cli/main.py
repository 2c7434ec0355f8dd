"""Entry point of the command line: help, a verb, or an experiment; and exit statuses.

0 done; 1 failed while running; 2 a user's mistake, one line on standard error; 130 interrupted;
143 terminated.
"""

from __future__ import annotations

import _thread
import argparse
import gc
import importlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from kdlab.errors import NOT_WRITABLE, CannotWrite, RunFailed, UserError, told, unknown
from kdlab.plain_text import one_line
from kdlab.system.terminal import clean_terminal, say
from kdlab.system.termination import TERMINATED, Terminated, exit_as_failure

if TYPE_CHECKING:
    from kdlab.cli.hydra.plan import Flags


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (without the program's name), and return its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    clean_terminal()
    with interrupts() as came:
        try:
            return _dispatch(argv)
        except KeyboardInterrupt:
            return _stopped("interrupted", 130)
        except Terminated:
            return _stopped("terminated", TERMINATED)
        except SystemExit as end:
            if _is_of_argparse(end):  # after --help
                raise
            if os.environ.get("KDLAB_TRACEBACK"):
                say(traceback.format_exc(), file=sys.stderr)
            return _say(exit_as_failure(end), 1)
        except Exception as error:
            # a library that is interrupted may raise something of its own instead
            return _stopped("interrupted", 130) if came() or _follows_interrupt(error) else _status(error)


def _status(error: Exception) -> int:
    """Say in one line what went wrong, and return the exit status."""
    shown = os.environ.get("KDLAB_TRACEBACK")
    if isinstance(error, UserError):
        if error.__cause__ is not None and shown:
            say("".join(traceback.format_exception(error)), file=sys.stderr)
        return _say(error, 2)
    if isinstance(error, RunFailed):
        return _say(error, 1)
    if isinstance(error, BrokenPipeError):  # as in ``kdlab list | head``
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if isinstance(error, OSError) and error.errno in NOT_WRITABLE:
        return _say(CannotWrite(error.filename, error), 1)
    # a defect, or a machine that lacks something: not the user's mistake
    if shown:
        say("".join(traceback.format_exception(error)), file=sys.stderr)
    return _say(f"{told(error)} (KDLAB_TRACEBACK=1 prints the traceback)", 1)


def _stopped(how: str, status: int) -> int:
    say(f"kdlab: {how}; the same command with resume=auto goes on (a sweep: without)", file=sys.stderr)
    return status


def _is_of_argparse(end: SystemExit) -> bool:
    *_, (frame, _) = traceback.walk_tb(end.__traceback__)
    return frame.f_globals.get("__name__") == argparse.__name__


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether Ctrl-C was pressed meanwhile, even if the ``KeyboardInterrupt`` was swallowed.

    Python itself drops one that comes inside of a callback, as those of the import locks are; it is raised again.
    """
    seen: list[int] = []

    def note(number: int, frame: Any) -> None:
        seen.append(number)
        signal.default_int_handler(number, frame)

    def raise_again(dropped: Any) -> None:
        if isinstance(dropped.exc_value, KeyboardInterrupt):
            threading.Timer(0.05, _thread.interrupt_main).start()  # not here, where it would be dropped too
        else:
            hook(dropped)

    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield lambda: False
        return
    hook, sys.unraisablehook = sys.unraisablehook, raise_again
    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(seen)
    finally:
        sys.unraisablehook = hook
        if signal.getsignal(signal.SIGINT) is note:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _follows_interrupt(error: BaseException | None) -> bool:
    """Return whether an error was raised while a ``KeyboardInterrupt`` was handled, as argparse's clearing up does."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, KeyboardInterrupt):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def _say(message: object, status: int) -> int:
    say(f"kdlab: error: {one_line(message)}", file=sys.stderr)
    return status


def _dispatch(argv: list[str]) -> int:
    from kdlab.cli import verbs

    if not argv or argv[0] in ("-h", "--help", "help"):
        from kdlab.cli.help import helptext

        say(helptext())
        return 0
    if argv[0] == "--version":
        return _version()
    first = argv[0]
    if first[0] in "-+~" or "=" in first:
        return _experiment(argv)
    if first not in verbs.names():
        raise unknown("kdlab", first, verbs.names(), "verb")
    return int(importlib.import_module(f"kdlab.cli.verbs.{first}").main(argv[1:]) or 0)


def _version() -> int:
    from kdlab import __version__

    say(f"kdlab {__version__}")
    return 0


def _experiment(argv: list[str]) -> int:
    if {"-h", "--help"} & set(argv):
        return _dispatch([])
    if "--version" in argv:
        return _version()
    if "--hydra-help" in argv:
        from kdlab.cli.hydra.hydra_node import summary

        say(summary())
        return 0
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


INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
"""Values of ``--info``: what Hydra can tell about a config."""

ELSEWHERE = {
    ("-cp", "--config-path"): "--config-dir DIR, whose options are found before those of ./conf and the shipped ones",
    ("-cn", "--config-name"): "a file ./conf/experiment/NAME.yaml, and experiment=NAME",
    ("--experimental-rerun",): "the same command with resume=RUN (overrides.yaml in RUN has its words)",
}
"""Flags of Hydra's that mean nothing here, and what to do instead."""


class Parser(argparse.ArgumentParser):
    """``ArgumentParser`` whose complaints are one line, like all others."""

    def error(self, message: str) -> NoReturn:
        """Raise the mistake, with the usage."""
        usage = " ".join(self.format_usage().split())
        raise UserError(f"{message}; {usage}")


def parse_flags(argv: Sequence[str]) -> Flags:
    """Split a command line into Hydra's flags and overrides.

    Raises:
        UserError: an unknown flag, or a word that is no override.
    """
    from kdlab.cli.hydra.plan import Flags

    parser = Parser(prog="kdlab", add_help=False, allow_abbrev=False)
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("-r", "--run", action="store_true")
    parser.add_argument("-c", "--cfg", choices=("job", "hydra", "all"))
    parser.add_argument("--resolve", action="store_true")
    parser.add_argument("-p", "--package")
    parser.add_argument("-i", "--info", nargs="?", const="all")
    parser.add_argument("-cd", "--config-dir", type=Path)
    for names in ELSEWHERE:
        parser.add_argument(*names)
    parser.add_argument("overrides", nargs="*")
    options = vars(parser.parse_intermixed_args(argv))
    for names, way in ELSEWHERE.items():
        if options.pop(names[-1].lstrip("-").replace("-", "_")) is not None:
            raise UserError(names[-1], "not a flag of kdlab's", way)
    if options["config_dir"] is not None and not options["config_dir"].is_dir():
        raise UserError("--config-dir", f"no folder {str(options['config_dir'])!r}", "a folder like conf/")
    for word in options["overrides"]:
        if "=" not in word and word[:1] not in ("~", "+"):
            raise UserError(f"{word!r}", "not an override", "key=value, group=option (a verb comes first)")
    flags = Flags(**{**options, "overrides": tuple(options["overrides"])})
    _check_together(flags)
    return flags


def _check_together(flags: Flags) -> None:
    """Refuse flags that exclude each other, and those that would do nothing."""
    if flags.info is not None and flags.info not in INFO:
        raise UserError("--info", f"{flags.info!r}", f"{', '.join(INFO)}, or nothing behind it")
    asked = {"--run": flags.run, "--cfg": flags.cfg is not None, "--info": flags.info is not None}
    given = [name for name, there in asked.items() if there]
    if len(given) > 1:
        raise UserError(" and ".join(given), accepted="one of them")
    if flags.run and flags.multirun:
        raise UserError("--run and --multirun", accepted="one of them")
    for name, there in (("--resolve", flags.resolve), ("--package", flags.package is not None)):
        if there and flags.cfg is None:
            raise UserError(name, "says how --cfg prints, and there is none", "with --cfg job")
