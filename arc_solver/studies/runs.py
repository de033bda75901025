"""One run of a study: an arm with a seed is trained, solves tasks, and is measured.

What several runs have in common is done once: a training is found by a digest of the settings that it depends on, and
so is a run of `bin/solve`. Both are processes of their own that continue each other as they always do, so a study can
be killed at any moment. What was measured lies in `results/`, a file for each run.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import IO, Any

from ..answers import candidate_grids, first_attempts, solved_outputs
from ..answers.revote import read_run, select
from ..config import Config
from ..data import leak_audit, read_training_data
from ..errors import MachineError, UserError, counted
from ..files import git_commit, is_locked, lock, sha256, sync_folder, write_json
from ..models import checkpoint_dir, cpu_name
from ..puzzles import TaskSet, read_json, read_object
from ..report import is_training
from ..report.collect import read_log
from ..training.card import TRAINING_FILE
from .study import Arm, StudyFile

# Sections of the settings that a training depends on, and a run of bin/solve besides.
TRAINS = ("format", "model", "lora", "corpus", "validation", "audit", "train", "stages")
SOLVES = ("tasks", "adapt", "engine", "predict")
JOINT = ("lora", "train")  # lora is of the joint stage of bin/solve; the two are checked with each other
MODEL = ("path", "adapter", "seed", "quantize")  # what bin/solve knows of a model
LOOK_S = 0.3  # between two looks at a lock
DONE = "done.json"  # in a folder whose work is done: what it took


@dataclass(frozen=True, eq=False)
class Job:
    """A run that is to be done."""

    arm: str
    seed: int
    config: Config
    study_dir: Path
    trains: bool
    solves: bool
    seen: bool = False  # whether the tasks may be among those that were trained on
    again: str = ""  # tells it from another arm's, whose settings are the same
    threads: int = 1
    share: float = 1.0  # of the machine

    @property
    def train_key(self) -> str:
        """What tells this training from others; "" where none is asked for."""
        return self._digest(TRAINS) if self.trains else ""

    @property
    def solve_key(self) -> str:
        """What tells this run of bin/solve from others; "" where none is asked for."""
        return self._digest((*TRAINS, *SOLVES) if self.trains else SOLVES) if self.solves else ""

    @property
    def undone(self) -> set[Path]:
        """The folders of its training and its run of bin/solve, as far as nobody has done them yet."""
        parts = ((self.trains, self.trained), (self.solves, self.solved))
        return {folder for is_part, folder in parts if is_part and not (folder / DONE).exists()}

    @property
    def trained(self) -> Path:
        return self.study_dir / "trained" / self.train_key

    @property
    def solved(self) -> Path:
        return self.study_dir / "solved" / self.solve_key

    @property
    def key(self) -> str:
        """What tells its result from that of other settings, as far as it depends on them."""
        vote = self.config.vote.model_dump(mode="json") if self.solves else None
        return _hashed([self.train_key, self.solve_key, vote])

    def _digest(self, sections: tuple[str, ...]) -> str:
        content = self.config.model_dump(mode="json")
        if content["model"]["seed"] is None:  # it is the run's then
            content["model"]["seed"] = self.config.run.seed
        parts = [content[name] for name in sections]
        if not self.trains:
            parts.append({name: content["model"][name] for name in MODEL})
            parts.append(content["lora"] if self.config.adapt.joint else None)
        return _hashed([self.config.run.seed, self.again, parts, self._files(sections)])

    def _files(self, sections: tuple[str, ...]) -> list[str]:
        """Digests of the files that these sections name: others may have come to the same place."""
        config = self.config
        named = [config.model.path if self.trains else str(checkpoint_dir(config.model.path)), config.model.adapter]
        if self.trains:
            named += [source.path for stage in config.stages for source in stage.corpus.sources]
        if "tasks" in sections:
            named += [config.tasks.spec, config.tasks.solutions]
        return [_digest_of(Path(name)) for name in named if name]


@dataclass(frozen=True, eq=False)
class Result:
    """What was measured of a run.

    Attributes:
        tasks: of each metric what it is of each task: a loss, or the share of its outputs that are right; none of a
            metric that could not be measured, as where an output was not finite.
        seconds: of training and of solving, whoever shared them.
        about: machine, versions, digests of weights, the leak audit.
    """

    arm: str
    seed: int
    key: str
    tasks: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)


def _hashed(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _digest_of(path: Path) -> str:
    """Of a file, or of the weights that are in a folder; "" if there are none."""
    if path.is_file():
        return _sha256(path, path.stat().st_mtime_ns)[:16]
    digests = [_digest_of(file) for file in sorted(path.glob("*.safetensors"))]
    return digests[0] if len(digests) == 1 else _hashed(digests) if digests else ""


@cache
def _sha256(file: Path, _: int) -> str:
    """Of a file as it was changed last."""
    return sha256(file)


def make_job(found: StudyFile, study_dir: Path, arm: Arm, seed: int, threads: int = 1, share: float = 1.0) -> Job:
    study, again = found.study, arm.name if arm.again else ""
    config = found.config(arm, seed)
    return Job(arm.name, seed, config, study_dir, study.train, study.solves, study.seen, again, threads, share)


def result_file(study_dir: Path, arm: str, seed: int) -> Path:
    return study_dir / "results" / f"{arm}.{seed}.json"


def read_result(job: Job) -> Result | None:
    """What was measured of this run; None: it is not done, or was done with other settings."""
    file = result_file(job.study_dir, job.arm, job.seed)
    if not file.exists():
        return None
    try:
        content = read_json(file)
        return Result(**content) if content["key"] == job.key else None
    except (UserError, TypeError, KeyError):
        raise UserError(f"{file} is damaged: delete it, and its run is measured again") from None


def save_result(result: Result, study_dir: Path) -> None:
    file = result_file(study_dir, result.arm, result.seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, asdict(result))


# ---- the work ------------------------------------------------------------------------------------------------------


class Processes:
    """The commands that runs consist of, so that all of them can be ended at once."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        self._changing = threading.Lock()
        self.is_ending = False

    def call(
        self, module: str, words: list[str], log: Path, held: IO[str], threads: int, env: Mapping[str, str]
    ) -> None:
        """Runs a command of ours and waits for its end.

        Args:
            log: what it says goes there.
            held: a lock that it holds as long as it lives, even if this process is killed.

        Raises:
            UserError: what the command itself says of its input.
            MachineError: it failed otherwise, or all are being ended.
        """
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        environment = {**os.environ, **dict.fromkeys(names, str(threads)), **env}
        with log.open("ab") as stream:
            begin = stream.tell()
            with self._changing:
                if self.is_ending:
                    raise MachineError("ended before it began")
                process = subprocess.Popen(
                    [sys.executable, "-P", "-m", module, *words],
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=stream,
                    env=environment,
                    pass_fds=(held.fileno(),),
                    start_new_session=True,  # Ctrl-C is handed on by `end`, once
                )
                self._running.add(process)
            code = process.wait()
        self._running.discard(process)
        if code:
            said = log.read_bytes()[begin:].decode(errors="replace").strip().splitlines()
            last = next((line for line in reversed(said) if line.startswith("error: ")), said[-1] if said else "")
            if code == 2:
                raise UserError(last.removeprefix("error: "))
            raise MachineError(f"it ended with exit code {code}: {last.removeprefix('error: ')}; see {log}")

    def end(self) -> None:
        """Has all end as after Ctrl-C, which saves what they have done, but which a script may have them ignore."""
        with self._changing:
            self.is_ending = True
            for process in self._running:
                process.send_signal(signal.SIGTERM)


