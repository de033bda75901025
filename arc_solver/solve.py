"""The main job: adapt, predict and vote for every task, and write the submission.

`runs/<name>/` holds the resolved config, `log.jsonl`, a result file for each task (candidates, timing, how adaptation
went), the adapters, and `submission.json`, which exists from the first second and is rewritten after every task.

Tasks are solved by worker processes, one for each CPU core (one for a GPU), in groups that are adapted at once. A
group's results depend on the seed and its tasks alone, so the number of workers changes nothing but the time.
"""

import json
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Task as BarTask
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from . import revote
from .adapt import Adaptation, adapt, group_by_length, planned_steps
from .adapters import Adapter, fresh_adapter, save_adapter
from .candidates import Predictions
from .config import (
    Config,
    Parser,
    UserError,
    add_task_arguments,
    first_line,
    load_config,
    named_rng,
    require_new_dir,
    run_main,
    task_overrides,
)
from .devices import keep_freed_memory
from .engine import Engine
from .engines import check_engine, engine_kind, make_engine
from .leaks import leak_audit
from .lora import with_adapter, with_start
from .memory import peak_memory
from .model import Model, checkpoint_dir, fast_dtype, load_model, pick_device
from .predict import predict_tasks
from .report import save_picture, task_picture
from .submission import Score, Submission, coverage, score, write_submission
from .tasks import Attempts, Task, TaskSet, load_tasks
from .vote import NO_ANSWER, rank, vote

log = logging.getLogger(__name__)

ADAPT_SHARE = 0.8  # of a task's time, about; only the progress bar uses it


@dataclass(frozen=True, eq=False)
class Result:
    """What solving one task gave."""

    task_id: str
    attempts: list[Attempts]
    predictions: Predictions
    seconds: float
    predicting: float  # of these seconds, those of prediction
    adaptation: dict[str, Any] | None  # see `Adaptation.to_json`
    worker: int = 0  # its process
    peak_memory_bytes: int = 0  # of that process so far
    error: str | None = None  # traceback, if solving failed; the attempts are placeholders then

    def to_json(self) -> dict[str, Any]:
        return {
            "task": self.task_id,
            "seconds": round(self.seconds, 2),
            "predicting": round(self.predicting, 2),
            "adaptation": self.adaptation,
            **self.predictions.to_json(),
            "error": self.error,
        }


OnProgress = Callable[[str, float], None]  # task id, share of its work done


@dataclass(frozen=True, eq=False)
class Worker:
    """What solves tasks: a model, its engine, and the adapter that tasks continue (None: each has a fresh one)."""

    model: Model
    engine: Engine
    start: Adapter | None
    config: Config
    run_dir: Path

    def solve(self, tasks: Sequence[Task], on_progress: OnProgress) -> list[Result]:
        """Solves tasks that are adapted at once. The same config, seed and tasks give the same results."""
        adaptations = self._adapt(tasks, on_progress) if self.config.adapt.enabled else [None] * len(tasks)
        # On a GPU, where a step waits for launches, tasks that were adapted at once are asked at once too.
        together = 1 if self.model.device.type == "cpu" else len(tasks)
        chunks = (slice(i, i + together) for i in range(0, len(tasks), together))
        return [result for chunk in chunks for result in self._predict(tasks[chunk], adaptations[chunk])]

    def _adapt(self, tasks: Sequence[Task], on_progress: OnProgress) -> list[Adaptation]:
        rngs = [named_rng(self.config.run.seed, task.id, "adapt") for task in tasks]
        done = adapt(
            tasks,
            self.model,
            self.config.adapt,
            rngs,
            self.start,
            lambda task, share: on_progress(task.id, ADAPT_SHARE * share),
        )
        for task, adaptation in zip(tasks, done, strict=True):
            save_adapter(adaptation.adapter, self.run_dir / "adapters" / task.id)
        return done

    def _predict(self, tasks: Sequence[Task], adaptations: Sequence[Adaptation | None]) -> list[Result]:
        start = time.monotonic()
        rngs = [named_rng(self.config.run.seed, task.id, "predict") for task in tasks]
        adapters = [adaptation.adapter if adaptation else None for adaptation in adaptations]
        found = predict_tasks(tasks, self.engine, adapters, self.config.predict, rngs)
        seconds = (time.monotonic() - start) / len(tasks)
        return [
            Result(
                task.id,
                vote(predictions, task, self.config.vote),
                predictions,
                seconds + (adaptation.seconds if adaptation else 0),
                seconds,
                adaptation.to_json() if adaptation else None,
                os.getpid(),
                peak_memory(self.model.device),
            )
            for task, predictions, adaptation in zip(tasks, found, adaptations, strict=True)
        ]


