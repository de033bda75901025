"""The page of a study: its answer first, then the hypothesis, what was measured, and last machine, cost and seeds.

No number in it is typed by hand: all come from the results of the runs, and the command that made them stands there.
"""

import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
from .study import METRICS, Arm, Metric, Study, StudyFile, keys
from .verdict import EXPONENTS, MOST_SEEDS, Difference, PowerLaw, Spread

VERDICTS = {"better": "Better than", "worse": "Worse than", "cannot tell": "Cannot be told from"}  # and of arms
TOLD = ("better", "worse")  # verdicts that stand in the answer also by metrics that do not decide
MOST_LISTED = 3  # arms that cannot be told from the first, with their intervals in the answer; the table has all
WRONG = 0.05  # how often a verdict is wrong where nothing differs


@dataclass(frozen=True)
class History:
    """What a page has to say besides of how its study went.

    Attributes:
        hypothesis: as it stood before the first run.
        read_with: the number of seeds of the first arm each time that the answer was read.
        spent_s: time of the whole machine.
    """

    hypothesis: str
    read_with: Sequence[int]
    spent_s: float


def write_page(found: StudyFile, outcome: Outcome, study_dir: Path, file: Path, history: History) -> None:
    """Writes a page, NAME.md, with its pictures, NAME-*.svg, beside it.

    Raises:
        OSError: something cannot be written.
    """
    pictures = _draw(found, outcome, study_dir, file.parent)
    write_whole(file, "\n".join(_lines(found, outcome, pictures, history)) + "\n")


def runs_of_page(file: Path) -> int:
    """Of how many runs a page is; 0: there is none."""
    said = re.search(r"^- Seeds: .*: ([\d,]+) runs?$", file.read_text(), re.MULTILINE) if file.exists() else None
    return int(said[1].replace(",", "")) if said else 0


def _lines(found: StudyFile, outcome: Outcome, pictures: Mapping[str, str], history: History) -> Iterator[str]:
    study = found.study
    yield f"# {study.question}"
    yield ""
    yield f"{answer(outcome)}"
    yield ""
    yield f"**Hypothesis**, written before the first run: {history.hypothesis}"
    if study.about:
        yield f"\n{study.about.strip()}"
    yield "\n## What was measured"
    for metric in study.metrics:
        yield f"\n{_begun(METRICS[metric].title)} (`{metric}`):\n"
        yield from _table(outcome, metric)
    for name, says in pictures.items():
        yield f"\n![{says}]({name})"
    yield "\n## How\n"
    yield from _how(found, outcome, history)
    yield "\n## Machine, cost, seeds\n"
    yield from _cost(outcome, history.spent_s)


def measured(result: Result, study: Study) -> str:
    """What a run came to, in one line."""
    alone = Outcome(study, [result])
    known = {name: alone.measured(result.arm, name) for name in study.metrics}
    said = [f"{name} {METRICS[name].says(of.mean)}" for name, of in known.items() if of]
    return f"{', '.join(said) or 'nothing measured'}; {format_duration(sum(result.seconds.values()))}"


def _begun(words: str) -> str:
    """As a sentence begins."""
    return words[0].upper() + words[1:]


# ---- the answer ----------------------------------------------------------------------------------------------------


def answer(outcome: Outcome) -> str:
    """What a study found, in one line: by the metric that decides, and what can be told by the others."""
    study = outcome.study
    title = _begun(METRICS[study.decides].title)
    if study.kind == "scaling":
        law = outcome.power_law
        said = [_law(law, study) if law else f"{title}: nothing is known yet."]
    elif study.kind == "spread":
        said = [*_spreads(outcome), *_reproducible(outcome)]
    else:
        decided = _compares(outcome, study.decides, VERDICTS) or "Nothing is known yet."
        others = [_compares(outcome, name, TOLD) for name in study.metrics if name != study.decides]
        said = [decided, *filter(None, others)]
    if (missing := [f"`{arm.name}`" for arm in study.arms if arm.name not in outcome.by_arm]) and outcome.by_arm:
        said.append(f"Not measured yet: {', '.join(missing)}.")
    return f"**{' '.join(said)}**"


def _spreads(outcome: Outcome) -> Iterator[str]:
    """How much the seeds of each arm differ, and whether more in one than in another."""
    metric = METRICS[outcome.study.decides]
    arms = [arm.name for arm in outcome.study.arms if not arm.again]
    known = {name: of for name in arms if (of := outcome.spread(name, outcome.study.decides))}
    listed = ", ".join(f"`{name}` {_spread(of, metric)}" for name, of in known.items())
    title = f"{_begun(metric.title)}, standard deviation over seeds with its 95% interval"
    yield f"{title}: {listed or 'not known yet'}."
    if len(known) > 1 and max(of.low for of in known.values()) <= min(of.high for of in known.values()):
        yield "Which is larger cannot be told: the intervals overlap."


