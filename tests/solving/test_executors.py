"""One behaviour wherever jobs run: every job is answered, whatever became of its worker, and nothing stays."""

import itertools
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import toy_workers
from forked import is_alive
from toy_workers import Toy

import arc_solver.solving.executors
from arc_solver.errors import UserError
from arc_solver.solving.executors import Executor, JobResult, Watchdog, make_executor

PATIENCE_S = 60
CLUSTER = """
import sys
import ray
context = ray.init("local", num_cpus=2, include_dashboard=False, logging_level="ERROR")
print(context.address_info["gcs_address"], flush=True)
sys.stdin.read()
"""

Open = Callable[..., Executor]
everywhere = pytest.mark.parametrize("open_executor", ["inprocess", "processes", "forked", "ray"], indirect=True)
elsewhere = pytest.mark.parametrize("open_executor", ["processes", "forked", "ray"], indirect=True)


@pytest.fixture(scope="module", autouse=True)
def token() -> Iterator[None]:
    """Ray's clusters of these tests let nobody else in, and leave no token at home."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("MODE", "token"), ("TOKEN", secrets.token_hex(32))):
            patch.setenv(f"RAY_AUTH_{name}", value)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        yield


@pytest.fixture(scope="module")
def cluster(token: None) -> Iterator[str]:
    """Address of a Ray cluster of two cores, in processes of its own."""
    command = [sys.executable, "-c", CLUSTER]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdin
        assert process.stdout
        yield process.stdout.readline().strip()
        process.stdin.close()


@pytest.fixture
def open_executor(request: pytest.FixtureRequest) -> Open:
    """Makes an executor of the kind that is tested, by default with two toy workers; in process there is only one."""
    address = request.getfixturevalue("cluster") if request.param == "ray" else None

    def open_one(make_worker: Callable[[int], Toy] = Toy) -> Executor:
        return toy_workers.executor_of(request.param, make_worker, address)

    return open_one


def answers(executor: Executor, *jobs: tuple[Any, ...]) -> list[JobResult]:
    return list(executor.map_unordered(iter(jobs)))


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("open_executor", ["inprocess", "processes", "forked"], indirect=True)
def test_workers_say_how_far_their_jobs_are(open_executor):
    """Not at every step, and never of a job that is not running."""
    heard: dict[tuple[Any, ...], list[float]] = {}
    jobs = [("advance", 20), ("advance", 21), ("double", 1), ("advance", 1)]
    with open_executor() as executor:
        executor.on_progress = lambda job, done: heard.setdefault(job, []).append(done)
        for done in executor.map_unordered(iter(jobs)):
            assert done.error is None
            heard.setdefault(done.job, []).append(99)
    for job in jobs[:2]:
        told = heard[job]
        assert told == sorted(set(told))
        assert told[-1] == 99, "and nothing after its end"
        assert 2 < len(told) < 20
    assert heard[jobs[2]] == [99]


@everywhere
def test_all_jobs_are_answered_once_and_none_is_pulled_ahead(open_executor):
    pulled, received = [], []

    def jobs() -> Iterator[tuple[str, int]]:
        for i in range(20):
            assert len(pulled) - len(received) < executor.count
            pulled.append(i)
            yield ("double", i)

    with open_executor() as executor:
        for done in executor.map_unordered(jobs()):
            received.append(done)
        assert all(done.error is None and not done.died for done in received)
        assert {done.worker for done in received} <= set(range(executor.count))
        assert sorted((done.job[1], done.value) for done in received) == [(i, 2 * i) for i in range(20)]
        counts = [done.value for done in answers(executor, *[("count",)] * 10)]  # the same workers as before
        assert max(jobs for _, jobs in counts) > 10
        assert answers(executor) == []


@everywhere
def test_results_bring_new_jobs(open_executor):
    """Numbers are doubled until they pass 100; what is to be doubled next is known only then."""
    waiting = [1, 3, 5]
    in_flight = 0
    final = []

    def jobs() -> Iterator[tuple[str, int] | None]:
        nonlocal in_flight
        while waiting or in_flight:
            if waiting:
                in_flight += 1
                yield ("double", waiting.pop())
            else:
                yield None

    with open_executor() as executor:
        for done in executor.map_unordered(jobs()):
            in_flight -= 1
            (waiting if done.value <= 100 else final).append(done.value)
        assert sorted(final) == [128, 160, 192]
        with pytest.raises(AssertionError, match="none in flight"):
            list(executor.map_unordered(iter([None])))


@everywhere
def test_an_exception_is_an_answer(open_executor):
    with open_executor() as executor:
        found = answers(executor, ("fail", "bad luck"), *[("double", i) for i in range(5)])
    (failed,) = [done for done in found if done.error]
    assert "RuntimeError: bad luck" in failed.error
    assert "in fail" in failed.error  # a traceback
    assert (failed.job, failed.value, failed.died) == (("fail", "bad luck"), None, False)
    assert sorted(done.value for done in found if not done.error) == [0, 2, 4, 6, 8]


@elsewhere
def test_what_is_long_or_cannot_be_pickled_comes_back_too(open_executor):
    text = "x" * 5_000_000
    with open_executor() as executor:
        found = answers(executor, ("long_text", text), ("odd",), ("long_text", text))
    assert [len(done.value) for done in found if done.value] == [10_000_000] * 2
    (odd,) = [done for done in found if done.error]
    assert "pickle" in odd.error
    assert not odd.died


@elsewhere
def test_a_job_that_never_ends_does_not_hold_a_run(open_executor, tmp_path):
    with open_executor() as executor:
        answers(executor, *[("count",)] * 2)  # the workers are up
        jobs = iter([("stay", tmp_path), ("double", 1), ("double", 2)])
        found = list(executor.map_unordered(jobs, until=time.monotonic() + 5))
        assert sorted(done.value for done in found) == [2, 4]
        (pid,) = [int(file.read_text()) for file in tmp_path.iterdir()]
        until(lambda: not is_alive(pid))
        assert sorted(done.value for done in answers(executor, *[("double", i) for i in range(3)])) == [0, 2, 4]
        assert list(executor.map_unordered(iter([("double", 1)]), until=time.monotonic())) == []


@elsewhere
def test_leaving_ends_what_runs(open_executor, tmp_path):
    """By an exception in the middle of the loop."""
    jobs = itertools.chain([("stay", tmp_path)], itertools.repeat(("double", 1)))
    with pytest.raises(ZeroDivisionError), open_executor() as executor:
        for _ in executor.map_unordered(jobs):
            if any(tmp_path.glob("pid*")):  # not waited for here: it is the loop that gives a worker its first job
                raise ZeroDivisionError
    (pid,) = [int(file.read_text()) for file in tmp_path.iterdir()]
    until(lambda: not is_alive(pid))


@elsewhere
def test_a_killed_worker_costs_its_own_job_only(open_executor, tmp_path):
    def kill() -> None:
        until(lambda: any(tmp_path.glob("pid*")))
        (file,) = tmp_path.glob("pid*")
        os.kill(int(file.read_text()), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with open_executor() as executor:
        found = answers(executor, ("stay", tmp_path), *[("double", i) for i in range(10)])
        killer.join()
        (lost,) = [done for done in found if done.died]
        assert lost.job == ("stay", tmp_path)
        assert lost.error.startswith(f"worker {lost.worker} ended (")
        assert len(lost.error.splitlines()) == 1
        assert sorted(done.value for done in found if not done.died) == list(range(0, 20, 2))
        assert {done.error for done in answers(executor, *[("count",)] * 4)} == {None}


@elsewhere
def test_three_kills_over_forty_jobs(open_executor, tmp_path):
    """Lost jobs are handed out again. Each job runs once, the killed ones twice."""
    waiting = [("record", i, tmp_path, i in (7, 8, 30)) for i in range(40)]
    answered, lost = [], []

    def jobs() -> Iterator[tuple[Any, ...] | None]:
        while len(answered) < 40:
            yield waiting.pop(0) if waiting else None

    with open_executor() as executor:
        for done in executor.map_unordered(jobs()):
            if done.died:
                lost.append(done.job[1])
                waiting.append(done.job)
            else:
                answered.append(done.value)
    assert sorted(answered) == list(range(40))
    assert sorted(lost) == [7, 8, 30]
    begun = {i: (tmp_path / f"job{i}").read_text().count("begun") for i in range(40)}
    assert begun == {i: 2 if i in lost else 1 for i in range(40)}


def test_how_a_process_ended_is_told(tmp_path):
    with make_executor("processes", Toy, 1) as executor:
        (left, killed, served) = answers(executor, ("leave", 3), ("record", 0, tmp_path, True), ("count",))
    assert left.error == "worker 0 ended (exit code 3)"
    assert killed.error == "worker 0 ended (signal 9, as where memory runs out)"
    assert served.value == (0, 1)


def test_a_worker_that_died_idle_takes_no_job_with_it(tmp_path):
    with make_executor("processes", os_pid_worker, 1) as executor:
        for _ in range(2):
            (first,) = answers(executor, "job")
            os.kill(first.value, signal.SIGKILL)
            until(lambda pid=first.value: os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None)
            (second,) = answers(executor, "job")
            assert second.error is None
            assert second.value != first.value


class PidWorker:
    def run(self, job: str) -> int:
        return os.getpid()


def os_pid_worker(number: int) -> PidWorker:
    return PidWorker()


@elsewhere
def test_a_hung_worker_ends_by_itself(open_executor, request, capfd):
    with open_executor() as executor:
        found = answers(executor, ("hang", 0.5), ("double", 1))
    (hung,) = [done for done in found if done.died]
    assert hung.job == ("hang", 0.5)
    kind = request.node.callspec.params["open_executor"]
    if kind != "ray":
        assert "exit code 1" in hung.error
    if kind == "processes":  # a fork says it where its server, of an earlier test, was to say things
        said = capfd.readouterr().err
        assert "Timeout" in said
        assert "in snooze" in said


def test_no_timeout_is_no_watch():
    """It would be pytest's own timer that is changed."""
    for call in (Watchdog(0).beat, Watchdog(0).rest):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(arc_solver.solving.executors, "faulthandler", None)
            call()


