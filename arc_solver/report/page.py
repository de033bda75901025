"""Values -> one page of HTML that needs nothing besides: no server, no network.

The texts of tasks and settings are data: Jinja escapes what goes into HTML, and each task's JSON stands in a script
element of its own, in which no `<` is left. The page's policy lets no other script run, and loads nothing.
"""

import base64
import hashlib
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from .. import __version__
from ..answers import STAGES, data_rows, score_of
from ..charts import line_chart
from ..clock import format_clock, format_duration, format_guess
from ..command import as_called
from ..errors import counted, few
from .collect import NO_PART, STATES, RunFacts, Session, TaskFacts
from .compare import OUTCOMES, Beside, Comparison
from .reasons import KINDS
from .training import TrainingFacts

HERE = Path(__file__).parent
SYMBOLS = {
    "solved": "✓",
    "covered": "◐",
    "missed": "✗",
    "fell-back": "↯",
    "answered": "●",
    "damaged": "!",
    "waiting": "○",
}
COLUMNS = (  # of the table, and what each says
    ("task", "its id"),
    ("state", "what became of it"),
    ("outputs", "test outputs that are solved"),
    ("wrong cells", "of the better attempt; of several test outputs, of all together"),
    ("votes", "views that gave the first attempt; of several test inputs, the fewest"),
    ("candidates", "distinct answers"),
    ("leave-one-out", "held-out outputs that were answered exactly before they were learnt"),
    ("loss", "over the last tenth of the steps, nats a token"),
    ("seconds", "of one worker, adapting and asking"),
    ("tokens", "of the task"),
    ("why", "the first of the reasons"),
)
COMPARED = (  # of the table of two runs
    ("task", "its id"),
    ("solved", "by which of the two"),
    ("A", "test outputs that A solves"),
    ("B", "test outputs that B solves"),
    ("votes, A", "views of A that gave its first attempt"),
    ("votes, B", "views of B that gave its first attempt"),
    ("tokens", "of the task"),
    ("why not A", "the first of the reasons"),
    ("why not B", "the first of the reasons"),
)
OUTCOME_SYMBOLS = {"first": "A", "second": "B", "both": "✓", "neither": "✗"}
SCORES = (("pass@1", "first"), ("pass@2, the score", "solved"), ("coverage", "covered"))  # and the field of a task
AUDIT_CLASSES = {True: "passed", False: "failed", None: "unknown"}
ABOUT_TRAINING = {  # of a training's own record, what is said and how
    "machine": "machine",
    "processes": "processes",
    "commit": "commit",
    "arc_solver": "arc_solver",
    "torch": "PyTorch",
    "seed": "seed",
    "began_with": "began with",
    "held_out": "held-out tasks",
    "left_out": "tasks that the audit left out",
}
EVERY_S = 10.0  # between two pages of what goes on, at least
LEAST_FIRST = ("task", "state", "wrong cells")  # columns that are sorted from their least value when they are chosen
LOG_FROM = 4.0  # times the smallest loss of a curve is the largest: then its axis is logarithmic
TICKS = 6  # of a time axis, about


def run_page(run: RunFacts, every_s: float = EVERY_S) -> str:
    """The page of a run. `every_s`: while it goes on, there is a new one after that many seconds, at most."""
    about = [counted(len(run.tasks), "task") + (f", {chosen}" if (chosen := run.task_set.chosen) else "")]
    about += [f"seed {run.settings.get('run.seed', '?')}", f"run {run.name}"]
    missed = [task for task in run.scored if task.reasons]
    return _render(
        "run.html",
        title=_title(run.task_set.name),
        tab=_tab(run),
        kicker="a run of bin/solve",
        about=" · ".join(about),
        running=_running(every_s if run.is_running else None),
        progress=_progress(run),
        warnings=warnings_of(run),
        headline=_headline(run),
        top_figures=_top_figures(run),
        kinds=_kinds(missed),
        missed=counted(len(missed), "task"),
        states=_states(run),
        columns=[{"title": title, "says": says, "least": title in LEAST_FIRST} for title, says in COLUMNS],
        rows=[_row(task) for task in run.tasks],
        sessions=[_timeline(session) for session in run.sessions if session.jobs],
        has_deadline=any(session.deadline for session in run.sessions),
        has_failed=any(job.failed for session in run.sessions for job in session.jobs),
        audit=run.audit[1],
        audit_class=AUDIT_CLASSES[run.audit[0]],
        facts=_facts(run),
        unusual=[(key, _said(value), _said(usual)) for key, (value, usual) in run.unusual.items()],
        settings=[(key, _said(value)) for key, value in run.settings.items() if not key.startswith(NO_PART)],
        data=[in_script(task.text) for task in run.tasks],
    )


