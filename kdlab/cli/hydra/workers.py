"""Jobs in processes of their own: where one crashes, that job has failed and the others go on.

A pool forks its workers from a process that has not imported torch, which takes no time; each imports torch once and
runs jobs one after another. The main process runs none: it hands them out, notices which job a worker was at when it
died, and starts another worker. Workers end with the main process, however that ends: each waits for the end of a
pipe which that process holds open.

Jobs run in the main process instead where it is not the command line's own (``kdlab.cli.main.main`` called by a test
or a program), where processes cannot be forked (Windows), and where ``KDLAB_IN_PROCESS=1`` asks for it, as a debugger
may want; a job that crashes then takes the others along.
"""

from __future__ import annotations

import atexit
import math
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, NoReturn

from kdlab.cli.hydra.forking import may_fork
from kdlab.errors import RunFailed, UserError
from kdlab.system.termination import Terminated, ending, terminate

Work = Callable[[Any], Any]
"""Function that runs one job: it takes and returns what can be pickled."""

ASK_SECONDS = 1.0
"""Seconds between looks at whether a worker lives: one that died is noticed by its pipe, unless a child keeps that."""

END_SECONDS = 10.0
"""Seconds that a worker without a job may take to end."""

SAME_SIGNAL_SECONDS = 1.0
"""Seconds within which a second SIGINT is the first once more: from the terminal, and from the main process."""

SAME_END_SECONDS = 0.2
"""Seconds after which a signal to all processes of a command has reached each of them."""


class Crash(RunFailed):
    """Error of a job whose process died of it.

    Args:
        status: status of the process, as ``os.waitpid`` returns it.
    """

    def __init__(self, status: int) -> None:
        super().__init__(f"its process {ending(status)}")
        self.status = status

    def __reduce__(self) -> Any:
        return Crash, (self.status,)

    @property
    def signal(self) -> int:
        """Signal that killed the process; 0 if none did."""
        return max(0, -os.waitstatus_to_exitcode(self.status))


@dataclass(frozen=True)
class Outcome:
    """Result of a job, or the error that ended it."""

    value: Any = None
    error: BaseException | None = None
    again: bool = False
    """Whether the job runs once more: it was killed beside others, maybe for memory that it has when it is alone."""


class InProcess:
    """Runner of jobs in this process, one after another.

    Args:
        work: function that runs one job.
    """

    def __init__(self, work: Work | None = None) -> None:
        self.count, self.work = 1, work

    def call(self, job: Any) -> Any:
        """Run one job; raises what it raises."""
        assert self.work is not None
        return self.work(job)

    def run(self, jobs: Sequence[Any]) -> Iterator[tuple[int, Outcome]]:
        """Run jobs; yields the number of each, and what it came to."""
        for number, job in enumerate(jobs):
            try:
                outcome = Outcome(self.call(job))
            except Exception as error:
                outcome = Outcome(error=error)
            yield number, outcome


