"""Where jobs run: in this process, in a process for each core or device, or on actors of a Ray cluster.

An executor has a few workers, which are made where they run and kept between jobs. Whenever one is idle the next job
is pulled, and no earlier, so what comes next may depend on what has come back. A job that raises comes back with its
traceback, and so does one whose worker died (killed, out of memory, hung): that costs this job's progress and no
other's, and another worker takes the place. Leaving an executor ends everything at once, running jobs too.
"""

import faulthandler
import logging
import math
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from multiprocessing import connection, forkserver, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any, Literal, Protocol, Self
from urllib.parse import urlsplit

from ..errors import MachineError, UserError, first_line, install_command

ExecutorKind = Literal["inprocess", "processes", "ray"]

SPAWN = multiprocessing.get_context("spawn")  # a fork of this process would share the state of CUDA and of threads
LONGEST_WAIT_S = 3600.0  # at a time; `poll` takes no infinity
EXIT_S = 10.0  # for a process that has closed its pipe to end by itself
COUNT_AGAIN_S = 10.0  # between looks at what a cluster consists of
CONNECT_S = 10.0  # to reach a cluster's machine
READY = b""  # what a new process says first; an answer is longer
TELL_S = 0.3  # between two words of a worker about how far it is


class Worker(Protocol):
    def run(self, job: Any) -> Any: ...


MakeWorker = Callable[[int], Worker]  # gets the worker's number; picklable


@dataclass(frozen=True, eq=False)
class JobResult:
    """A job that ended: the worker's output, or the error that ended it."""

    job: Any
    value: Any = None  # what the worker's `run` returned
    error: str | None = None  # traceback of what `run` raised, or a sentence if the worker died
    died: bool = False  # the worker ended in the middle of this job; its next job gets a new one
    worker: int = 0  # number of the worker, 0 to count - 1
    no_worker: Exception | None = None  # why a worker could not be made again


class Executor(Protocol):
    count: int  # workers
    # Called now and then with a running job and what its worker last said by `tell`. Actors of Ray say nothing.
    on_progress: Callable[[Any, float], None]

    def map_unordered(self, jobs: Iterator[Any | None], until: float = math.inf) -> Iterator[JobResult]:
        """Runs jobs, one at a time on each worker; yields what became of them as they end.

        Args:
            jobs: the next is pulled when a worker is idle. None means none at present: it is asked again after
                the next result, so there must be a job in flight.
            until: time on `time.monotonic` from when on nothing is pulled and nothing waited for. Workers that are
                still busy then, or when the iterator is left early, are killed.

        Raises:
            UserError, MachineError: as the worker's constructor raised it.
            RuntimeError: the constructor raised anything else; its traceback is in the message.
            Once a worker has answered, a constructor that fails costs its job, like a worker that dies: what is wrong
            then may pass, such as memory of a GPU that a dead worker has not given back yet.
        """
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *raised: Any) -> None: ...


def make_executor(
    kind: ExecutorKind,
    make_worker: MakeWorker,
    count: int = 0,
    address: str | None = None,
    context: BaseContext = SPAWN,
) -> Executor:
    """An executor that has not begun to work: use it in a `with`.

    Args:
        kind: where workers are.
        make_worker: makes a worker in the place where it runs.
        count: workers; 0 = one per core this process may use, or per device of the Ray cluster.
        address: of a Ray cluster, such as host:6379 or "auto"; None starts Ray on this machine.
        context: how processes are started; see `start_preloading`.

    Raises:
        UserError: Ray is not installed, or there is no cluster at `address`.
    """
    if kind == "inprocess":
        return InProcess(make_worker)
    if kind == "processes":
        return Processes(make_worker, count or cores(), context)
    return RayActors(make_worker, count, address)


def start_preloading(modules: Sequence[str]) -> BaseContext:
    """Has a process of its own import what workers need, from now on; the context that forks them from that one.

    They start in no time then, while each new interpreter would import for seconds, and share the memory of what is
    imported. It must be nothing that begins to use CUDA: a fork cannot. On macOS system libraries do not stand a fork,
    and on Windows there is none, so there the context is that of new interpreters.
    """
    if sys.platform != "linux":
        return SPAWN
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(modules))
    with _interrupted_later():
        forkserver.ensure_running()
    return context


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Watchdog:
    """Ends a worker's process, with the stacks of its threads on stderr, when it shows no progress for `timeout_s`.

    Its executor then sees that the worker died. Works where Python no longer gets to run, as in a GPU call that hangs.
    There is one such timer in a process. 0 = no watch. Not for a worker in the main process, which would end.
    """

    def __init__(self, timeout_s: float):
        self.timeout_s = timeout_s
        self._since = -math.inf

    def beat(self) -> None:
        """Progress; cheap enough for every step."""
        now = time.monotonic()
        if self.timeout_s and now - self._since > min(1.0, self.timeout_s / 20):
            self._since = now
            faulthandler.dump_traceback_later(self.timeout_s, exit=True, file=2)  # sys.stderr may be no real file

    def rest(self) -> None:
        """No progress is due until the next beat: between jobs a worker may be idle for ever."""
        if self.timeout_s:
            faulthandler.cancel_dump_traceback_later()
            self._since = -math.inf