def solve(found: TaskSet, config: Config, run_dir: Path, console: Console) -> dict[str, Result]:
    """Solves all tasks, keeping `run_dir`, which has a folder tasks/, up to date; results by task id."""
    (run_dir / "config.json").write_text(json.dumps(config.model_dump(mode="json"), indent=1) + "\n")
    submission: Submission = {task.id: [(NO_ANSWER, NO_ANSWER)] * len(task.test) for task in found.tasks}
    write_submission(submission, run_dir / "submission.json")
    results: dict[str, Result] = {}
    tasks = {task.id: task for task in found.tasks}
    costs = {task.id: _cost(task, config) for task in found.tasks}
    done_share = dict.fromkeys(costs, 0.0)
    with _progress_bar(console) as bar, (run_dir / "log.jsonl").open("w", buffering=1) as records:
        line = bar.add_task("solving", total=sum(costs.values()), tasks_done=0, tasks=len(costs))

        def on_progress(task_id: str, share: float) -> None:
            done_share[task_id] = max(done_share[task_id], share)
            bar.update(line, completed=sum(costs[i] * done_share[i] for i in costs))

        groups = group_by_length(found.tasks, config.adapt, pick_device(config.run.device))
        longest_first = sorted(groups, key=lambda group: -sum(costs[task.id] for task in group))
        for result in map_unordered(longest_first, config, run_dir, on_progress):
            results[result.task_id] = result
            submission[result.task_id] = result.attempts
            write_submission(submission, run_dir / "submission.json")
            (run_dir / "tasks" / f"{result.task_id}.json").write_text(json.dumps(result.to_json()) + "\n")
            record = _log_record(result, tasks[result.task_id], config)
            records.write(json.dumps(record) + "\n")
            on_progress(result.task_id, 1.0)
            bar.update(line, tasks_done=len(results))
            console.print(_task_line(result, record), soft_wrap=True)
    return results


def map_unordered(
    groups: Sequence[Sequence[Task]], config: Config, run_dir: Path, on_progress: OnProgress
) -> Iterator[Result]:
    """Solves groups of tasks in worker processes, or in this one if there is but one; yields results as they come."""
    workers = _worker_count(config, len(groups))
    if workers == 1:
        threads = torch.get_num_threads()
        try:
            worker = _make_worker(config, run_dir)
            for group in groups:
                yield from _solve_safely(worker, group, on_progress)
        finally:
            torch.set_num_threads(threads)
        return
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    pool = ProcessPoolExecutor(workers, context, _start_process, (config, run_dir, queue))
    try:
        on_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which processes that are started now inherit
        pending = {pool.submit(_solve_in_process, group) for group in groups}
        signal.signal(signal.SIGINT, on_interrupt)
        while pending:
            finished, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
            while not queue.empty():
                on_progress(*queue.get())
            for future in finished:
                yield from future.result()
    finally:
        if pending:  # interrupted: nobody waits for these any more
            for process in multiprocessing.active_children():
                process.terminate()
        pool.shutdown(cancel_futures=True)


_process: dict[str, Any] = {}  # what a worker process keeps between groups