@everywhere
def test_a_worker_that_cannot_be_made_is_the_users_to_mend(open_executor):
    with open_executor(toy_workers.refuse) as executor, pytest.raises(UserError, match=r"^there is no such model$"):
        answers(executor, *[("double", i) for i in range(3)])


@elsewhere
def test_a_constructor_that_breaks_is_told_with_its_traceback(open_executor):
    with open_executor(toy_workers.break_down) as executor:
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"could not be made:\n(.*\n)*.*in break_down\n(.*\n)*.*bad luck"):
                answers(executor, ("double", 1), ("double", 2))


@elsewhere
def test_a_worker_that_cannot_be_made_again_costs_the_job(open_executor, tmp_path):
    """Hours into a run, with a GPU that is not free yet, say: the next attempt may succeed."""
    jobs = [("double", 1), ("leave", 7), ("double", 2), ("double", 3)]
    with open_executor(partial(toy_workers.refuse_once, tmp_path)) as executor:
        executor.count = 1
        done = answers(executor, *jobs)
    assert [(d.job[0], d.died) for d in done] == [
        ("double", False),
        ("leave", True),
        ("double", True),
        ("double", False),
    ]
    assert "could not be made: no room at present" in done[2].error


@elsewhere
def test_a_constructor_that_ends_the_process_costs_the_job(open_executor):
    with open_executor(toy_workers.vanish) as executor:
        assert [done.died for done in answers(executor, ("double", 1), ("double", 2))] == [True, True]