def _say_nothing(*_: Any) -> None:
    pass


_listener: Callable[[float], None] = _say_nothing
_told_at = -math.inf


def tell(done: float) -> None:
    """Tells this process's executor how far its job is, in a unit that is theirs. Cheap enough for every step."""
    global _told_at
    now = time.monotonic()
    if now - _told_at > TELL_S:
        _told_at = now
        _listener(done)


def _listen(listener: Callable[[float], None]) -> None:
    global _listener
    _listener = listener


# ---- in this process -----------------------------------------------------------------------------------------------


class InProcess:
    """One worker, in this process; `until` is looked at between jobs."""

    count = 1

    def __init__(self, make_worker: MakeWorker):
        self.on_progress: Callable[[Any, float], None] = _say_nothing
        self._make_worker = make_worker
        self._worker: Worker | None = None

    def map_unordered(self, jobs: Iterator[Any | None], until: float = math.inf) -> Iterator[JobResult]:
        while time.monotonic() < until:
            try:
                job = next(jobs)
            except StopIteration:
                return
            assert job is not None, "no job at present, and none in flight that could bring one"
            self._worker = self._worker or self._make_worker(0)
            _listen(partial(self.on_progress, job))
            try:
                done = JobResult(job, self._worker.run(job))
            except Exception:
                done = JobResult(job, error=traceback.format_exc())
            finally:
                _listen(_say_nothing)
            yield done

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: Any) -> None:
        self._worker = None


# ---- elsewhere -----------------------------------------------------------------------------------------------------


def _run_all(pool: "Processes | RayActors", jobs: Iterator[Any | None], until: float) -> Iterator[JobResult]:
    """`Executor.map_unordered`, for workers elsewhere: `free` is one that can take a job, `poll` looks for a result."""
    try:
        more, made = True, False
        while True:
            while more and time.monotonic() < until and (number := pool.free()) is not None:
                try:
                    job = next(jobs)
                except StopIteration:
                    more = False
                    break
                if job is None:
                    assert pool.jobs, "no job at present, and none in flight that could bring one"
                    break
                pool.give(number, job)
            if not pool.jobs:
                return
            while (done := pool.poll(min(LONGEST_WAIT_S, max(0.0, until - time.monotonic())))) is None:
                if time.monotonic() >= until:
                    return
            if done.no_worker and not made:
                raise done.no_worker
            made = made or not done.died
            yield done
    finally:
        for number in list(pool.jobs):
            pool.kill(number)


@dataclass(frozen=True, eq=False)
class _Reply:
    value: Any = None
    error: str | None = None
    no_worker: Exception | None = None  # why the worker could not be made


class _Host:
    """A worker where it runs. It is made at the first job, so that what goes wrong can be told in a reply."""

    def __init__(self, make_worker: bytes, number: int):
        self._make_worker, self._number = make_worker, number
        self._worker: Worker | None = None

    def run(self, job: bytes) -> _Reply:
        try:
            self._worker = self._worker or pickle.loads(self._make_worker)(self._number)
        except (UserError, MachineError) as error:
            return _Reply(no_worker=error)
        except Exception:
            why = f"worker {self._number} could not be made:\n{traceback.format_exc()}"
            return _Reply(no_worker=RuntimeError(why))
        assert self._worker
        try:
            return _Reply(self._worker.run(pickle.loads(job)))
        except Exception:
            return _Reply(error=traceback.format_exc())


def _done(reply: _Reply, job: Any, number: int) -> JobResult:
    if why := reply.no_worker:
        return JobResult(
            job, error=f"worker {number} could not be made: {why}", died=True, worker=number, no_worker=why
        )
    return JobResult(job, reply.value, reply.error, worker=number)


