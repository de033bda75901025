"""The main job: adapt, predict and vote for every task, and write the submission.

A scheduler (`scheduler.py`) says what is to be done, workers (`worker.py`) do it wherever they run (`executors.py`),
and all that comes of it is kept in the run's folder (`journal.py`). What a task gives depends on the seed and on the
tasks that it is adapted with: the number of workers and interruptions change nothing but the time. A time budget does;
and where memory is too small for a group at once, its parts depend on what is free, and so the last bits of an adapter.
"""

import math
import signal
import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.rule import Rule
from rich.text import Text

from ..answers import rank
from ..answers.submission import table_of
from ..clock import format_duration, format_guess, process_age_s
from ..command import as_called
from ..config import Config
from ..data import NOTHING, TrainingData, leak_audit, read_training_data
from ..decoding.engine_choice import check_engine, engine_kind
from ..errors import counted
from ..models import (
    checkpoint_dir,
    describe_precision,
    fresh_adapter,
    pick_device,
    require_ours,
    unverified_base_warning,
)
from ..models.hardware import whole_memory
from ..models.lora import origin_of
from ..puzzles import Task, TaskSet, smallest
from ..puzzles.pictures import Drawing, needs_numbers, task_picture
from ..report import PageWriter
from ..report.writer import pages_of_run
from ..rng import named_rng
from ..training.parallel import require_packages
from ..waiting import Reporter, Wait, waiting
from . import status
from .adapt import group_by_length, max_group_size
from .budget import Budget
from .executors import SPAWN, Executor, JobResult, cores, make_executor, start_preloading
from .joint import joint_record, require_demonstrations, train_jointly
from .journal import Journal, open_journal
from .scheduler import FinishedTask, Scheduler
from .status import Meter
from .worker import AdaptJob, Job, load_base, make_worker, prediction_groups

# What of a time budget is kept for the end: for jobs that come a step late, the summary, and the end of all processes.
MARGIN_S, MARGIN_SHARE = 4.0, 0.01
# The interpreter's end takes a quarter of its start, which a busy machine makes long; but that may have installed too.
END_OF_START, END_MOST = 0.25, 0.05
WORKERS_IMPORT = (
    "arc_solver.solving.worker",
    "transformers.models.auto.modeling_auto",
    "transformers.modeling_utils",
)
MEASURE_S = 1.5  # of work, before a guess is made of the whole
MEASURED_SHARE = 0.01  # of the work, from which on an ETA goes by the share that is done
INTERRUPTED = 1  # exit code of a run that was asked to end
INCOMPLETE = 3  # exit code of a run that ended as it should, but not with an answer of the adapted model to every task


def solve(
    scheduler: Scheduler, executor: Executor, pages: PageWriter, deadline: float, console: Console, starting: str
) -> dict[str, Any]:
    """Solves what is not solved yet, until `deadline` of `time.monotonic()`. The summary of the run.

    Args:
        pages: kept up to date from the beginning on.
        starting: what is waited for until the first job says something.
    """
    journal, config = scheduler.journal, scheduler.config
    task_set = journal.task_set
    meter = Meter(executor.count, deadline, status.last_summary(journal.run_dir), joint_record(journal.run_dir))
    say = Reporter(console)
    say(_to_do(scheduler))
    ends = None if deadline == math.inf else round(time.time() + deadline - time.monotonic(), 2)
    journal.log(event="begin", time=round(time.time(), 2), workers=executor.count, deadline=ends)
    with waiting(say, starting, 1.0) as wait:
        shown = _Shown(scheduler, say, wait, deadline)
        pages.refresh()

        def note(job: Job, tokens: float) -> None:
            shown.note(job, tokens)
            meter.keep(journal, scheduler.share_done)
            pages.refresh()

        executor.on_progress = note
        for done in executor.map_unordered(scheduler.jobs(), until=deadline):
            meter.note(done)
            journal.log(**_job_record(done))
            for finished in scheduler.handle_result(done):
                record = _log_record(finished, journal.tasks[finished.result.task_id], config)
                journal.log(**record)
                if finished.stage != "unadapted":
                    so_far = f"{len(journal.statuses)}/{len(task_set.tasks)}"
                    console.print(f"{so_far:>7}  {_task_line(finished, record)}", soft_wrap=True)
            journal.refresh_submission()
            meter.keep(journal, scheduler.share_done)
            pages.refresh()
            shown.note()
    journal.rewrite_submission()
    summary = meter.summary(task_set, journal.statuses, scheduler.share_done)
    journal.write_summary(summary)
    pages.finish(deadline + MARGIN_S / 2)
    return summary