def _start_process(config: Config, run_dir: Path, queue: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _process.update(worker=_make_worker(config, run_dir), queue=queue)


def _solve_in_process(group: Sequence[Task]) -> list[Result]:
    return _solve_safely(_process["worker"], group, lambda task_id, share: _process["queue"].put((task_id, share)))


def _solve_safely(worker: Worker, group: Sequence[Task], on_progress: OnProgress) -> list[Result]:
    """Failure is an answer: the traceback comes back as a value, with placeholders.

    A group that fails is halved, and each half tried again: memory may then suffice, and one bad task spoils no other.
    """
    start = time.monotonic()
    try:
        return worker.solve(group, on_progress)
    except Exception as error:
        if len(group) > 1:
            ids = ", ".join(task.id for task in group)
            log.warning("solving %s at once failed, trying each half: %s", ids, first_line(error))
            halves = group[: len(group) // 2], group[len(group) // 2 :]
            return [result for half in halves for result in _solve_safely(worker, half, on_progress)]
        (task,) = group
        blank: list[Attempts] = [(NO_ANSWER, NO_ANSWER)] * len(task.test)
        seconds = time.monotonic() - start
        return [Result(task.id, blank, Predictions((), ()), seconds, 0.0, None, error=traceback.format_exc())]


def _make_worker(config: Config, run_dir: Path) -> Worker:
    device = pick_device(config.run.device)
    if device.type == "cpu":
        torch.set_num_threads(1)  # one core a worker; and results then depend on no thread count
        keep_freed_memory(256 << 20)
    model, start = _load(config, device)
    return Worker(model, make_engine(model, start, config), start, config, run_dir)


def _load(config: Config, device: torch.device) -> tuple[Model, Adapter | None]:
    """The checkpoint that all adapters of a run are for, and the adapter that they continue, if any.

    The adapter of the config is that one, or is merged into the weights.
    """
    model = load_model(config.model.path, device, fast_dtype(device))
    base_dir = checkpoint_dir(config.model.path)
    if not (config.adapt.enabled and config.adapt.start == "pretrained"):
        return with_adapter(model, config.model.adapter, base_dir), None
    if not config.model.adapter:
        raise UserError('adapt.start="pretrained" continues an adapter: give its folder as model.adapter')
    return with_start(model, Path(config.model.adapter), base_dir)


def _end_with_parent() -> None:
    """A killed main process must not leave workers behind: they would wait for tasks for ever."""
    parent = multiprocessing.parent_process()
    assert parent
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _worker_count(config: Config, tasks: int) -> int:
    if pick_device(config.run.device).type == "cuda" or config.engine.kind == "vllm":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(config.run.workers or cores, tasks))


def _cost(task: Task, config: Config) -> float:
    """Work of a task in tokens, a token of training counted three times; for order and progress only."""
    training = planned_steps(task, config.adapt) * config.adapt.batch_size * min(task.tokens, config.adapt.max_tokens)
    asking = config.predict.views * len(task.test) * task.tokens
    return 3 * training * config.adapt.enabled + asking


# ---- what the user sees --------------------------------------------------------------------------------------------


class _TimeLeft(ProgressColumn):
    """ETA from the share of the work that is done, which is known from the first training step on."""

    def render(self, task: BarTask) -> Text:
        if not task.completed or task.elapsed is None or not task.total:
            return Text("ETA -:--")
        left = int(task.elapsed * (task.total - task.completed) / task.completed)
        return Text(f"ETA {left // 60}:{left % 60:02d}")


def _progress_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description} {task.fields[tasks_done]}/{task.fields[tasks]}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%"),
        TimeElapsedColumn(),
        _TimeLeft(),
        console=console,
    )