class _Worker:
    """The main process's side of a worker."""

    def __init__(self, pid: int, connection: Connection) -> None:
        self.pid, self.connection = pid, connection
        self._status: int | None = None

    def status(self) -> int | None:
        """Return the exit status of the process, as ``os.waitpid`` gives it; None while it lives."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = status if pid else None
        return self._status

    def wait(self, seconds: float) -> int:
        """Wait for the process, kill it after so many seconds, and return its exit status."""
        deadline, pause = time.monotonic() + seconds, 0.001
        while (status := self.status()) is None:
            if time.monotonic() > deadline:
                self.send_signal(signal.SIGKILL)
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
        return status

    def send_signal(self, number: int) -> None:
        """Send the process a signal, if it still lives."""
        if self.status() is None:
            os.kill(self.pid, number)


class Pool(InProcess):
    """Runner of jobs in worker processes, which are forked when they are first needed; a context.

    An exception that leaves the context ends the workers, KeyboardInterrupt by SIGINT and others by SIGTERM; they are
    waited for, since they may be saving.

    Args:
        count: number of workers at a time.
        work: function that runs one job; may be set later, but before the first job.
    """

    def __init__(self, count: int, work: Work | None = None) -> None:
        super().__init__(work)
        self.count = count
        self._workers: list[_Worker] = []

    def __enter__(self) -> Pool:
        self._lifeline = os.pipe()
        self._handler = signal.signal(signal.SIGTERM, terminate)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        number = None if kind is None else signal.SIGINT if issubclass(kind, KeyboardInterrupt) else signal.SIGTERM
        with self._passing_on_signals():
            self._end(number)
        signal.signal(signal.SIGTERM, self._handler)
        for end in self._lifeline:
            os.close(end)

    # ---- handing out ----------------------------------------------------------------------------------------------

    def call(self, job: Any) -> Any:
        """Run one job in a worker; raises what it raises, and :class:`Crash` if its process dies of it."""
        ((_, outcome),) = self.run([job])
        if outcome.error is not None:
            raise outcome.error
        return outcome.value

    def run(self, jobs: Sequence[Any]) -> Iterator[tuple[int, Outcome]]:
        """Run jobs, ``count`` at a time; yields the number of each as it ends, and what it came to.

        One that is killed while others run is handed out once more at the end, alone: where memory was short, the
        process that is killed need not be the one that took it.
        """
        waiting, killed = deque(range(len(jobs))), list[int]()
        running: dict[_Worker, int] = {}
        while waiting or running:
            while waiting and len(running) < self.count:
                worker = self._idle(running)
                running[worker] = waiting.popleft()
                with suppress(OSError):  # died meanwhile, as will be found out
                    worker.connection.send(jobs[running[worker]])
            for worker, outcome in self._ended(running):
                number = running.pop(worker)
                if isinstance(outcome.error, Crash) and outcome.error.signal == signal.SIGKILL and running:
                    killed.append(number)
                    outcome = Outcome(error=outcome.error, again=True)
                yield number, outcome
        for number in killed:
            self._end()  # what idle workers hold is memory too
            for _, outcome in self.run([jobs[number]]):
                yield number, outcome

    def _idle(self, running: dict[_Worker, int]) -> _Worker:
        """Return a worker without a job, a new one if there is none that lives."""
        for worker in [one for one in self._workers if one not in running]:
            if worker.status() is None:
                return worker
            self._forget(worker)
        return self._fork()

    def _ended(self, running: dict[_Worker, int]) -> list[tuple[_Worker, Outcome]]:
        """Wait for workers whose job has ended, or that have died of it."""
        ended: list[tuple[_Worker, Outcome]] = []
        while not ended:
            wait([worker.connection for worker in running], ASK_SECONDS)
            for worker in running:
                # first whether it lives: what it sent before it died is then there to be read
                died = worker.status() is not None
                if worker.connection.poll():
                    ended.append((worker, self._received(worker)))
                elif died:
                    ended.append((worker, self._crashed(worker)))
        return ended

    def _received(self, worker: _Worker) -> Outcome:
        try:
            outcome = worker.connection.recv()
        except (EOFError, OSError):
            return self._crashed(worker)
        if isinstance(outcome.error, KeyboardInterrupt):
            raise KeyboardInterrupt
        return _after_all(outcome)

    def _crashed(self, worker: _Worker) -> Outcome:
        status = worker.wait(END_SECONDS)
        self._forget(worker)
        return _after_all(Outcome(error=Crash(status)))

    # ---- beginning and ending of workers --------------------------------------------------------------------------

    def _fork(self) -> _Worker:
        own_end, worker_end = Pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        held = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        pid = os.fork()
        if pid == 0:
            foreign = [own_end, *(one.connection for one in self._workers)]
            _serve(self.work, worker_end, foreign, self._lifeline, held)
        worker = _Worker(pid, own_end)
        self._workers.append(worker)
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
        worker_end.close()
        return worker

    def _end(self, number: int | None = None) -> None:
        """End all workers, by a signal or because there is no more to do, and wait until they are gone."""
        for worker in self._workers:
            if number is not None:
                worker.send_signal(number)
            worker.connection.close()
        while self._workers:
            self._workers[-1].wait(END_SECONDS if number is None else math.inf)
            self._forget(self._workers[-1])

    def _forget(self, worker: _Worker) -> None:
        worker.connection.close()
        self._workers.remove(worker)

    @contextmanager
    def _passing_on_signals(self) -> Iterator[None]:
        """Hand workers the signals that come while they are waited for, and go on waiting."""

        def pass_on(number: int, frame: Any) -> None:
            for worker in self._workers:
                worker.send_signal(number)

        numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) != signal.SIG_IGN]
        before = [(number, signal.signal(number, pass_on)) for number in numbers]
        try:
            yield
        finally:
            for number, handler in before:
                signal.signal(number, handler)


def _after_all(outcome: Outcome) -> Outcome:
    """Return the outcome, after a moment where a signal ended the worker: it may come to this process too."""
    if isinstance(outcome.error, Crash) and outcome.error.signal in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        time.sleep(SAME_END_SECONDS)
    return outcome


@contextmanager
def pool(count: int, work: Work | None = None) -> Iterator[InProcess]:
    """Yield a pool of ``count`` workers; or this process, where none may be forked."""
    if not may_fork():
        yield InProcess(work)
        return
    with Pool(count, work) as made:
        yield made


# ---- in a worker ----------------------------------------------------------------------------------------------------


def _serve(
    work: Work | None, jobs: Connection, foreign: Sequence[Connection], lifeline: tuple[int, int], mask: set[Any]
) -> NoReturn:
    """Run jobs until there are no more, and end the process: nothing of the main process's stack runs here again."""
    status = 1
    try:
        atexit._clear()  # the main process's
        for connection in foreign:
            connection.close()
        os.close(lifeline[1])
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            signal.signal(signal.SIGINT, _Interrupt())
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        threading.Thread(target=_end_with, args=(lifeline[0],), name="kdlab-lifeline", daemon=True).start()
        assert work is not None
        while True:
            try:
                job = jobs.recv()
            except EOFError:
                break
            jobs.send(_outcome(work, job))
        status = 0
    except (KeyboardInterrupt, Terminated, BrokenPipeError, ConnectionResetError):
        pass  # the main process says so
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)


def _outcome(work: Work, job: Any) -> Outcome:
    try:
        outcome = Outcome(work(job))
        pickle.dumps(outcome)
        return outcome
    except Terminated:
        return Outcome(error=Crash(signal.SIGTERM))
    except BaseException as error:
        if os.environ.get("KDLAB_TRACEBACK") and not isinstance(error, UserError | RunFailed | KeyboardInterrupt):
            traceback.print_exc()
        return Outcome(error=_portable(error))


def _portable(error: BaseException) -> BaseException:
    """Return the error, or a :class:`RunFailed` with its text where it cannot be sent."""
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:
        copy = None
    return error if type(copy) is type(error) else RunFailed(f"{type(error).__name__}: {error}")


class _Interrupt:
    """Handler of SIGINT that takes two in a moment for one."""

    def __init__(self) -> None:
        self.last = float("-inf")

    def __call__(self, number: int, frame: Any) -> None:
        before, self.last = self.last, time.monotonic()
        if self.last - before > SAME_SIGNAL_SECONDS:
            raise KeyboardInterrupt


def _end_with(lifeline: int) -> None:
    """End this process once the main process is gone."""
    os.read(lifeline, 1)
    os._exit(1)