_POINTS = " in percentage points"


def _compares(outcome: Outcome, metric_name: str, verdicts: Iterable[str]) -> str:
    """The arms of which these verdicts are true, by one metric, and what its numbers are; empty: there are none."""
    said = ". ".join(_verdicts(outcome, metric_name, verdicts))
    first = outcome.measured(outcome.first.name, metric_name)
    if not said or not first:
        return ""
    metric = METRICS[metric_name]
    of_first = f"; `{outcome.first.name}` has {metric.says(first.mean)}"
    less = ", less is better" * (metric.sign < 0)
    return f"{said}. {_begun(metric.title)}{less}: differences{_POINTS * metric.is_share} with 95% intervals{of_first}."


def _verdicts(outcome: Outcome, metric_name: str, verdicts: Iterable[str]) -> Iterator[str]:
    """Of each of these verdicts, the arms that have it against the first."""
    study, metric, first = outcome.study, METRICS[metric_name], outcome.first.name
    known = {arm.name: outcome.difference(arm.name, metric_name) for arm in study.arms[1:]}
    for verdict in verdicts:
        says = VERDICTS[verdict]
        of = {name: difference for name, difference in known.items() if difference and difference.verdict == verdict}
        told = not any(math.isnan(difference.low) for difference in of.values())
        if verdict == "cannot tell" and len(of) > MOST_LISTED and told:
            low, high = min(d.low for d in of.values()), max(d.high for d in of.values())
            ends = f"{metric.says(low, signed=True)} to {metric.says(high, signed=True)}"
            yield f"{says} `{first}`: {', '.join(f'`{name}`' for name in of)} (all within {ends})"
        elif of:
            yield f"{says} `{first}`: " + ", ".join(f"`{n}` ({_interval(d, metric)})" for n, d in of.items())


def _law(law: PowerLaw, study: Study) -> str:
    metric = METRICS[study.decides]
    at, below, above = (metric.says(value) for value in law.ten_times)
    goes, x = "falls" if law.scale > 0 else "rises", "x" if study.axis == "x" else f"the {study.axis}, x"
    said = (
        f"{_begun(_of_law(study))}, {goes} with {x}, as a + b / x^p: p is {_exponent(law)}. Ten times the largest x"
        f" would bring {at} ({below} to {above}), if the law held so far."
    )
    if law.foretold:
        value, below, above, measured = (metric.says(value) for value in law.foretold)
        inside = law.foretold[1] <= law.foretold[3] <= law.foretold[2]
        said += (
            f" The other points foretell {value} ({below} to {above}) for the largest x; measured were {measured}"
            f"{'' if inside else ', so the law may not hold'}."
        )
    return said


def _exponent(law: PowerLaw) -> str:
    """With its interval, if that has ends among the exponents that were tried."""
    low, high = law.exponent_interval
    has_low, has_high = low > 1.05 * EXPONENTS[0], high < EXPONENTS[1] / 1.05
    if has_low and has_high:
        return f"{law.exponent:.2f} ({low:.2f} to {high:.2f}, 95%)"
    ends = [f"at least {low:.2f}"] * has_low + [f"at most {high:.2f}"] * has_high
    return f"not known ({ends[0]}, 95%)" if ends else "not known (any fits)"


def _reproducible(outcome: Outcome) -> Iterator[str]:
    """Whether runs with the same settings and seed left the same weights."""
    same = different = 0
    for one, other in combinations(outcome.study.arms if outcome.study.train else (), 2):
        if (one.set, one.vary) == (other.set, other.vary) and one.again != other.again:
            ours, theirs = (outcome.by_arm.get(arm.name, {}) for arm in (one, other))
            for seed in ours.keys() & theirs.keys():
                equal = ours[seed].about["weights"] == theirs[seed].about["weights"]
                same, different = same + equal, different + (not equal)
    if same or different:
        pairs = counted(same + different, "pair")
        yield f"Of {pairs} of runs with the same seed, {same} left the same weights, bit for bit."