def _log_record(result: Result, task: Task, config: Config) -> dict[str, Any]:
    ranked = [rank(result.predictions, task, test, config.vote) for test in range(len(task.test))]
    return {
        "task": result.task_id,
        "seconds": round(result.seconds, 2),
        "adaptation": result.adaptation,
        "distinct": [len(r) for r in ranked],
        "votes": [[entry.votes for entry in r[:2]] for r in ranked],
        "dropped": result.predictions.dropped,
        "too_long": result.predictions.too_long,
        "capped": result.predictions.capped,
        "predicting": round(result.predicting, 2),
        "cost": dict(result.predictions.cost),
        "worker": result.worker,
        "peak_memory_bytes": result.peak_memory_bytes,
        "error": result.error,
    }


def _task_line(result: Result, record: dict[str, Any]) -> str:
    if result.error:
        last = escape(result.error.splitlines()[-1])
        return f"[red]{result.task_id} failed after {result.seconds:.0f} s:[/red] {last}"
    parts = [f"{result.task_id}  {result.seconds:4.0f} s"]
    if learnt := result.adaptation:
        parts.append(f"loss {learnt['first_loss']:.3f} to {learnt['last_loss']:.3f}{_ENDS[learnt['ended']]}")
        if learnt["dropped"]:
            parts.append(f"samples lost up to {_count(learnt['dropped'], 'demonstration')}")
    parts.append(
        "; ".join(
            f"attempts with {' and '.join(map(str, votes))} votes, of {_count(distinct, 'distinct answer')}"
            for votes, distinct in zip(record["votes"], record["distinct"], strict=True)
        )
    )
    cost = record["cost"]
    parts.append(f"{cost['forward_steps']} forward steps")
    if cost["drafted"]:
        parts.append(f"{cost['accepted']} of {cost['decoded']} ids from drafts")
    if record["dropped"]:
        parts.append(f"prompts lost up to {_count(record['dropped'], 'demonstration')}")
    if record["too_long"]:
        parts.append(f"{_count(record['too_long'], 'prompt')} too long for the model, whose replies may be cut")
    if record["capped"]:
        parts.append(f"search cut in {_count(record['capped'], 'view')}")
    return ", ".join(parts)


_ENDS = {
    "steps": "",
    "leave-one-out": ", stopped early",
    "diverged": ", [red]diverged[/red]: the adapter is what it started as",
}


def _results(
    found: TaskSet, results: dict[str, Result], config: Config, model: Model
) -> tuple[Group, Score | None, Score | None]:
    """Some tasks drawn; the score with all that it must be read with; coverage. No score without known solutions."""
    shown: list[RenderableType] = []
    attempts = {i: result.attempts for i, result in results.items()}
    if not found.solutions:
        return Group(*(task_picture(t, attempts[t.id], None) for t in found.tasks[: config.run.show])), None, None
    tasks = {task.id: task for task in found.tasks}
    result = score(attempts, found.solutions)
    for title, is_wanted in (("Solved", lambda share: share == 1), ("Not solved", lambda share: share < 1)):
        ids = [i for i, share in result.per_task.items() if is_wanted(share)]
        if ids and config.run.show:
            shown.append(Rule(f"{title}: {min(len(ids), config.run.show)} of {len(ids)}"))
            shown += [task_picture(tasks[i], attempts[i], found.solutions[i]) for i in ids[: config.run.show]]
    title = escape(f"{found.name}, {_count(len(result.per_task), 'task')}, seed {config.run.seed}")
    table = Table(title=title, show_header=False)
    table.add_row("tasks solved", f"{result.tasks_solved} of {len(result.per_task)}")
    table.add_row("test outputs solved, two attempts", f"{result.outputs_solved} of {result.outputs}")
    covered = coverage({i: r.predictions for i, r in results.items()}, found.solutions)
    table.add_row("right answer among the candidates", f"{covered.outputs_solved} of {covered.outputs}")
    table.add_row("share of test outputs (Kaggle's score)", f"{result.share_of_outputs:.1%}")
    table.add_row("mean over tasks (ARC Prize's score)", f"{result.mean_over_tasks:.1%}")
    if unscored := len(found.tasks) - len(result.per_task):
        table.add_row("tasks without a known solution, not scored", str(unscored))
    shown.append(table)
    unknown = "no leak audit: this checkpoint does not say what it was trained on"
    shown.append(Text(str(leak_audit(model.trained_on, found)) if model.trained_on else unknown))
    return Group(*shown), result, covered