def comparison_page(both: Comparison, links: Sequence[str] = ("", "")) -> str:
    """The page of two runs beside each other. `links`: addresses of their own pages; "": there is none."""
    first, second = both.first, both.second
    outcomes = Counter(beside.outcome for beside in both.tasks)
    about = [f"{counted(len(both.tasks), 'task')} that both have, of {_title(first.task_set.name)}"]
    if both.left_out:
        about.append(f"{both.left_out} left out: in one of them only, other grids, or no known solution")
    return _render(
        "comparison.html",
        title=f"{first.name} and {second.name}",
        kicker="two runs of bin/solve",
        about=" · ".join(about),
        running=None,
        scores=_scores_beside(both),
        verdict=_verdict(both),
        states=[
            {
                "state": outcome,
                "title": f"solved {title}",
                "symbol": OUTCOME_SYMBOLS[outcome],
                "count": outcomes[outcome],
            }
            for outcome, title in OUTCOMES.items()
            if outcomes[outcome]
        ],
        columns=[{"title": title, "says": says} for title, says in COMPARED],
        rows=[_row_beside(beside) for beside in both.tasks],
        settings=[(name, *("–" if v is None else _said(v) for v in pair)) for name, *pair in both.settings],
        runs=[
            {
                "letter": letter,
                "name": run.name,
                "link": link,
                "audit": run.audit[1],
                "audit_class": AUDIT_CLASSES[run.audit[0]],
                "facts": _facts(run),
            }
            for letter, run, link in zip("AB", (first, second), links, strict=True)
        ],
        data=[in_script(beside.text) for beside in both.tasks],
    )


def training_page(training: TrainingFacts, every_s: float | None = None) -> str:
    """The page of a training. `every_s`: seconds until the next one, at most; None: there will be none."""
    about = training.about
    losses = {"training, smoothed": training.loss}
    losses |= {"held-out tasks": training.validation} if training.validation[0] else {}
    values = [value for _, curve in losses.values() for value in curve]
    charts = [("Loss", losses, "million tokens", "loss, nats a token", max(values) > LOG_FROM * min(values))]
    charts.append(("Learning rate", {"learning rate": training.rate}, "step", "learning rate (train.lr)", False))
    if training.accuracy[0]:
        generated = {"generated": training.accuracy}
        charts.append(("Generated answers that are right", generated, "million tokens", "share of the answers", False))
    if training.speed[0]:
        charts.append(("Speed", {"speed": training.speed}, "million tokens", "tokens/s", False))
    audit = about.get("leak_audit", "")
    return _render(
        "training.html",
        title=training.name,
        kicker="a training of bin/train",
        about=_how_it_ended(training, goes_on=every_s is not None),
        running=_running(every_s),
        top_figures=_top_figures_of_training(training),
        charts=[{"title": title, "svg": Markup(line_chart(lines, x, y, log))} for title, lines, x, y, log in charts],
        columns=("source", "samples", "share of samples", "tokens", "demonstrations dropped", "too long", "left out"),
        sources=_source_rows(training.sources),
        counted_until=f"step {about.get('steps', about.get('total_steps', 0)):,}",
        audit=audit,
        audit_class="passed" if audit.startswith("leak audit passed") else "failed",
        facts=_facts_of_training(about),
        unusual=[(key, _said(value), _said(usual)) for key, (value, usual) in training.unusual.items()],
        settings=[(key, _said(value)) for key, value in training.settings.items()],
    )


def _running(every_s: float | None) -> dict[str, str] | None:
    """When a page was written and the next one is due, so that it can tell if nothing comes any more."""
    return None if every_s is None else {"at": f"{time.time():.0f}", "every": f"{every_s:.0f}"}