def worker_count(config: Config, tasks: int) -> int:
    """Workers on this machine; 0: as many as a cluster has GPUs, or else cores."""
    if config.run.executor == "ray":
        return config.run.workers
    if config.run.executor == "inprocess" or config.engine.kind == "vllm":
        return 1
    if pick_device(config.run.device).type == "cuda":
        return 1
    return max(1, min(config.run.workers or cores(), tasks))


def _deadline(config: Config) -> float:
    budget, age_s = config.run.budget_s, process_age_s()
    if budget == math.inf:
        return budget
    margin_s = MARGIN_S + MARGIN_SHARE * budget + min(END_OF_START * age_s, END_MOST * budget)
    return time.monotonic() - age_s + budget - margin_s


def _to_do(scheduler: Scheduler) -> str:
    """What there is to do, which how long it takes follows from."""
    adapting, asking = scheduler.all
    learning = f"up to {adapting:,.0f} tokens to learn from, " if adapting else ""
    return f"to do: {learning}{asking:,.0f} tokens to ask"


# ---- what the user sees --------------------------------------------------------------------------------------------


class _Shown:
    """How far a run is, and once what it is likely to take: see `note`."""

    def __init__(self, scheduler: Scheduler, say: Reporter, wait: Wait, deadline: float):
        self.scheduler, self.say, self.wait, self.deadline = scheduler, say, wait, deadline
        self.began: tuple[float, float] | None = None  # the first sign of work: when, and the share that was done
        self.first: dict[int, tuple[float, float]] = {}  # of each job that adapts: when it was heard of, and its tokens
        self.is_guessed = False

    @property
    def _may_stop_early(self) -> bool:
        return self.scheduler.all.adapting > 0 and self.scheduler.config.adapt.stop != "never"

    def note(self, job: Job | None = None, tokens: float = 0.0) -> None:
        """A job that runs is so far, or one has ended."""
        now, scheduler, wait = time.monotonic(), self.scheduler, self.wait
        if job:
            scheduler.note_progress(job, tokens)
        self._guess(job, tokens, now)
        # A new guess of what is left must not turn it back.
        wait.done = share = max(wait.done, scheduler.share_done)
        self.began = self.began or (now, share)
        began, before = self.began
        if share >= before + MEASURED_SHARE and now - began >= MEASURE_S:
            left_s = (now - began) * (1 - share) / (share - before)
            wait.expect_end_in(min(left_s, self.deadline - now))
        done, tasks = len(scheduler.journal.statuses), len(scheduler.journal.task_set.tasks)
        wait.what, wait.note = f"{done} of {counted(tasks, 'task')}", f"{share:.0%} of the work"

    def _guess(self, job: Job | None, tokens: float, now: float) -> None:
        """Says what all of it is likely to take, once adapting was measured for a moment or a first job has ended."""
        if self.is_guessed:
            return
        scheduler, budget = self.scheduler, self.scheduler.budget
        token_s = budget.s_per_trained_token or (0.0 if scheduler.all.adapting else budget.s_per_predicted_token)
        if isinstance(job, AdaptJob) and not token_s:
            since, before = self.first.setdefault(id(job), (now, tokens))
            if now - since >= MEASURE_S and tokens > before:
                token_s = (now - since) / (tokens - before)
        if not token_s:
            return
        self.is_guessed = True
        seconds, left_s = scheduler.expected_s(token_s), self.deadline - now
        self.wait.expect_end_in(min(seconds, left_s))
        up_to, less = ("up to ", ", less where tasks stop early") if self._may_stop_early else ("", "")
        what = f"{up_to}about {format_guess(seconds)}{less}" if seconds <= left_s else "all the time that there is"
        each = f"each of {budget.workers} workers" if budget.workers > 1 else "one worker"
        self.say(f"this takes {what}: {1 / token_s:,.0f} tokens/s of {each}, measured just now")


def _job_record(done: JobResult) -> dict[str, Any]:
    """Which worker had a job until when, in seconds since 1970, and for how long; None: it failed, and nobody says."""
    return {
        "event": "job",
        "job": "adapt" if isinstance(done.job, AdaptJob) else "ask",
        "stage": done.job.stage,
        "tasks": [task.id for task in done.job.tasks],
        "worker": done.worker,
        "ended": round(time.time(), 2),
        "seconds": None if done.error is not None else round(done.value.usage.seconds, 2),
    }


def _log_record(finished: FinishedTask, task: Task, config: Config) -> dict[str, Any]:
    result, usage = finished.result, finished.usage
    ranked = [rank(result.predictions, task, test, config.vote) for test in range(len(task.test))]
    return {
        "event": "task",
        "task": result.task_id,
        "stage": finished.stage,
        "seconds": round(result.seconds, 2),
        "adaptation": result.adaptation,
        "distinct": [len(r) for r in ranked],
        "votes": [[entry.votes for entry in r[:2]] for r in ranked],
        "dropped": result.predictions.dropped,
        "too_long": result.predictions.too_long,
        "capped": result.predictions.capped,
        "predicting": round(result.predicting, 2),
        "cost": dict(result.predictions.cost),
        "worker": usage and usage.process,
        "peak_memory_bytes": usage and usage.peak_memory_bytes,
        "fallback": result.fallback,
        "error": result.error,
    }


