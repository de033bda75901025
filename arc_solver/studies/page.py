"""The page of a study: its answer first, then the hypothesis, what was measured, and last machine, cost and seeds.

No number in it is typed by hand: all come from the results of the runs, and the command that made them stands there.
"""

import json
import math
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path

from ..charts import band_chart, interval_chart, power_law_chart, smoothed
from ..clock import format_duration
from ..config import load_config
from ..errors import counted
from ..files import write_whole
from ..report.collect import flat, read_log
from .outcome import Outcome
from .runs import Result
from .study import METRICS, Arm, Metric, Study, StudyFile
from .verdict import MOST_SEEDS, Difference, PowerLaw, Spread

VERDICTS = {"better": "Better than", "worse": "Worse than", "cannot tell": "Cannot be told from"}  # and of arms
WRONG = 0.05  # how often a verdict is wrong where nothing differs


def write_page(found: StudyFile, outcome: Outcome, study_dir: Path, folder: Path, spent_s: float) -> Path:
    """Writes NAME.md and its pictures, NAME-*.svg, into a folder. The page's path.

    Args:
        spent_s: machine time of all runs.

    Raises:
        OSError: something cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures = _draw(found, outcome, study_dir, folder)
    file = folder / f"{found.name}.md"
    write_whole(file, "\n".join(_lines(found, outcome, pictures, spent_s)) + "\n")
    return file


def _lines(found: StudyFile, outcome: Outcome, pictures: Mapping[str, str], spent_s: float) -> Iterator[str]:
    study = found.study
    yield f"# {study.question}"
    yield ""
    yield f"{answer(outcome)}"
    yield ""
    yield f"**Hypothesis**, written before the first run: {study.hypothesis}"
    if study.about:
        yield f"\n{study.about.strip()}"
    yield "\n## What was measured"
    for metric in study.metrics:
        yield f"\n{_begun(METRICS[metric].title)} (`{metric}`):\n"
        yield from _table(outcome, metric)
    for name, says in pictures.items():
        yield f"\n![{says}]({name})"
    yield "\n## How\n"
    yield from _how(found, outcome)
    yield "\n## Machine, cost, seeds\n"
    yield from _cost(found, outcome, spent_s)


def measured(result: Result, study: Study) -> str:
    """What a run came to, in one line."""
    values = {name: result.value(name) for name in study.metrics}
    said = [f"{name} {METRICS[name].says(value)}" for name, value in values.items() if value is not None]
    return f"{', '.join(said) or 'nothing measured'}; {format_duration(sum(result.seconds.values()))}"


def _begun(words: str) -> str:
    """As a sentence begins."""
    return words[0].upper() + words[1:]


# ---- the answer ----------------------------------------------------------------------------------------------------


def answer(outcome: Outcome) -> str:
    """What a study found, in one line."""
    study, metric = outcome.study, METRICS[outcome.study.decides]
    title = _begun(metric.title)
    if study.kind == "scaling":
        law = outcome.power_law
        return f"**{_law(law, metric, study.axis) if law else f'{title}: nothing is known yet.'}**"
    if study.kind == "spread":
        known = {arm.name: outcome.spread(arm.name, study.decides) for arm in study.arms if not arm.again}
        spreads = [f"`{name}` {_spread(of, metric)}" for name, of in known.items() if of]
        said = f"{title}, standard deviation over seeds with its 95% interval: {', '.join(spreads) or 'not known yet'}."
        return f"**{' '.join([said, *_reproducible(outcome)])}**"
    by_verdict: dict[str, list[str]] = {verdict: [] for verdict in VERDICTS}
    for arm in study.arms[1:]:
        if difference := outcome.difference(arm.name, study.decides):
            by_verdict[difference.verdict].append(f"`{arm.name}` ({_interval(difference, metric)})")
    first = outcome.first.name
    verdicts = [f"{VERDICTS[verdict]} `{first}`: {', '.join(arms)}" for verdict, arms in by_verdict.items() if arms]
    said = f"{'. '.join(verdicts) or 'Nothing is known yet'}."
    return f"**{said} {title}{', less is better' * (metric.sign < 0)}: differences with 95% intervals.**"


def _law(law: PowerLaw, metric: Metric, axis: str) -> str:
    low, high = law.exponent_interval
    at, below, above = (metric.says(value) for value in law.ten_times)
    of = metric.title if metric.sign < 0 else f"what is missing to all {metric.title}"
    said = (
        f"{_begun(of)}, falls with {'' if axis == 'x' else f'the {axis}, '}x, as a + b / x^p: p is {law.exponent:.2f}"
        f" ({low:.2f} to {high:.2f}, 95%). Ten times the largest x would bring {at} ({below} to {above}), if the law"
        " held so far."
    )
    if law.foretold:
        value, below, above, measured = (metric.says(value) for value in law.foretold)
        inside = law.foretold[1] <= law.foretold[3] <= law.foretold[2]
        said += (
            f" The other points foretell {value} ({below} to {above}) for the largest x; measured were {measured}"
            f"{'' if inside else ', so it does not hold'}."
        )
    return said


def _reproducible(outcome: Outcome) -> Iterator[str]:
    """Whether runs with the same settings and seed left the same weights."""
    same = different = 0
    for one, other in combinations(outcome.study.arms, 2):
        if (one.set, one.vary) == (other.set, other.vary) and one.again != other.again:
            ours, theirs = (outcome.by_arm.get(arm.name, {}) for arm in (one, other))
            for seed in ours.keys() & theirs.keys():
                equal = ours[seed].about.get("weights") == theirs[seed].about.get("weights")
                same, different = same + equal, different + (not equal)
    if same or different:
        pairs = counted(same + different, "pair")
        yield f"Of {pairs} of runs with the same seed, {same} left the same weights, bit for bit."


def _interval(difference: Difference, metric: Metric) -> str:
    value = metric.says(difference.value, signed=True)
    if math.isnan(difference.low):
        return f"{value}, one seed"
    if difference.low == difference.high:
        return f"{value} in all seeds and tasks"
    ends = f"{metric.says(difference.low, signed=True)} to {metric.says(difference.high, signed=True)}"
    return f"{value}, {ends}"


def _spread(of: Spread | None, metric: Metric) -> str:
    if of is None:
        return "one seed"
    if not of.value:
        return "all the same"
    return f"{metric.says(of.value)} ({metric.says(of.low)} to {metric.says(of.high)})"


# ---- tables --------------------------------------------------------------------------------------------------------


def _table(outcome: Outcome, metric_name: str) -> Iterator[str]:
    metric, compares = METRICS[metric_name], outcome.study.kind == "compare"
    scales = ["x"] if outcome.study.kind == "scaling" else []
    heads = ["arm", "settings", *scales, "seeds", "mean", "spread over seeds, 95%", *_COMPARED[: 2 * compares]]
    yield from _row(*heads)
    yield from _row(*["---"] * len(heads))
    for arm in outcome.study.arms:
        measured = outcome.measured(arm.name, metric_name)
        if not measured:
            yield from _row(f"`{arm.name}`", _settings(arm), "0", *["–"] * (len(heads) - 3))
            continue
        x = [f"{arm.x:g}"] if scales and arm.x else []
        cells = [f"`{arm.name}`", _settings(arm), *x, f"{len(measured.values)}", metric.says(measured.mean)]
        cells.append(_spread(outcome.spread(arm.name, metric_name), metric))
        if compares:
            cells += _compared(outcome, arm, metric_name)
        yield from _row(*cells)


_COMPARED = ("against the first, 95%", "verdict")


def _compared(outcome: Outcome, arm: Arm, metric_name: str) -> list[str]:
    difference = outcome.difference(arm.name, metric_name) if arm.name != outcome.first.name else None
    if not difference:
        return ["–", "–"]
    verdict = difference.verdict
    if verdict == "cannot tell":
        more = difference.more_seeds
        if difference.value:
            verdict += f"; {counted(more, 'more seed')} might" if more else f"; not by {MOST_SEEDS} seeds either"
    return [_interval(difference, METRICS[metric_name]), verdict]


def _settings(arm: Arm) -> str:
    words = [*arm.set, *([f"seeds of {' and '.join(arm.vary)}"] if arm.vary != ("run.seed",) else [])]
    return " ".join(f"`{word}`" for word in words).replace("|", "\\|") or "–"


def _row(*cells: str) -> Iterator[str]:
    yield f"| {' | '.join(cells)} |"


# ---- pictures ------------------------------------------------------------------------------------------------------


def _draw(found: StudyFile, outcome: Outcome, study_dir: Path, folder: Path) -> dict[str, str]:
    """Draws what there is to draw; of each picture its file's name and what it shows."""
    study, metric, drawn = found.study, METRICS[found.study.decides], {}
    if study.kind == "compare":
        known = {arm.name: outcome.difference(arm.name, study.decides) for arm in study.arms[1:]}
        factor = 100 if metric.is_share else 1
        intervals = {n: (factor * d.value, factor * d.low, factor * d.high) for n, d in known.items() if d}
        if intervals:
            name = f"{found.name}-intervals.svg"
            unit = ", percent of all" if metric.is_share else ""
            interval_chart(intervals, f"{metric.title}: more than `{outcome.first.name}`{unit}", folder / name)
            drawn[name] = f"What each arm has more than {outcome.first.name}, with 95% intervals"
    if study.kind == "scaling" and (law := outcome.power_law):
        name = f"{found.name}-law.svg"
        far = (10 * max(outcome.points), *law.ten_times)
        power_law_chart(outcome.points, law.at, far, (study.axis, metric.title), folder / name)
        drawn[name] = "The runs, the power law through them, and what it says of ten times more"
    if study.train and (curves := _loss_curves(outcome, study_dir)):
        name = f"{found.name}-loss.svg"
        band_chart(curves, "training loss, smoothed, nats a token", folder / name)
        drawn[name] = "Training loss of each arm: the mean over seeds, and a band from the lowest to the highest"
    return drawn


