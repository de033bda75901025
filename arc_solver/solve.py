"""The main job: adapt, predict and vote for every task, and write the submission.

`runs/<name>/` holds the resolved config, `log.jsonl`, a result file for each task (candidates, timing, how adaptation
went), the adapters, and `submission.json`, which exists from the first second and is rewritten after every task.

Tasks are solved by worker processes, one for each CPU core (one for a GPU). A task's result depends on the seed and
the task alone, so their number and order change nothing but the time.
"""

import json
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
from .adapt import adapt, planned_steps
from .adapters import fresh_adapter, save_adapter
from .config import (
    Config,
    Parser,
    UserError,
    add_task_arguments,
    load_config,
    named_rng,
    require_new_dir,
    run_main,
    task_overrides,
)
from .engine import TorchEngine
from .leaks import leak_audit
from .lora import with_adapter
from .model import BUNDLED_DIR, Model, fast_dtype, load_model, pick_device
from .predict import Candidate, predict
from .report import save_picture, task_picture
from .submission import Score, Submission, score, write_submission
from .tasks import Attempts, Task, TaskSet, load_tasks
from .vote import NO_ANSWER, rank, vote

ADAPT_SHARE = 0.8  # of a task's time, about; only the progress bar uses it


@dataclass(frozen=True, eq=False)
class Result:
    """What solving one task gave."""

    task_id: str
    attempts: list[Attempts]
    candidates: list[Candidate]
    seconds: float
    adaptation: dict[str, float] | None  # steps, tokens, first_loss, last_loss, seconds
    error: str | None = None  # traceback, if solving failed; the attempts are placeholders then

    def to_json(self) -> dict[str, Any]:
        return {
            "task": self.task_id,
            "seconds": round(self.seconds, 2),
            "adaptation": self.adaptation,
            "candidates": [candidate.to_json() for candidate in self.candidates],
            "error": self.error,
        }


OnProgress = Callable[[str, float], None]  # task id, share of its work done


def solve_task(task: Task, engine: TorchEngine, config: Config, run_dir: Path, on_progress: OnProgress) -> Result:
    """Solves one task. The same config and seed give the same result, whatever ran before."""
    start = time.monotonic()
    rng = partial(named_rng, config.run.seed, task.id)  # rng("adapt") is the same whatever ran before
    adapter, adaptation = None, None
    if config.adapt.enabled:
        steps = planned_steps(task, config.adapt)
        done = adapt(
            task, engine.model, config.adapt, rng("adapt"), lambda s: on_progress(task.id, ADAPT_SHARE * s.step / steps)
        )
        adapter = done.adapter
        save_adapter(adapter, run_dir / "adapters" / task.id)
        adaptation = {
            "steps": done.steps,
            "tokens": done.tokens,
            "first_loss": round(done.first_loss, 4),
            "last_loss": round(done.last_loss, 4),
            "seconds": round(done.seconds, 2),
        }
    candidates = predict(task, engine, adapter, config.predict, rng("predict"))
    attempts = vote(candidates, len(task.test), config.vote)
    return Result(task.id, attempts, candidates, time.monotonic() - start, adaptation)


def solve(found: TaskSet, config: Config, run_dir: Path, console: Console) -> dict[str, Result]:
    """Solves all tasks, keeping `run_dir`, which has a folder tasks/, up to date; results by task id."""
    (run_dir / "config.json").write_text(json.dumps(config.model_dump(mode="json"), indent=1) + "\n")
    submission: Submission = {task.id: [(NO_ANSWER, NO_ANSWER)] * len(task.test) for task in found.tasks}
    write_submission(submission, run_dir / "submission.json")
    results: dict[str, Result] = {}
    costs = {task.id: _cost(task, config) for task in found.tasks}
    done_share = dict.fromkeys(costs, 0.0)
    with _progress_bar(console) as bar, (run_dir / "log.jsonl").open("w", buffering=1) as log:
        line = bar.add_task("solving", total=sum(costs.values()), tasks_done=0, tasks=len(costs))

        def on_progress(task_id: str, share: float) -> None:
            done_share[task_id] = max(done_share[task_id], share)
            bar.update(line, completed=sum(costs[i] * done_share[i] for i in costs))

        longest_first = sorted(found.tasks, key=lambda task: (-costs[task.id], task.id))
        for result in map_unordered(longest_first, config, run_dir, on_progress):
            results[result.task_id] = result
            submission[result.task_id] = result.attempts
            write_submission(submission, run_dir / "submission.json")
            (run_dir / "tasks" / f"{result.task_id}.json").write_text(json.dumps(result.to_json()) + "\n")
            record = _log_record(result, config)
            log.write(json.dumps(record) + "\n")
            on_progress(result.task_id, 1.0)
            bar.update(line, tasks_done=len(results))
            console.print(_task_line(result, record))
    return results