def _task_line(finished: FinishedTask, record: dict[str, Any]) -> str:
    result = finished.result
    parts = [f"{result.task_id:<10} {result.seconds:4.0f} s"]
    if result.fallback:
        last = escape((result.error or "no time").strip().splitlines()[-1])
        says = {"unadapted": "answered without adaptation", "placeholder": "failed, and has no answer"}
        parts = [f"[red]{result.task_id} {says[result.fallback]}:[/red] {last}"]
    if learnt := result.adaptation:
        parts.append(f"loss {learnt['first_loss']:.3f} to {learnt['last_loss']:.3f}{_ENDS[learnt['ended']]}")
        if learnt["dropped"]:
            parts.append(f"samples lost up to {counted(learnt['dropped'], 'demonstration')}")
    if result.predictions.candidates:
        parts.append(
            "; ".join(
                f"attempts with {' and '.join(map(str, votes))} vote{'s' * (votes != [1])},"
                f" of {counted(distinct, 'distinct answer')}"
                for votes, distinct in zip(record["votes"], record["distinct"], strict=True)
            )
        )
    if record["dropped"]:
        parts.append(f"prompts lost up to {counted(record['dropped'], 'demonstration')}")
    if record["too_long"]:
        parts.append(f"{counted(record['too_long'], 'prompt')} too long for the model, whose replies may be cut")
    if record["capped"]:
        parts.append(f"search cut in {counted(record['capped'], 'view')}")
    return ", ".join(parts)


_ENDS = {
    "steps": "",
    "leave-one-out": ", stopped early",
    "deadline": ", stopped by the clock",
    "diverged": ", [red]diverged[/red]: the adapter is what it started as",
}


def _picture(
    task_set: TaskSet,
    journal: Journal,
    config: Config,
    trained_on: TrainingData | None,
    summary: dict[str, Any],
    numbers: bool,
) -> Group:
    """Some tasks drawn, perhaps with numbers; how the run stands; and what a score must be read with."""
    shown: list[RenderableType] = []
    attempts = {i: status.attempts for i, status in journal.statuses.items()}
    drawn = config.run.show
    if not summary["answered"]:
        shown.append(Text("no task has an answer, so there is no score"))
    else:
        per_task = summary["score"]["per_task"] if summary["score"] else {}
        kinds = {
            "solved": [i for i in attempts if per_task.get(i) == 1],
            "not solved": [i for i in attempts if per_task.get(i, 1) < 1],
            "without a known solution": [i for i in attempts if i not in per_task],
        }
        for title, ids in kinds.items():
            if ids and drawn:
                some = f"{drawn} of the {len(ids)} that are" if len(ids) > drawn else f"{len(ids)}"
                shown.append(Rule(f"{some} {title}"))
                for i in ids[:drawn]:
                    task, solution = journal.tasks[i], task_set.solutions.get(i)
                    drawing = Drawing(f"task {i}", task, attempts[i], solution, demonstrations=1)
                    shown.append(task_picture(drawing, numbers))
    title = f"{task_set.name}, {counted(len(task_set.tasks), 'task')}, seed {config.run.seed}"
    shown.append(table_of(title, status.summary_rows(summary)))
    if summary["score"] and summary["answered"]:
        unknown = "no leak audit: this checkpoint does not say what it was trained on"
        shown.append(Text(str(leak_audit(trained_on, task_set)) if trained_on else unknown))
    return Group(*shown)