class Processes:
    """A process for each worker, started at its first job, and again at its next one if it died."""

    def __init__(self, make_worker: MakeWorker, count: int, context: BaseContext = SPAWN):
        assert count > 0, count
        self.count = count
        self.on_progress: Callable[[Any, float], None] = _say_nothing
        self._context = context
        self.jobs: dict[int, Any] = {}  # in flight: worker's number -> job, oldest first
        self._make_worker = pickle.dumps(make_worker)
        self._processes: dict[int, tuple[BaseProcess, Connection]] = {}

    def map_unordered(self, jobs: Iterator[Any | None], until: float = math.inf) -> Iterator[JobResult]:
        return _run_all(self, jobs, until)

    def free(self) -> int | None:
        return next((number for number in range(self.count) if number not in self.jobs), None)

    def give(self, number: int, job: Any) -> None:
        self.jobs[number] = job
        if number in self._processes:
            try:
                self._processes[number][1].send_bytes(pickle.dumps(job))
                return
            except OSError:  # it died while it was idle, and took no job with it
                self._bury(number)
        self._start(number)

    def poll(self, timeout_s: float) -> JobResult | None:
        pipes = {self._processes[number][1]: number for number in self.jobs}
        ready = connection.wait(list(pipes), timeout_s)
        if not ready:
            return None
        (pipe, number) = next((pipe, number) for pipe, number in pipes.items() if pipe in ready)
        try:
            packed = pipe.recv_bytes()
            if packed == READY:  # only now: a long job would wait in the pipe, and we with it
                pipe.send_bytes(pickle.dumps(self.jobs[number]))
                return None
        except (EOFError, OSError):
            return JobResult(self.jobs.pop(number), error=self._bury(number), died=True, worker=number)
        reply = pickle.loads(packed)
        if isinstance(reply, float):
            self.on_progress(self.jobs[number], reply)
            return None
        return _done(reply, self.jobs.pop(number), number)

    def kill(self, number: int) -> None:
        self.jobs.pop(number, None)
        if number in self._processes:
            self._processes[number][0].kill()
            self._bury(number)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: Any) -> None:
        for process, _ in self._processes.values():
            process.kill()
        for number in list(self._processes):
            self.kill(number)

    def _start(self, number: int) -> None:
        pipe, theirs = self._context.Pipe()
        process: BaseProcess = self._context.Process(  # type: ignore[attr-defined] # each context has one of its own
            target=_serve, args=(theirs, self._make_worker, number), name=f"worker {number}"
        )
        with _interrupted_later():
            process.start()
            self._processes[number] = process, pipe
            theirs.close()  # so that the pipe ends when the process does

    def _bury(self, number: int) -> str:
        process, pipe = self._processes[number]
        process.join(EXIT_S)
        process.kill()
        process.join()
        pipe.close()
        del self._processes[number]
        code = process.exitcode or 0
        killed = f"signal {-code}{', as where memory runs out' * (code == -signal.SIGKILL)}"
        return f"worker {number} ended ({killed if code < 0 else f'exit code {code}'})"


@contextmanager
def _interrupted_later() -> Iterator[None]:
    """A Ctrl-C that comes meanwhile has its effect afterwards, and none on a process that is started meanwhile.

    Such a process inherits that its first thread is deaf to the signal; other threads here are not, so it is caught.
    """
    if threading.current_thread() is not threading.main_thread():  # which alone has to do with signals
        yield
        return
    resource_tracker.ensure_running()  # else the first start does it, and makes us hear again
    caught: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: caught.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
        if caught:
            signal.raise_signal(signal.SIGINT)