def map_unordered(tasks: Sequence[Task], config: Config, run_dir: Path, on_progress: OnProgress) -> Iterator[Result]:
    """Solves tasks in worker processes, or in this one if there is but one worker; yields results as they come."""
    workers = _worker_count(config, len(tasks))
    if workers == 1:
        threads = torch.get_num_threads()
        try:
            _start_worker(config, run_dir, None)
            for task in tasks:
                yield _solve_safely(task, on_progress)
        finally:
            torch.set_num_threads(threads)
        return
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    pool = ProcessPoolExecutor(workers, context, _start_worker, (config, run_dir, queue))
    try:
        pending = {pool.submit(_solve_safely, task) for task in tasks}
        while pending:
            finished, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
            while not queue.empty():
                on_progress(*queue.get())
            for future in finished:
                yield future.result()
    finally:
        if pending:  # interrupted: nobody waits for these any more
            for process in multiprocessing.active_children():
                process.terminate()
        pool.shutdown(cancel_futures=True)


_worker: dict[str, Any] = {}  # what a worker process keeps between tasks


def _start_worker(config: Config, run_dir: Path, queue: Any) -> None:
    device = pick_device(config.run.device)
    if device.type == "cpu":
        torch.set_num_threads(1)  # one core a worker; and results then depend on no thread count
    if queue is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle
        threading.Thread(target=_end_with_parent, daemon=True).start()
    model = _load(config, device)
    _worker.update(engine=TorchEngine(model, config.predict.batch_tokens), config=config, run_dir=run_dir, queue=queue)


def _load(config: Config, device: torch.device) -> Model:
    """What all adapters of a run are made for: the checkpoint, with the adapter of the config merged in, if any."""
    model = load_model(config.model.path, device, fast_dtype(device))
    return with_adapter(model, config.model.adapter, Path(config.model.path) if config.model.path else BUNDLED_DIR)


def _end_with_parent() -> None:
    """A killed main process must not leave workers behind: they would wait for tasks for ever."""
    parent = multiprocessing.parent_process()
    assert parent
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _solve_safely(task: Task, on_progress: OnProgress | None = None) -> Result:
    """Failure is an answer: the traceback comes back as a value, with placeholders."""
    report = on_progress or (lambda task_id, share: _worker["queue"].put((task_id, share)))
    start = time.monotonic()
    try:
        return solve_task(task, _worker["engine"], _worker["config"], _worker["run_dir"], report)
    except Exception:
        blank: list[Attempts] = [(NO_ANSWER, NO_ANSWER)] * len(task.test)
        return Result(task.id, blank, [], time.monotonic() - start, None, traceback.format_exc())


def _worker_count(config: Config, tasks: int) -> int:
    if pick_device(config.run.device).type == "cuda":
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


def _log_record(result: Result, config: Config) -> dict[str, Any]:
    ranked = [rank([c for c in result.candidates if c.test == t], config.vote) for t in range(len(result.attempts))]
    return {
        "task": result.task_id,
        "seconds": round(result.seconds, 2),
        "adaptation": result.adaptation,
        "candidates": len(result.candidates),
        "distinct": [len(r) for r in ranked],
        "votes": [[entry.votes for entry in r[:2]] for r in ranked],
        "error": result.error,
    }