def run(config: Config, task_set: TaskSet, run_dir: Path, remark: str = "") -> int:
    """Solves the tasks in a run directory, new or continued, and shows what came of it. The command's exit code.

    Args:
        remark: said once the run has begun.
    """
    deadline = _deadline(config)
    console = Console()
    plain = Reporter(console)
    device = pick_device(config.run.device)
    if config.adapt.joint:
        require_packages("adapt.joint")
    require_ours(checkpoint_dir(config.model.path))  # else a process would be started in vain, and end seconds later
    in_processes = config.run.executor == "processes"
    context = start_preloading(WORKERS_IMPORT) if in_processes and device.type == "cpu" else SPAWN
    with waiting(plain, "loading the model"):
        model, start_adapter = load_base(config, torch.device("cpu"))
    most = 0
    if config.adapt.enabled:  # this refuses targets that the model lacks before any work is done
        adapter = start_adapter or fresh_adapter(model, config.adapt, named_rng(0))
        most = max_group_size(adapter, whole_memory(device, worker_count(config, len(task_set.tasks)) or cores()))
    config = config.model_copy(update={"format": model.format})  # the checkpoint's, whatever the config says
    kind, why = engine_kind(model, config, device)
    check_engine(model, config, device)
    parameters, trained_on = model.parameters_count, model.trained_on
    del model, start_adapter  # workers have their own
    chosen = smallest(task_set.tasks, config.run.smoke) if config.run.smoke else task_set.tasks
    if config.adapt.joint:
        require_demonstrations(chosen, config)
    groups = group_by_length(chosen, config.adapt, device, most)
    weights = [checkpoint_dir(config.model.path), *([Path(config.model.adapter)] if config.model.adapter else [])]
    count = worker_count(config, len(groups))
    pages: PageWriter | None = None
    with ExitStack() as stack:
        begin = partial(open_journal, run_dir, task_set, config, weights)
        try:
            # What refuses to start leaves no run behind, if it can: so the workers come before the run's folder.
            journal = stack.enter_context(begin()) if config.adapt.joint else None
            used = train_jointly(config, chosen, run_dir, device, deadline, plain) if journal else config
            make, address = partial(make_worker, used, neighbours=count), config.run.address or None
            with waiting(plain, "preparing the run"):  # Ray is started, the weights are hashed
                executor = stack.enter_context(make_executor(config.run.executor, make, count, address, context))
                signal.signal(signal.SIGTERM, signal.default_int_handler)  # once more: Ray has put its own there
                journal = journal or stack.enter_context(begin())
            plain(
                f"{counted(len(task_set.tasks), 'task')} from {task_set.name};"
                f" model of {parameters:,} parameters on {device} in {describe_precision(device)},"
                f" {counted(executor.count, 'worker')}; engine {kind} ({why}); run directory {run_dir}"
            )
            if remark:
                plain(remark)
            if config.model.adapter and (base := unverified_base_warning(Path(config.model.adapter))):
                plain(base)
            if journal.continued:
                plain(f"continued: {len(journal.statuses)} of {counted(len(task_set.tasks), 'task')} answered")
            for file in journal.damaged:
                plain(f"{file} could not be read and is solved again")
            if not config.model.adapter or config.adapt.start == "pretrained":  # else the base is merged, in no folder
                journal.origin = origin_of(checkpoint_dir(used.model.path))
                journal.learnt_before = read_training_data(Path(used.model.adapter)) if used.model.adapter else NOTHING
            chunks, budget = partial(prediction_groups, device=device), Budget(executor.count, deadline)
            starting = f"starting {counted(executor.count, 'worker')}{', vLLM takes minutes' * (kind == 'vllm')}"
            scheduler = Scheduler(groups, chunks, config, journal, budget)
            pages = pages_of_run(run_dir, task_set, plain)
            summary = solve(scheduler, executor, pages, deadline, console, starting)
        except KeyboardInterrupt:
            if not journal:
                raise
            if pages:
                pages.finish()
            print(
                as_called(
                    f"interrupted; the answers so far are in {run_dir}/submission.json, and bin/solve --out {run_dir}"
                    " goes on"
                ),
                file=sys.stderr,
            )
            return INTERRUPTED
    if config.adapt.joint:
        trained_on = read_training_data(Path(used.model.path))
    console.print(_picture(task_set, journal, config, trained_on, summary, needs_numbers(console)))
    return _conclude(len(chosen), journal, summary, plain)


def _conclude(tasks: int, journal: Journal, summary: dict[str, Any], say: Any) -> int:
    """The last lines, and the exit code."""
    run_dir = journal.run_dir
    say(
        f"{format_duration(summary['seconds']['whole'])}. Submission: {run_dir}/submission.json; beside it report.html"
        " with all tasks and answers, log.jsonl, tasks/ and adapters/"
    )
    cheap = sum(status.stage == "unadapted" for status in journal.statuses.values())
    if cheap:
        say(f"no time to adapt to {cheap} of {counted(tasks, 'task')}, which have the answer of the cheap pass")
    if left_out := len(journal.task_set.tasks) - tasks:
        say(f"only {tasks} of {counted(tasks + left_out, 'task')} to be solved; the others have placeholders")
    if nothing := tasks - len(journal.statuses):
        left = f"no time for {nothing} of {counted(tasks, 'task')}, which have placeholders"
        say(as_called(f"{left}; bin/solve --out {run_dir} goes on"))
    if summary["fallen_back"]:
        say(f"{status.describe_fallbacks(summary['fallen_back'], tasks)}; see {run_dir}/log.jsonl")
    return INCOMPLETE if nothing or summary["fallen_back"] else 0