def _loss_curves(outcome: Outcome, study_dir: Path) -> dict[str, list[tuple[Sequence[float], Sequence[float]]]]:
    curves: dict[str, list[tuple[Sequence[float], Sequence[float]]]] = {}
    for arm, of in outcome.by_arm.items():
        for result in of.values():
            records = read_log(study_dir / "trained" / result.about["trained"] / "log.jsonl")
            steps = [record for record in records if record.get("loss") is not None]
            if len(steps) > 1:
                losses = smoothed([step["loss"] for step in steps])
                curves.setdefault(arm, []).append(([step["tokens"] / 1e6 for step in steps], losses))
    return curves


# ---- how it was done -----------------------------------------------------------------------------------------------


def _how(found: StudyFile, outcome: Outcome) -> Iterator[str]:
    study, results = found.study, list(outcome.results)
    yield f"    bin/study {shlex.join([found.file.as_posix(), *found.options, *found.overrides])}\n"
    base = [f"`{word}`" for word in (*study.set, *found.overrides)]
    config = f"`{study.config}`" if study.config else "the defaults"
    yield f"All arms have {config}{' and ' if base else ''}{', '.join(base)}."
    if found.base:
        settings = flat(load_config(found.base).model_dump(mode="json", exclude_defaults=True, exclude={"stages"}))
        listed = ", ".join(f"`{key}={json.dumps(value)}`" for key, value in settings.items())
        yield f"\n`{study.config}` has {listed}."
    if not study.train:
        yield f"\nNothing was trained; asked was {_listed(results, 'model')}."
    if study.solves:
        for tasks, ids in _sets(results).items():
            yield f"\nAsked were {counted(ids, 'task')} of {tasks}; of each the share of its test outputs is counted."
        on_purpose = " They were trained on, on purpose: what is measured is no score." if study.seen else ""
        yield f"\nThe leak audit of what was trained on and these tasks: {_listed(results, 'audit')}.{on_purpose}"
    if held_out := {len(result.tasks["validation_loss"]) for result in results if "validation_loss" in result.tasks}:
        yield f"\nThe loss is of {' or '.join(map(str, sorted(held_out)))} held-out tasks, and each counts alike."
    if study.train:
        yield f"\nThe audit of the trainings: {_listed(results, 'audit_of_training')}."
    if study.kind == "compare":
        count = len(study.arms) - 1
        yield (
            "\nIntervals are of a paired bootstrap over tasks, where there are tasks, to which the luck of the seeds is"
            f" added. Where nothing differs, a verdict is wrong in {WRONG:.0%} of cases; {counted(count, 'comparison')}"
            f" by each metric {'is' if count == 1 else 'are'} made here. Arms are compared by the seeds that both have."
        )
    yield (
        "\nThe spread is the standard deviation over seeds, with the interval that it would have of a normal"
        " distribution."
    )


