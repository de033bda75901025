"""Runs that are killed, stopped and hurried: real processes, real signals, the real command."""

import json
import os
import random
import signal
import time

from solve_runs import answered, assert_like, events, finish, is_valid, solve, some_tasks, start, words_for
from toys import KILLS, write_challenges


def test_killed_at_random_moments_a_run_ends_like_an_uninterrupted_one(checkpoint, challenges, whole, tmp_path):
    """kill -9 of the whole process group, after a random number of answers. Nothing that was finished is done again."""
    rng, kills, out, n = random.Random(0), 0, tmp_path / "run0", 0
    while kills < KILLS:
        executor = rng.choice(["processes", "inprocess", "inprocess"])
        known = len(answered(out)) if out.exists() else 0
        process = start(words_for(checkpoint, challenges, out, "--executor", executor))
        while not all((out / name).exists() for name in ("submission.json", "log.jsonl")):
            assert process.poll() is None
            time.sleep(0.01)
        more = rng.randrange(len(answered(whole)))
        while len(answered(out)) < known + more and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.4))
        process.send_signal_to_all(signal.SIGKILL)
        process.communicate()
        assert process.returncode in (0, -signal.SIGKILL)
        kills += process.returncode != 0
        assert is_valid(out, challenges)
        if process.returncode == 0:
            assert_like(out, whole)
            n += 1
            out = tmp_path / f"run{n}"
    solve(words_for(checkpoint, challenges, out))
    assert_like(out, whole)


def test_a_time_budget_is_kept_and_the_answers_are_whole(checkpoint, challenges, tmp_path):
    """Some time for work without end: late by nothing, and all have an answer of some kind.

    How much: twice what an ordinary run takes from start to end on the machine as it is now, and 30 s or more.
    """
    began = time.monotonic()
    solve(words_for(checkpoint, challenges, tmp_path / "ordinary"))
    budget_s = max(30, round(2 * (time.monotonic() - began)))
    out = tmp_path / "run"
    more = ["adapt.steps=1000000", "adapt.stop=never", "adapt.budget_tokens=100000000000"]
    more += ["run.workers=1"]  # leaves a core to other tests
    more += ["--time-budget", f"{budget_s}s"]
    began = time.monotonic()
    said = solve(words_for(checkpoint, challenges, out, *more))
    assert time.monotonic() - began < budget_s
    summary = json.loads((out / "summary.json").read_text())
    assert summary["answered"] == 12
    assert is_valid(out, challenges)
    stopped = [e["adaptation"]["ended"] for e in events(out) if e["event"] == "task" and e["adaptation"]]
    assert set(stopped) == {"deadline"}
    assert "stopped by the clock" in said


def test_ray_workers_give_the_same_and_may_be_killed(checkpoint, whole, tmp_path, tmp_path_factory):
    """16 tasks on two actors; twice one of them is killed. At most the tasks in flight are done again."""
    challenges = write_challenges(tmp_path_factory.mktemp("many"), some_tasks(16))
    plain, out = tmp_path / "plain", tmp_path / "run"
    solve(words_for(checkpoint, challenges, plain, "adapt.steps=40"))
    process = start(words_for(checkpoint, challenges, out, "adapt.steps=40", "--executor", "ray", "run.workers=2"))
    killed: list[int] = []
    while process.poll() is None and len(killed) < 2:
        time.sleep(0.1)
        log = out / "log.jsonl"
        seen = [event["worker"] for event in events(out) if event["event"] == "task"] if log.exists() else []
        alive = [pid for pid in dict.fromkeys(seen) if pid not in killed]
        if len(seen) >= 4 * (len(killed) + 1) and alive:
            os.kill(alive[-1], signal.SIGKILL)
            killed.append(alive[-1])
    finish(process)
    assert len(killed) == 2
    assert answered(out) == sorted(f"task{i:02d}" for i in range(16))
    assert sum(event["event"] == "failure" for event in events(out)) <= 2
    assert (out / "submission.json").read_bytes() == (plain / "submission.json").read_bytes()


def test_ctrl_c_and_sigterm_stop_at_once_and_the_command_says_how_to_go_on(checkpoint, challenges, tmp_path):
    endless = ["adapt.steps=100000", "adapt.stop=never", "adapt.budget_tokens=1000000000"]
    for number, executor in ((signal.SIGINT, "processes"), (signal.SIGTERM, "processes"), (signal.SIGTERM, "ray")):
        out = tmp_path / f"{number}-{executor}"
        process = start(words_for(checkpoint, challenges, out, *endless, "--executor", executor))
        while not (out / "submission.json").exists():
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(3)  # the workers are up, or on their way
        (process.send_signal_to_all if number == signal.SIGINT else process.send_signal)(number)
        said = finish(process, expect=1)
        assert f"bin/solve --out {out}" in said
        assert "Traceback" not in said
        assert is_valid(out, challenges)
        page = out / "report.html"
        assert not page.exists() or "<body data-running>" not in page.read_text()