def _render(template: str, **values: Any) -> str:
    script = (HERE / "page.js").read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        _environment()
        .get_template(template)
        .render(
            version=__version__,
            style=Markup((HERE / "page.css").read_text()),
            script=Markup(script),
            script_hash=f"sha256-{digest}",
            **values,
        )
    )


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(HERE / "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )


def in_script(text: str) -> Markup:
    """JSON as the content of a script element, which nothing in it can end."""
    return Markup(text.replace("<", "\\u003c"))


# ---- what stands at the top ----


def warnings_of(run: RunFacts) -> list[str]:
    """What must be known of a run before its score: that it is not finished, and what of it cannot be read."""
    said, goes_on = [], as_called(f"bin/solve --out {run.folder}")
    cheap = sum(task.stage == "unadapted" for task in run.wanted)
    left = sum(task.state == "waiting" for task in run.wanted)
    if (left or cheap) and not run.is_running:
        of = f"{sum(bool(task.candidates) for task in run.wanted)} of {counted(len(run.wanted), 'task')} answered"
        how = f", {cheap} of them by the cheap pass, without adaptation" if cheap else ""
        said.append(f"not finished: {of}{how}, and no process works on it; {goes_on} goes on")
    if run.damaged:
        files = f"{counted(len(run.damaged), 'file')} cannot be read ({few(run.damaged)})"
        said.append(f"{files}, and what they said is missing here; {goes_on} solves those tasks again")
    return said


def _tab(run: RunFacts) -> str:
    """The title of the browser's tab."""
    score = run.score("solved")
    if not (score and run.answered):
        return f"{run.name}: {run.answered} of {len(run.tasks)} answered"
    return f"{run.name}: {score.tasks_solved} of {len(score.per_task)} solved"


def _headline(run: RunFacts) -> dict[str, str] | None:
    """The score with its interval, as shares from 0% to 100%; None: no solution is known."""
    solved, first, covered = (run.score(which) for which in ("solved", "first", "covered"))
    if not (solved and first and covered and run.answered):
        return None
    content = solved.to_json()
    low, high = content["share_of_tasks_wilson_95"]
    partial = len(run.scored) < len(run.tasks)
    return {
        "solved": f"{solved.tasks_solved}",
        "tasks": counted(content["tasks"], "task"),
        "of": "" if not partial else ", of those answered so far" if run.is_running else ", of those answered",
        "share": f"{content['share_of_tasks']:.1%}",
        "low": f"{low:.1%}",
        "high": f"{high:.1%}",
        "rest": f"{1 - high:.1%}",
        "first": f"{first.to_json()['share_of_tasks']:.1%}",
        "covered": f"{covered.to_json()['share_of_tasks']:.1%}",
    }


def _progress(run: RunFacts) -> str:
    """How far a run is that goes on."""
    share = run.summary.get("share_done")
    done = "" if share is None else f", {share:.0%} of the work done"
    return f"{run.answered} of {counted(len(run.tasks), 'task')} answered{done}"


def _top_figures(run: RunFacts) -> list[tuple[str, str]]:
    rows = []
    for name, which in SCORES:
        if score := run.score(which):
            outputs = f"{score.outputs_solved} of {counted(score.outputs, 'output')}"
            rows.append((name, f"{counted(score.tasks_solved, 'task')}, {outputs}"))
            if which == "solved":
                rows.append(("share of outputs (Kaggle's score)", f"{score.share_of_outputs:.1%}"))
                rows.append(("mean over tasks (ARC Prize's score)", f"{score.mean_over_tasks:.1%}"))
    if len(run.scored) < len(run.tasks) and (score := run.score("solved", of_all=True)):
        of = f"{score.tasks_solved} of {counted(len(score.per_task), 'task')}"
        rows.append(("with those without an answer as not solved", f"{of}, {score.share_of_outputs:.1%} of outputs"))
    summary = run.summary
    if expected := summary.get("expected"):
        says = f"{counted(round(expected[0]), 'task')}, {expected[1]:.0f} to {expected[2]:.0f}"
        rows.append(("expected without knowing solutions", says))
    rows.append(("answered", f"{run.answered} of {counted(len(run.tasks), 'task')}"))
    adapted = sum(bool(task.adaptation) for task in run.tasks)
    if adapted < len(run.wanted) and run.settings.get("adapt.enabled", True):
        rows.append(("adapted to", f"{adapted} of {counted(len(run.wanted), 'task')}"))
    if len(run.wanted) < len(run.tasks):
        rows.append(("to be solved (run.smoke)", f"{counted(len(run.wanted), 'task')}, the smallest"))
    if times := summary.get("seconds_per_task"):
        rows.append(
            ("time per task, of one worker", f"median {times['median']:.0f} s, longest {times['longest']:.0f} s")
        )
    if seconds := summary.get("seconds"):
        rows.append(("time", format_duration(seconds["whole"])))
    return rows


def _kinds(missed: Sequence[TaskFacts]) -> list[dict[str, Any]]:
    """Why tasks were not solved: how many are counted by each kind of reason, and of how many it holds."""
    main = Counter(task.main_reason for task in missed)
    held = Counter(kind for task in missed for kind in {reason.kind for reason in task.reasons})
    kinds = [
        {"kind": kind, "title": title, "count": main[kind], "held": held[kind]}
        for kind, title in KINDS.items()
        if main[kind]
    ]
    return sorted(kinds, key=lambda kind: -kind["count"])


def _states(run: RunFacts) -> list[dict[str, Any]]:
    counts = Counter(task.state for task in run.tasks)
    return [
        {"state": state, "title": title, "symbol": SYMBOLS[state], "count": counts[state]}
        for state, title in STATES.items()
        if counts[state]
    ]


# ---- tasks ----


def _row(task: TaskFacts) -> dict[str, Any]:
    """A task as a row of the table; each cell has a value to sort by, "" where it is not known."""
    learnt, state = task.adaptation or {}, task.state
    outputs, loss = len(task.task.test), learnt.get("last_loss")
    is_judged = task.solution is not None and task.predictions is not None
    leave_one_out = learnt.get("leave_one_out")
    why = task.main_reason if task.predictions else ""  # to wait is no reason
    title = STATES[state] + ("" if state != "solved" or not task.fallback else ", fell back")
    cells = (
        (task.task.id, task.task.id),
        (list(STATES).index(state), title),
        (sum(task.solved), f"{sum(task.solved)} of {outputs}") if is_judged else ("", f"{outputs}"),
        _wrong_cells_cell(task),
        _votes_cell(task),
        (task.candidates, f"{task.candidates}"),
        ("", "–") if leave_one_out is None else (leave_one_out, f"{leave_one_out:.0%}"),
        ("", "–") if loss is None else (loss, f"{loss:.3f}"),
        (round(task.seconds, 2), f"{task.seconds:.0f}") if task.predictions else ("", "–"),
        (task.task.tokens, f"{task.task.tokens:,}"),
        (KINDS.get(why, ""), KINDS.get(why, "")),
    )
    words = [title, *(text for reason in task.reasons for text in (KINDS[reason.kind], reason.says))]
    return {**_entry(task.task.id, state, title, words, cells), "symbol": SYMBOLS[state], "kinds": why}


def _entry(
    task_id: str, state: str, title: str, words: Sequence[str], cells: Sequence[tuple[Any, str]]
) -> dict[str, Any]:
    """What the row of a task has on every page. `words`: what a search finds it by, besides its id."""
    return {
        "id": task_id,
        "link": quote(task_id, safe=""),
        "state": state,
        "state_title": title,
        "words": " ".join([task_id, *words]).lower(),
        "cells": [{"value": value, "text": text} for value, text in cells],
    }


def _wrong_cells_cell(task: TaskFacts) -> tuple[Any, str]:
    if (wrong := task.wrong_cells) is None:
        return "", "other shape" if task.solution is not None and task.attempts else "–"
    return wrong, f"{wrong:,}"


def _votes_cell(task: TaskFacts) -> tuple[Any, str]:
    return ("", "–") if task.votes is None else (task.votes / max(1, task.views), f"{task.votes} of {task.views}")


# ---- two runs ----


def _scores_beside(both: Comparison) -> list[tuple[str, ...]]:
    """Rows with what each run scores on the tasks that both have."""
    rows = []
    for name, which in SCORES:
        cells = []
        for side in ("first", "second"):
            score = score_of({b.first.task.id: getattr(getattr(b, side), which) for b in both.tasks})
            outputs = f"{score.outputs_solved} of {counted(score.outputs, 'output')}"
            cells.append(f"{score.tasks_solved} of {counted(len(both.tasks), 'task')}, {outputs}")
        rows.append((name, *cells))
    times = [sum(getattr(beside, side).seconds for beside in both.tasks) for side in ("first", "second")]
    rows.append(("time of one worker, for these tasks", *map(format_duration, times)))
    return rows


def _verdict(both: Comparison) -> str:
    found, outcomes = both.difference, Counter(beside.outcome for beside in both.tasks)
    net, (low, high) = found.won - found.lost, found.interval
    more = f"{abs(net)} {'more' if net > 0 else 'fewer'} than" if net else "as many as"
    return (
        f"A solves {counted(outcomes['first'], 'task')} that B does not, and B {outcomes['second']} that A does not. In"
        f" test outputs A wins {found.won} and loses {found.lost}: {more} B, {low:+.0f} to {high:+.0f} (95%),"
        f" p = {found.p:.2g}."
    )


def _row_beside(beside: Beside) -> dict[str, Any]:
    a, b, outcome = beside.first, beside.second, beside.outcome
    outputs, title = len(a.task.test), f"solved {OUTCOMES[outcome]}"
    whys = [KINDS.get(task.main_reason, "") for task in (a, b)]
    cells = (
        (a.task.id, a.task.id),
        (list(OUTCOMES).index(outcome), title),
        *((sum(task.solved), f"{sum(task.solved)} of {outputs}") for task in (a, b)),
        *map(_votes_cell, (a, b)),
        (a.task.tokens, f"{a.task.tokens:,}"),
        *((why, why) for why in whys),
    )
    entry = _entry(a.task.id, outcome, title, [title, *whys], cells)
    return {**entry, "symbol": OUTCOME_SYMBOLS[outcome], "kinds": ""}


# ---- a training ----


def _how_it_ended(training: TrainingFacts, goes_on: bool) -> str:
    """Or how far it is."""
    done, of = training.steps, training.total
    if training.is_finished:
        return f"finished: it took all of its {counted(of, 'step')}"
    if training.has_ended:
        again = "bin/train --out with this folder, --resume and more --max-minutes goes on"
        return as_called(f"the clock ended it after {done:,} of {counted(of, 'step')}; {again}")
    left = f"; the others take about {format_guess(training.left_s)}, if no clock ends it before" if goes_on else ""
    return f"step {done:,} of {of:,}, {done / of:.0%}{left}"


def _facts_of_training(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a training's own record says that is not empty. Of tasks their number, and the first ones."""
    said = {key: about[key] for key in ABOUT_TRAINING if about.get(key) not in (None, "", [], {})}
    if commit := said.get("commit"):
        said["commit"] = _short(commit)
    if held_out := said.get("held_out"):
        said["held_out"] = f"{len(held_out)}: {few(held_out)}"
    if left_out := said.get("left_out"):
        tasks = [f"{task_id} of {source}" for source, of in left_out.items() for task_id in of]
        said["left_out"] = f"{len(tasks)}: {few(tasks)}"
    return [(ABOUT_TRAINING[key], _said(value)) for key, value in said.items()]


def _top_figures_of_training(training: TrainingFacts) -> list[tuple[str, str]]:
    tokens, losses = training.loss
    rows = [("steps", f"{training.steps:,} of {training.total:,}"), ("tokens", f"{tokens[-1]:,.1f} million")]
    rows.append(("training loss, smoothed", f"{losses[-1]:.4f} nats a token"))
    if training.validation[1]:
        rows.append(("loss on held-out tasks", f"{training.validation[1][-1]:.4f} nats a token"))
    if training.accuracy[1]:
        rows.append(("generated answers that are right", f"{training.accuracy[1][-1]:.1%}"))
    if training.speed[1]:
        rows.append(("speed, median", f"{median(training.speed[1]):,.0f} tokens/s"))
    if parameters := training.about.get("parameters"):
        rows.append(("parameters", f"{parameters:,}"))
    if len(training.stages) > 1:
        rows.append(("stages, and their last steps", ", ".join(f"{name} {end:,}" for name, end in training.stages)))
    return rows


def _source_rows(sources: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    samples = max(1, sum(of["samples"] for of in sources.values()))
    names = ("tokens", "demonstrations_dropped", "too_long", "left_out")
    return [
        (label, f"{of['samples']:,}", f"{of['samples'] / samples:.1%}", *(f"{of[name]:,}" for name in names))
        for label, of in sources.items()
    ]


# ---- time ----


def _timeline(session: Session) -> dict[str, Any]:
    """What each worker did when, in percent of the time between the first moment and the last."""
    last = max(session.ended, session.deadline or 0.0)
    span = max(1e-3, last - session.began)

    def at(moment: float) -> float:
        return round(100 * max(0.0, moment - session.began) / span, 3)

    lanes = []
    for worker in sorted({job.worker for job in session.jobs}):
        jobs = [
            {
                "class": f"{job.kind} failed" if job.failed else job.kind,
                "left": at(job.began),
                "width": round(at(job.ended) - at(job.began), 3),
                "title": f"{'asking' if job.kind == 'ask' else 'adapting to'} {few(job.tasks)}:"
                f" {'failed' if job.failed else format_duration(job.ended - job.began)}",
            }
            for job in session.jobs
            if job.worker == worker
        ]
        lanes.append({"worker": worker, "jobs": jobs, "says": _lane_says(session, worker)})
    every = _tick_s(span)
    ticks = [
        {"left": at(session.began + k * every), "text": format_clock(k * every)} for k in range(int(span / every) + 1)
    ]
    return {"lanes": lanes, "ticks": ticks, "limit": session.deadline and at(session.deadline)}


def _lane_says(session: Session, worker: int) -> str:
    """A worker's lane for those who do not see it."""
    jobs = [job for job in session.jobs if job.worker == worker]
    parts = []
    for kind, says in (("adapt", "adapting"), ("ask", "asking")):
        done = [job.ended - job.began for job in jobs if job.kind == kind and not job.failed]
        parts += [f"{counted(len(done), 'job')} of {says}, {format_duration(sum(done))}"] if done else []
    failed = sum(job.failed for job in jobs)
    parts += [f"{counted(failed, 'job')} failed"] if failed else []
    return f"worker {worker}, {format_duration(session.ended - session.began)} in all: {'; '.join(parts)}"


def _tick_s(span_s: float) -> float:
    steps = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 43200, 86400)
    return next((step for step in steps if span_s / step <= TICKS), 86400.0 * max(1, span_s // 86400 // TICKS))


# ---- the run ----


def _facts(run: RunFacts) -> list[tuple[str, str]]:
    facts, summary = run.facts, run.summary
    rows = [("arc_solver", f"{facts.get('version', '?')}, commit {_short(facts.get('commit', ''))}")]
    rows += [(name, facts[key]) for key, name in (("python", "Python"), ("torch", "PyTorch")) if key in facts]
    rows += [("tasks", run.task_set.name), *data_rows(run.task_set.data)]
    rows.append(("digest of what is shown to the model", facts.get("tasks", "?")))
    rows.append(("checkpoint", f"{run.settings.get('model.path') or 'bundled'}, digest {facts.get('checkpoint', '?')}"))
    rows.append(("selected by", run.vote))
    if "workers" in summary:
        rows.append(("workers", f"{summary['workers']}, busy {summary['busy']:.0%} of the time"))
        rows.append((f"utilisation of their {summary['utilisation_of']}", f"{summary['utilisation']:.0%}"))
        rows.append(("peak memory of the workers", f"{summary['peak_memory_bytes'] / 2**30:.2f} GiB"))
    if joint := summary.get("joint"):
        rows.append(("joint stage", f"{counted(joint['steps'], 'step')}, {joint['minutes']:.1f} minutes"))
    if run.sessions:
        began = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(run.sessions[0].began))
        rows.append(("begun", began))
    if any(session.deadline for session in run.sessions):
        rows.append(("time budget", _limits(run)))
    if run.failures:
        said = [f"{few(failure.tasks)}: {failure.says}" for failure in run.failures]
        rows.append(("jobs that failed", f"{len(said)}: {few(said, separator='; ')}"))
    if run.damaged:
        rows.append(("files that cannot be read", ", ".join(run.damaged)))
    return rows


def _limits(run: RunFacts) -> str:
    """What is of a time budget, which the settings do not say of a run that was continued without one."""
    calls = [session for session in run.sessions if session.jobs]
    limited = sum(bool(session.deadline) for session in calls)
    last = {task_id: session for session in calls for task_id in session.answered}
    cheap = sum(task.stage == STAGES[0] for task in run.tasks)
    answers = cheap + sum(bool(session.deadline) for session in last.values())
    stopped = sum((task.adaptation or {}).get("ended") == "deadline" for task in run.tasks)
    return (
        f"in {limited} of {counted(len(calls), 'call')}, which gave {answers} of the {counted(run.answered, 'answer')},"
        f" {cheap} of them in the cheap pass; {counted(stopped, 'adaptation')} stopped by the clock"
    )


def _title(name: str) -> str:
    """A set's name, or its file's."""
    return Path(name).name if Path(name).is_absolute() else name


def _short(commit: str) -> str:
    """A commit in 12 digits, and whether files were changed."""
    name, dash, rest = commit.partition("-")
    return f"{name[:12]}{dash}{rest}" if commit else "not known"


def _said(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