def _interval(difference: Difference, metric: Metric) -> str:
    value = metric.says(difference.value, signed=True)
    if math.isnan(difference.low):
        return f"{value}, one seed"
    if difference.low == difference.high:
        return f"{value} in all seeds"
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
    spreads = "standard deviation over seeds, 95%"
    compared = [f"against the first{', points' * metric.is_share}, 95%", "verdict"] if compares else []
    heads = ["arm", "settings", *scales, "seeds", "mean", spreads, *compared]
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
    known: Mapping[str, Difference | Spread | None] = {}
    if study.kind == "compare":
        known = {arm.name: outcome.difference(arm.name, study.decides) for arm in study.arms[1:]}
        better = "less" if metric.sign < 0 else "more"
        title = f"{metric.title}, {better} is better:\ndifference to `{outcome.first.name}`"
        shows = f"The difference of each arm to {outcome.first.name}"
    elif study.kind == "spread":
        known = {arm.name: outcome.spread(arm.name, study.decides) for arm in study.arms}
        title, shows = (
            f"{metric.title}:\nstandard deviation over seeds",
            "The standard deviation over seeds of each arm",
        )
    factor = 100 if metric.is_share else 1
    if intervals := {n: (factor * of.value, factor * of.low, factor * of.high) for n, of in known.items() if of}:
        name = f"{found.name}-intervals.svg"
        interval_chart(intervals, f"{title}{_POINTS * metric.is_share}", folder / name)
        drawn[name] = f"{shows}, with 95% intervals"
    if study.kind == "scaling" and (law := outcome.power_law):
        name = f"{found.name}-law.svg"
        far = (10 * max(outcome.points), *law.ten_times)
        power_law_chart(outcome.points, law.at, far, (study.axis, _of_law(study)), folder / name)
        drawn[name] = "The runs, the power law through them, and what it says of ten times more"
    if study.train and (curves := _loss_curves(outcome, study_dir)):
        name = f"{found.name}-loss.svg"
        band_chart(curves, "training loss, smoothed, nats a token", folder / name)
        drawn[name] = (
            "Training loss of each arm on its own training data: the mean over seeds, and a band from the lowest to the"
            " highest"
        )
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


def _how(found: StudyFile, outcome: Outcome, history: History) -> Iterator[str]:
    study, results = found.study, list(outcome.results)
    seeds = max(map(len, outcome.by_arm.values()), default=study.seeds)
    options = [] if seeds == found.own_seeds else ["--seeds", f"{seeds}"]
    if found.hours:
        options = ["--hours", f"{found.hours:g}"]
    yield f"    bin/study {shlex.join([found.file.as_posix(), *options, *found.overrides])}\n"
    words = (*study.set, *found.overrides)
    last_words = {key: f"`{word}`" for key, word in zip(keys(words), words, strict=True)}
    base = f" and {', '.join(last_words.values())}" if last_words else ""
    own = {key for arm in study.arms for key in keys(arm.set)}
    unless = ", unless their own settings say otherwise" if own & last_words.keys() else ""
    yield f"All arms have {f'`{study.config}`' if study.config else 'the defaults'}{base}{unless}."
    if found.base:
        settings = flat(load_config(found.base).model_dump(mode="json", exclude_defaults=True, exclude={"stages"}))
        listed = ", ".join(f"`{key}={json.dumps(value)}`" for key, value in settings.items())
        yield f"\n`{study.config}` has {listed}."
    if not study.train:
        yield f"\nNothing was trained. The model: {_listed(results, 'model')}."
    if study.solves:
        for tasks, ids in _sets(results).items():
            yield f"\nThe tasks: {counted(ids, 'task')} of {tasks}; of each the share of its test outputs is counted."
        no_score = " Training on them is part of the question: what is measured is no score." if study.seen else ""
        yield f"\nThe leak audit of what was trained on and these tasks: {_listed(results, 'audit')}.{no_score}"
    losses = [result.tasks["validation_loss"] for result in results if "validation_loss" in result.tasks]
    if "validation_loss" in study.metrics and (held_out := {*map(len, losses)}):
        counts = " or ".join(map(str, sorted(held_out)))
        yield (
            f"\nThe loss is of {counts} held-out tasks, those of which the validation samples (`validation.tokens` of"
            " them) have any, and each counts alike."
        )
    if study.train:
        yield f"\nThe audit of the trainings: {_listed(results, 'audit_of_training')}."
    if study.kind == "compare":
        count = len(study.arms) - 1
        shared = all(map(outcome.shares_candidates, outcome.by_arm))
        luck = (
            ": all arms choose among the same candidates, seed by seed, and share the luck of the seeds."
            if shared
            else ", to which the luck of the seeds is added."
        )
        yield (
            f"\nIntervals are of a paired bootstrap over tasks{luck} Where nothing differs, a verdict is wrong in"
            f" {WRONG:.0%} of cases; {counted(count, 'comparison')} by each metric"
            f" {'is' if count == 1 else 'are'} made here. Two arms are compared by the seeds that both have."
        )
    if len(history.read_with) > 1:
        read = ", then ".join(map(str, history.read_with))
        yield (
            f"\nThe answer was read with {read} seeds of the first arm: seeds that come after a reading are another"
            " chance for a wrong verdict."
        )
    if study.kind == "scaling" and (law := outcome.power_law):
        yield (
            f"\nThe law that fits best: {law.floor:.4g} {'+' if law.scale >= 0 else '-'} {abs(law.scale):.4g} /"
            f" x^{law.exponent:.3g}, of {_of_law(study)}. Its intervals are of laws through points that are drawn anew,"
            " as far from it as the seeds are from each other, or the points from the law if that is more."
        )
    yield "\nThe interval of a standard deviation is that which it has of a normal distribution."