@pytest.mark.parametrize("kind", ["processes", "forked", "ray"])
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_or_killed_main_process_leaves_nothing(kind, how, tmp_path):
    """Ctrl-C reaches all processes of the terminal, kill -9 only the main one (Ray's own then take a minute to end)."""
    (tmp_path / "pids").mkdir()
    command = [sys.executable, toy_workers.__file__, kind, str(tmp_path / "pids")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        until(lambda: len(list((tmp_path / "pids").glob("pid*"))) == 2)
        pids = [int(file.read_text()) for file in (tmp_path / "pids").iterdir()]
        (os.killpg if how == signal.SIGINT else os.kill)(process.pid, how)
        _, said = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == -how
        assert said.count("KeyboardInterrupt") == (how == signal.SIGINT)
        until(lambda: not any(map(is_alive, pids)))
        until(lambda: not is_alive(process.pid, os.killpg) or (kind, how) == ("ray", signal.SIGKILL))
    finally:
        if is_alive(process.pid, os.killpg):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("kind", ["processes", "forked"])
def test_ctrl_c_while_workers_start_is_the_main_processs_to_handle(kind, tmp_path):
    command = [sys.executable, toy_workers.__file__, kind, str(tmp_path)]
    for delay_s in (0.0, 0.1, 0.2):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
        until(partial(has_children, process.pid))
        time.sleep(delay_s)
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == -signal.SIGINT
        assert said.count("Traceback") == 1, said
        until(lambda group=process.pid: not is_alive(group, os.killpg))


def has_children(pid: int) -> bool:
    return bool(Path(f"/proc/{pid}/task/{pid}/children").read_text())


def test_ray_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(arc_solver.solving.executors, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'arc_solver\[cluster\]'"):
        make_executor("ray", Toy)


def test_a_cluster_out_of_reach_is_named():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    says = {
        f"127.0.0.1:{port}": f"no Ray cluster at 127.0.0.1:{port} ",
        "a:b:c": "no Ray cluster at a:b:c ",
        "127.0.0.1": "--address 127.0.0.1 has no port: give host:port, such as 127.0.0.1:6379",
    }
    for address, said in says.items():
        with pytest.raises(UserError, match=re.escape(said)):
            make_executor("ray", Toy, address=address)