def _sets(results: Sequence[Result]) -> dict[str, int]:
    """The task sets, by name and digest, and how many tasks were solved of each."""
    found = {}
    for result in results:
        if result.tasks:
            digest = result.about.get("data", {}).get("digest", "")
            name = Path(result.about.get("tasks", "?"))
            said = f"`{name.name if name.is_absolute() else name}`{f', digest {digest}' if digest else ''}"
            found[said] = len(next(iter(result.tasks.values())))
    return found


def _listed(results: Sequence[Result], name: str) -> str:
    said = dict.fromkeys(str(result.about[name]) for result in results if name in result.about)
    return "; ".join(said) or "not made"


def _cost(found: StudyFile, outcome: Outcome, spent_s: float) -> Iterator[str]:
    results = list(outcome.results)
    machines = Counter(str(result.about.get("machine", "not known")) for result in results)
    threads = sorted({int(result.about.get("threads", 1)) for result in results})
    commits = sorted({str(result.about.get("commit", ""))[:12] for result in results} - {""})
    seeds = {name: sorted(of) for name, of in outcome.by_arm.items()}
    same = len({tuple(of) for of in seeds.values()}) == 1
    yield (
        f"- Machine: {', '.join(machines)}; {counted(max(threads), 'thread')} for each run"
        if results
        else "- No run yet"
    )
    yield f"- Cost: {counted(len(results), 'run')}, {format_duration(spent_s)} of the whole machine"
    taken = {name: said for name, of in outcome.by_arm.items() if (said := _taken([*of.values()]))}
    if taken:
        alike = len({*taken.values()}) == 1
        said = next(iter(taken.values())) if alike else "; ".join(f"`{name}` {of}" for name, of in taken.items())
        yield f"- A run took, in the mean: {said}"
    if commits:
        yield f"- Commit: {', '.join(commits)}"
    listed = next(iter(seeds.values()), []) if same else None
    yield "- Seeds: " + (
        f"{', '.join(map(str, listed))} in each arm"
        if listed is not None
        else "; ".join(f"`{name}` {', '.join(map(str, of))}" for name, of in seeds.items())
    )


def _taken(results: Sequence[Result]) -> str:
    """How long runs of an arm took, whoever shared them."""
    named = (("train", "training"), ("solve", "solving"))
    known = {title: [r.seconds[what] for r in results if what in r.seconds] for what, title in named}
    return " and ".join(f"{format_duration(sum(of) / len(of))} {title}" for title, of in known.items() if of)