def _serve(pipe: Connection, make_worker: bytes, number: int) -> None:
    """What a worker's process does: job after job, until it is killed or the main process ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    threading.Thread(target=_end_with_parent, daemon=True).start()
    host = _Host(make_worker, number)
    _listen(lambda done: pipe.send_bytes(pickle.dumps(float(done))))
    pipe.send_bytes(READY)
    while True:
        reply = host.run(pipe.recv_bytes())
        try:
            packed = pickle.dumps(reply)
        except Exception:
            packed = pickle.dumps(_Reply(error=traceback.format_exc()))
        pipe.send_bytes(packed)


def _end_with_parent() -> None:
    """A killed main process must not leave workers behind: they would go on with their jobs."""
    parent = multiprocessing.parent_process()
    assert parent
    connection.wait([parent.sentinel])
    os._exit(1)


class RayActors:
    """A Ray actor for each GPU of a cluster, or for each CPU core if it has no GPU.

    A dead actor is replaced by a new one at the worker's next job. Ray could restart it by itself (`max_restarts`),
    but what is asked of an actor while it restarts fails too, so one death could cost several jobs. A worker whose
    machine is gone is replaced when the cluster has room for it again.
    """

    def __init__(self, make_worker: MakeWorker, count: int = 0, address: str | None = None):
        self.on_progress: Callable[[Any, float], None] = _say_nothing
        self._ray = ray = connect_ray(count, address)
        self.jobs: dict[int, Any] = {}
        self._make_worker = ray.cloudpickle.dumps(make_worker)
        resources = ray.cluster_resources()
        self._device = "GPU" if resources.get("GPU", 0) >= 1 else "CPU"
        self._room = max(1, int(resources.get(self._device, 0)))  # actors that the cluster has devices for
        self._counted_at = time.monotonic()
        self.count = min(count or self._room, self._room)
        needs = {"num_gpus": 1, "num_cpus": 0} if self._device == "GPU" else {"num_cpus": 1}
        self._new_actor = ray.remote(**needs)(_Host).remote
        self._actors: dict[int, Any] = {}
        self._is_up: dict[int, Any] = {}  # reference to an answer that an actor gives once it runs
        self._numbers: dict[Any, int] = {}  # reference to a reply -> worker

    def map_unordered(self, jobs: Iterator[Any | None], until: float = math.inf) -> Iterator[JobResult]:
        return _run_all(self, jobs, until)

    def free(self) -> int | None:
        idle = [number for number in range(self.count) if number not in self.jobs]
        full = len(self._actors) >= self._room
        return next((number for number in idle if number in self._actors or not full), None)

    def give(self, number: int, job: Any) -> None:
        self.jobs[number] = job
        if number not in self._actors:
            self._actors[number] = self._new_actor(self._make_worker, number)
            self._is_up[number] = self._actors[number].__ray_ready__.remote()
        self._numbers[self._actors[number].run.remote(self._ray.cloudpickle.dumps(job))] = number

    def poll(self, timeout_s: float) -> JobResult | None:
        if (lost := self._without_room()) is not None:
            job = self.jobs[lost]
            self.kill(lost)
            return JobResult(job, error=f"worker {lost} ended (its machine left the cluster)", died=True, worker=lost)
        ready, _ = self._ray.wait(list(self._numbers), timeout=min(timeout_s, COUNT_AGAIN_S))
        if not ready:
            return None
        number = self._numbers.pop(ready[0])
        job = self.jobs.pop(number)
        try:
            reply = self._ray.get(ready[0])
        except self._ray.exceptions.RayTaskError as error:  # such as a value that cannot be pickled
            return JobResult(job, error=str(error), worker=number)
        except self._ray.exceptions.RayError as error:
            self.kill(number)
            return JobResult(job, error=f"worker {number} ended ({first_line(error)})", died=True, worker=number)
        return _done(reply, job, number)

    def kill(self, number: int) -> None:
        self.jobs.pop(number, None)
        self._numbers = {reference: n for reference, n in self._numbers.items() if n != number}
        if number in self._actors:
            self._ray.kill(self._actors.pop(number))

    def _without_room(self) -> int | None:
        """A worker with a job whose new actor will never run: Ray learns late that a machine is gone."""
        if time.monotonic() < self._counted_at + COUNT_AGAIN_S:
            return None
        self._room = max(1, int(self._ray.cluster_resources().get(self._device, 0)))
        if len(self._actors) > self._room:
            for number in self.jobs:
                if not self._ray.wait([self._is_up[number]], timeout=0)[0]:
                    return number
        self._counted_at = time.monotonic()
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: Any) -> None:
        for number in list(self._actors):
            self.kill(number)
        self._ray.shutdown()


def connect_ray(count: int, address: str | None) -> Any:
    """The module `ray`, connected to the cluster at `address`, or to one that is started here."""
    if find_spec("ray") is None:
        raise UserError(f"Ray is not installed: run {install_command('arc_solver[cluster]')}")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    local: dict[str, Any] = {} if address else {"num_cpus": count or cores(), "include_dashboard": False}
    path = os.pathsep.join(filter(None, sys.path))  # the cluster's machines have what we import where we have it
    environment = {"env_vars": {"PYTHONPATH": path}}
    try:
        if address and address != "auto":  # Ray itself would try for many minutes
            place = urlsplit(address if "//" in address else f"//{address}")
            if place.port is None:
                raise UserError(f"--address {address} has no port: give host:port, such as {address}:6379")
            socket.create_connection((place.hostname or "", place.port or 0), CONNECT_S).close()
        ray.init(address or "local", logging_level=logging.ERROR, runtime_env=environment, **local)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        if not address:
            raise UserError(
                f"Ray cannot be started on this machine ({first_line(error)}): leave --executor ray out"
            ) from None
        if address == "auto" and isinstance(error, ConnectionError):
            raise UserError(
                "no Ray runs on this machine: start it with ray start --head --port=6379, or give --address HOST:6379"
            ) from None
        said = " ".join(str(error).split())  # of another version it says in the lines after the first
        raise UserError(
            f"no Ray cluster at {address} ({said}): give host:port of its head, and the cluster's"
            " RAY_AUTH_MODE and token if it wants one"
        ) from None
    return ray