def _make_run_dir(run_dir: Path) -> None:
    require_new_dir(run_dir)
    try:
        (run_dir / "tasks").mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{run_dir} cannot be made ({error.strerror}): give another --out") from None


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def default_run_dir(found: TaskSet) -> Path:
    """runs/<tasks>-<time>, one that does not exist yet."""
    name = f"{Path(found.name).stem if Path(found.name).exists() else found.name.replace('/', '-')}"
    stem = Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    candidate, n = stem, 1
    while candidate.exists():
        n += 1
        candidate = stem.with_name(f"{stem.name}-{n}")
    return candidate


def main(arguments: list[str]) -> int:
    if any(word.partition("=")[0] == "--revote" for word in arguments):
        return revote.main(arguments)
    parser = Parser(prog="bin/solve", description="Solve ARC tasks and write submission.json.")
    parser.add_argument("config", nargs="?", help="TOML file; without it, the defaults and the demo set")
    add_task_arguments(parser)
    parser.add_argument("--out", type=Path, metavar="RUN_DIR", help="a new folder; default runs/<tasks>-<time>")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--revote", metavar="RUN_DIR", help="only select again in finished runs; --revote --help")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args(arguments)
    overrides = list(args.overrides)
    if args.config and "=" in args.config and not Path(args.config).exists():
        overrides, args.config = [args.config, *overrides], None
    seed = [] if args.seed is None else [f"run.seed={args.seed}"]
    config = load_config(args.config, [*overrides, *task_overrides(args), *seed])

    console = Console()
    found = load_tasks(config.tasks)
    run_dir = args.out or default_run_dir(found)
    device = pick_device(config.run.device)
    model, start_adapter = _load(config, device)
    if config.adapt.enabled and not start_adapter:
        fresh_adapter(model, config.adapt, named_rng(0))  # refuses targets that the model lacks before any work is done
    config = config.model_copy(update={"format": model.format})  # the checkpoint's, whatever the config says
    groups = group_by_length(found.tasks, config.adapt, device)
    workers = _worker_count(config, len(groups))
    kind, why = engine_kind(model, config)
    check_engine(model, config)
    _make_run_dir(run_dir)
    plain = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    plain(
        f"{_count(len(found.tasks), 'task')} from {found.name}; model of {model.parameters_count:,} parameters on"
        f" {device}, {_count(workers, 'worker')}; engine {kind} ({why}); run directory {run_dir}"
    )
    start = time.monotonic()
    try:
        results = solve(found, config, run_dir, console)
    except KeyboardInterrupt:
        print(f"interrupted; the answers so far are in {run_dir}/submission.json", file=sys.stderr)
        return 1
    minutes = (time.monotonic() - start) / 60
    shown, final, covered = _results(found, results, config, model)
    failed = [i for i, result in results.items() if result.error]
    summary = {
        "minutes": round(minutes, 2),
        "failed": failed,
        "score": final and final.to_json(),
        "coverage": covered and covered.to_json(),
    }
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    save_picture(shown, run_dir / "report.svg", "bin/solve")
    console.print(shown)
    plain(
        f"{minutes:.1f} minutes. Submission: {run_dir}/submission.json; beside it report.svg, log.jsonl, tasks/ and"
        " adapters/"
    )
    if failed:
        plain(f"{len(failed)} of {len(results)} tasks failed: {', '.join(failed)}; see {run_dir}/tasks")
    return 1 if failed else 0


if __name__ == "__main__":
    run_main(main)