def _task_line(result: Result, record: dict[str, Any]) -> str:
    if result.error:
        last = escape(result.error.splitlines()[-1])
        return f"[red]{result.task_id} failed after {result.seconds:.0f} s:[/red] {last}"
    votes = "; ".join(
        f"votes {' and '.join(map(str, v))} of {d} distinct"
        for v, d in zip(record["votes"], record["distinct"], strict=True)
    )
    loss = (
        f", loss {result.adaptation['first_loss']:.3f} to {result.adaptation['last_loss']:.3f}"
        if result.adaptation
        else ""
    )
    return f"{result.task_id}  {result.seconds:4.0f} s  {record['candidates']} candidates{loss}, {votes}"


def _results(found: TaskSet, results: dict[str, Result], config: Config, model: Model) -> tuple[Group, Score | None]:
    """Some tasks drawn, and the score with all that it must be read with; no score without known solutions."""
    shown: list[RenderableType] = []
    attempts = {i: result.attempts for i, result in results.items()}
    if not found.solutions:
        return Group(*(task_picture(t, attempts[t.id], None) for t in found.tasks[: config.run.show])), None
    tasks = {task.id: task for task in found.tasks}
    result = score(attempts, found.solutions)
    for title, is_wanted in (("Solved", lambda share: share == 1), ("Not solved", lambda share: share < 1)):
        ids = [i for i, share in result.per_task.items() if is_wanted(share)]
        if ids and config.run.show:
            shown.append(Rule(f"{title}: {min(len(ids), config.run.show)} of {len(ids)}"))
            shown += [task_picture(tasks[i], attempts[i], found.solutions[i]) for i in ids[: config.run.show]]
    title = escape(f"{found.name}, {len(result.per_task)} tasks, seed {config.run.seed}")
    table = Table(title=title, show_header=False)
    table.add_row("tasks solved", f"{result.tasks_solved} of {len(result.per_task)}")
    table.add_row("test outputs solved, two attempts", f"{result.outputs_solved} of {result.outputs}")
    table.add_row("share of test outputs (Kaggle's score)", f"{result.share_of_outputs:.1%}")
    table.add_row("mean over tasks (ARC Prize's score)", f"{result.mean_over_tasks:.1%}")
    if unscored := len(found.tasks) - len(result.per_task):
        table.add_row("tasks without a known solution, not scored", str(unscored))
    shown.append(table)
    unknown = "no leak audit: this checkpoint does not say what it was trained on"
    shown.append(Text(str(leak_audit(model.trained_on, found)) if model.trained_on else unknown))
    return Group(*shown), result


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
    model = _load(config, device)
    if config.adapt.enabled:
        fresh_adapter(model, config.adapt, named_rng(0))  # refuses targets that the model lacks before any work is done
    config = config.model_copy(update={"format": model.format})  # the checkpoint's, whatever the config says
    workers = _worker_count(config, len(found.tasks))
    _make_run_dir(run_dir)
    plain = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    plain(
        f"{_count(len(found.tasks), 'task')} from {found.name}; model of {model.parameters_count:,} parameters on"
        f" {device}, {_count(workers, 'worker')}; run directory {run_dir}"
    )
    start = time.monotonic()
    try:
        results = solve(found, config, run_dir, console)
    except KeyboardInterrupt:
        print(f"interrupted; the answers so far are in {run_dir}/submission.json", file=sys.stderr)
        return 1
    minutes = (time.monotonic() - start) / 60
    shown, final = _results(found, results, config, model)
    failed = [i for i, result in results.items() if result.error]
    summary = {"minutes": round(minutes, 2), "failed": failed, "score": final.to_json() if final else None}
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    save_picture(shown, run_dir / "report.svg", "bin/solve")
    console.print(shown)
    plain(
        f"{minutes:.1f} minutes. Submission: {run_dir}/submission.json; beside it report.svg, candidates, adapters, log"
    )
    if failed:
        plain(f"{len(failed)} of {len(results)} tasks failed: {', '.join(failed)}; see {run_dir}/tasks")
    return 1 if failed else 0


if __name__ == "__main__":
    run_main(main)