def perform(job: Job, processes: Processes, env: Mapping[str, str]) -> Result:
    """Trains, solves and measures, as far as that is not done yet.

    Args:
        env: what the commands find in their environment besides.

    Raises:
        UserError: a command refused its input, or a model was trained on what is measured.
        MachineError: a command failed, or another process works on the run.
    """
    tasks: dict[str, dict[str, float]] = {}
    seconds: dict[str, float] = {}
    about: dict[str, Any] = {"machine": cpu_name(), "threads": job.threads, "commit": git_commit()}
    about["share"] = job.share
    if not job.trains:
        model = job.config.model.path
        about["model"] = f"{model or 'the bundled model'}, weights {_digest_of(checkpoint_dir(model)) or 'not known'}"
    if job.trains:
        done = _train(job, processes, env)
        made = read_json(job.trained / "model" / TRAINING_FILE)
        of_training = {"validation_loss": made["validation_losses"], "accuracy": made["accuracies"]}
        # None stands for what is not finite.
        tasks |= {name: of for name, of in of_training.items() if of and None not in of.values()}
        seconds["train"] = done["seconds"]
        about |= {name: made[name] for name in ("machine", "torch", "parameters", "tokens", "steps")}
        about |= {"audit_of_training": made["leak_audit"], "weights": done["weights"], "trained": job.trained.name}
    if job.solves:
        done = _solve(job, processes, env)
        seconds["solve"] = done["seconds"]
        answered, said = _measure_answers(job)
        tasks |= answered
        about |= said
    return Result(job.arm, job.seed, job.key, tasks, seconds, about)


def _train(job: Job, processes: Processes, env: Mapping[str, str]) -> Mapping[str, Any]:
    out = job.trained
    with _alone(out, processes) as held:
        if not (out / DONE).exists():
            settings = _settings(job, TRAINS)
            words = [_write_settings(out, settings), "--out", str(out), *(["--resume"] if is_training(out) else [])]
            processes.call("arc_solver.train", words, out.with_suffix(".log"), held, job.threads, env)
            weights = sha256(out / "model" / "model.safetensors")
            sync_folder(out)  # what is marked as done is there, even after a power cut
            *_, last = (record["elapsed_s"] for record in read_log(out / "log.jsonl") if "elapsed_s" in record)
            write_json(out / DONE, {"seconds": round(last), "weights": weights})
        _make_room(out / "checkpoints")
    return read_object(out / DONE)