def _of_law(study: Study) -> str:
    """What a power law is of: shares are counted from all."""
    metric = METRICS[study.decides]
    return metric.title if metric.sign < 0 else f"what is missing to all {metric.title}"


def _sets(results: Sequence[Result]) -> dict[str, int]:
    """The task sets, by name and digest, and how many tasks were solved of each."""
    found = {}
    for result in results:
        if "pass@2" in result.tasks:
            digest = result.about.get("data", {}).get("digest", "")
            name = Path(result.about.get("tasks", "?"))
            said = f"`{name.name if name.is_absolute() else name}`{f', digest {digest}' if digest else ''}"
            found[said] = len(result.tasks["pass@2"])
    return found


def _listed(results: Sequence[Result], name: str) -> str:
    """What runs say of a thing, once where all say the same, else of which arms."""
    arms: dict[str, dict[str, None]] = {}
    for result in results:
        if name in result.about:
            arms.setdefault(str(result.about[name]), {})[result.arm] = None
    if len(arms) < 2:
        return next(iter(arms), "not made")
    return "; ".join(f"of {', '.join(f'`{arm}`' for arm in of)}: {said}" for said, of in arms.items())


def _cost(outcome: Outcome, spent_s: float) -> Iterator[str]:
    results = list(outcome.results)
    machines = Counter(str(result.about.get("machine", "not known")) for result in results)
    threads = sorted({int(result.about.get("threads", 1)) for result in results} or {1})
    commits = sorted({str(result.about.get("commit", ""))[:12] for result in results} - {""})
    seeds = {arm.name: sorted(outcome.by_arm.get(arm.name, ())) for arm in outcome.study.arms}
    same = len({tuple(of) for of in seeds.values()}) == 1
    of_each = " or ".join(map(str, threads))
    yield f"- Machine: {', '.join(machines) or 'none yet'}; {of_each} thread{'s' * (threads[-1] > 1)} for each run"
    done = {what: {r.about[what] for r in results if what in r.about} for what in ("trained", "solved")}
    nouns = {"trained": ("training", ""), "solved": ("run", " of bin/solve")}
    parts = [counted(len(of), nouns[what][0]) + nouns[what][1] for what, of in done.items() if of]
    yield f"- Cost: {' and '.join(parts) or 'nothing'}, {format_duration(spent_s)} of the whole machine"
    for title, describe in (("A run took, on average", _taken), ("A training had", _trained)):
        if said := {name: words for name, of in outcome.by_arm.items() if (words := describe([*of.values()]))}:
            alike = len({*said.values()}) == 1
            yield f"- {title}: " + (
                next(iter(said.values())) if alike else "; ".join(f"`{name}` {words}" for name, words in said.items())
            )
    if commits:
        yield f"- Commit: {', '.join(commits)}"
    listed = next(iter(seeds.values()), []) if same else None
    yield (
        "- Seeds: "
        + (
            f"{', '.join(map(str, listed))} in each arm"
            if listed is not None
            else "; ".join(f"`{name}` {', '.join(map(str, of)) or 'none'}" for name, of in seeds.items())
        )
        + f": {counted(len(results), 'run')}"
    )


def _trained(results: Sequence[Result]) -> str:
    """What the models of an arm are, and on how much they were trained."""
    known = [result.about for result in results if "parameters" in result.about]
    if not known:
        return ""
    tokens = sum(about["tokens"] for about in known) / len(known) / 1e6
    return (
        f"{known[0]['parameters']:,} parameters, {counted(known[0]['steps'], 'step')} and {tokens:.2f} million tokens"
    )


def _taken(results: Sequence[Result]) -> str:
    """How long runs of an arm took, whoever shared them."""
    named = (("train", "training"), ("solve", "solving"))
    known = {title: [r.seconds[what] for r in results if what in r.seconds] for what, title in named}
    return " and ".join(f"{format_duration(sum(of) / len(of))} {title}" for title, of in known.items() if of)