def _solve(job: Job, processes: Processes, env: Mapping[str, str]) -> Mapping[str, Any]:
    out = job.solved
    with _alone(out, processes) as held:
        if not (out / DONE).exists():
            settings = _settings(job, (*SOLVES, *JOINT))
            settings["model"] = _asked(job)
            settings["run"] |= {"show": 0, "workers": job.config.run.workers or job.threads}
            words = [_write_settings(out, settings), "--out", str(out)]
            _forget_fallbacks(out)
            processes.call("arc_solver.solve", words, out.with_suffix(".log"), held, job.threads, env)
            sync_folder(out)
            summary = read_object(out / "summary.json")
            write_json(out / DONE, {"seconds": round(summary["seconds"]["whole"])})
        _make_room(out / "adapters")
    return read_object(out / DONE)


def _forget_fallbacks(out: Path) -> None:
    """A task that got no answer of its adapted model, for which a run ends with exit code 3, is tried again."""
    for file in out.glob("tasks/*.json"):
        if read_object(file).get("fallback"):
            file.unlink()


def _make_room(folder: Path) -> None:
    """Deletes what is large, only after the work was marked as done: from half a checkpoint it could not go on."""
    shutil.rmtree(folder, ignore_errors=True)


def _asked(job: Job) -> dict[str, Any]:
    """The settings of the model that solves."""
    given = job.config.model
    if not job.trains:
        return {name: getattr(given, name) for name in MODEL}
    if job.config.adapt.start == "pretrained":  # what was trained is continued, on what it was trained for
        return {"path": given.path, "adapter": str(job.trained / "adapter")}
    return {"path": str(job.trained / "model"), "adapter": ""}


def _settings(job: Job, sections: Sequence[str]) -> dict[str, Any]:
    content = job.config.model_dump(mode="json")
    run = {"seed": job.config.run.seed, "device": job.config.run.device}
    return {name: content[name] for name in sections} | {"run": run}


def _write_settings(out: Path, settings: Mapping[str, Any]) -> str:
    file = out.with_suffix(".json")
    write_json(file, settings)
    return str(file)


@contextmanager
def _alone(out: Path, processes: Processes) -> Iterator[IO[str]]:
    """Nobody else works on a folder meanwhile. Runs that share it wait for each other, and for what outlived a study
    that was killed.

    Raises:
        MachineError: all are being ended.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with _ours[out]:
        while not (held := lock(out.with_suffix(".lock"))):
            if processes.is_ending:
                raise MachineError("ended before it began")
            time.sleep(LOOK_S)
        with held:
            yield held


def left_running(study_dir: Path) -> list[Path]:
    """The folders that commands of an earlier call, which was killed, still work on."""
    locks = [file for what in ("trained", "solved") for file in (study_dir / what).glob("*.lock")]
    return [file.with_suffix("") for file in locks if is_locked(file)]


_ours: defaultdict[Path, threading.Lock] = defaultdict(threading.Lock)


def _measure_answers(job: Job) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """Of each metric the share of each task's outputs that is right; and what the tasks are."""
    run = read_run(job.solved, [f"vote.{key}={json.dumps(value)}" for key, value in job.config.vote])
    if run.missing:
        (job.solved / DONE).unlink()
        raise MachineError(f"the answers to {counted(run.missing, 'task')} of {job.solved} were lost")
    solutions = run.task_set.solutions
    if not solutions:
        raise UserError(f"no solution of {job.config.tasks.spec} is known: give tasks.solutions, or other tasks")
    attempts = select(run, job.config.vote.rule)
    right = {
        "pass@1": solved_outputs({i: first_attempts(outputs) for i, outputs in attempts.items()}, solutions),
        "pass@2": solved_outputs(attempts, solutions),
        "coverage": solved_outputs(candidate_grids(run.predictions, solutions), solutions),
    }
    tasks = {name: {i: sum(of) / len(of) for i, of in sorted(found.items())} for name, found in right.items()}
    said = audit(_asked(job), run.task_set, job.seen)
    return tasks, {"audit": said, "tasks": run.task_set.name, "data": run.task_set.data, "solved": job.solved.name}


def audit(model: Mapping[str, Any], task_set: TaskSet, seen: bool) -> str:
    """What the leak audit of a model and tasks says.

    Args:
        model: settings; its path, and its adapter if it has one.
        seen: whether it may have been trained on the tasks.

    Raises:
        UserError: it may not, and was.
    """
    said = []
    for folder in (checkpoint_dir(model["path"]), *([Path(model["adapter"])] if model["adapter"] else [])):
        trained_on = read_training_data(folder)
        found = leak_audit(trained_on, task_set) if trained_on else None
        if found and not found.passed and not seen:
            raise UserError(
                f"{found}: a study measures what was not trained on: choose other tasks, or set audit.scored_on"
            )
        said.append(str(found) if found else f"no leak audit: {folder} does not say what it was trained on")
    return "; ".join(dict.fromkeys(said))
