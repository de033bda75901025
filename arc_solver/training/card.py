"""The card of a trained model: a README.md beside the weights, made of the figures that the run leaves."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..data import DATA_FILE
from ..errors import counted

TRAINING_FILE = "training.json"  # the figures of a run, beside the weights that it left
# Of an earlier run, into a later one:
CARRIED = ("began_with", "tokens", "steps", "minutes", "sources", "leak_audit", "seed", "machine", "commit")


def earlier_runs(path: str) -> list[dict[str, Any]]:
    """The runs that made the weights or the adapter in a folder, first to last; empty where nothing of ours says so."""
    file = Path(path) / TRAINING_FILE
    if not path or not file.is_file():
        return []
    try:
        about = json.loads(file.read_text())
    except ValueError:
        return []
    if not isinstance(about, dict) or not {"tokens", "steps", "minutes"} <= about.keys():
        return []
    return [*about.get("earlier", []), {name: about[name] for name in CARRIED if name in about}]


def model_card(about: Mapping[str, Any], kind: str = "causal language model") -> str:
    """The card in Markdown, of the figures of `report.describe`."""
    runs: list[Mapping[str, Any]] = [*about["earlier"], about]
    tokens, minutes = (sum(run[name] for run in runs) for name in ("tokens", "minutes"))
    rows = [
        ("parameters", f"{about['parameters']:,}"),
        (
            "began with",
            ", then ".join(dict.fromkeys(run.get("began_with", "unknown") or "new weights" for run in runs)),
        ),
        ("tokens seen", f"{tokens:,}, in {len(runs)} run{'s' * (len(runs) > 1)}"),
        ("time", f"{minutes:,.1f} minutes"),
        *((f"{name}s", _listed(runs, name)) for name in ("machine", "commit", "seed")),
        ("leak audit", _listed(runs, "leak_audit")),
        ("not trained on", _kept_out(about)),
        ("validation loss", "not measured" if (loss := about["validation_loss"]) is None else f"{loss} nats a token"),
    ]
    return "\n".join(
        [
            "# Model card",
            "",
            f"A {kind} for ARC-AGI tasks, over the 64-id vocabulary of arc_solver, left by `bin/train`.",
            f"`{TRAINING_FILE}` has all figures and the config, `{DATA_FILE}` what the leak audit compares with.",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in rows),
            "",
            "What it was trained on, all runs together. An augmented sample shows some pairs of one task.",
            "",
            "| source | tasks | samples | tokens | licence | sha256 of its file |",
            "|---|---|---|---|---|---|",
            *_source_rows(runs),
            *(("", "![training and validation loss of the last run](loss.png)") if about["steps"] else ()),
            "",
        ]
    )


def _kept_out(about: Mapping[str, Any]) -> str:
    overlapping = sum(map(len, about["left_out"].values()))
    return (
        f"{counted(len(about['held_out']), 'task')} held out to validate on, and {overlapping} that the audit left out"
        f" (`{TRAINING_FILE}` names them)"
    )


def _listed(runs: list[Mapping[str, Any]], name: str) -> str:
    """What the runs say, first to last, each thing once; older versions did not note all of it."""
    return "; ".join(dict.fromkeys(str(run.get(name, "")) or "unknown" for run in runs))


def _source_rows(runs: list[Mapping[str, Any]]) -> list[str]:
    """A row for each source, with the samples and tokens of all runs; tasks, licence and digest are the last run's.

    Another for the runs of older versions, which did not note their sources.
    """
    sums: dict[str, Counter[str]] = {}
    latest: dict[str, Mapping[str, Any]] = {}
    for run in runs:
        for label, source in run.get("sources", {}).items():
            sums.setdefault(label, Counter()).update({name: source[name] for name in ("samples", "tokens")})
            latest[label] = source
    unknown = sum(run["tokens"] for run in runs if "sources" not in run)
    rows = [f"| not noted | | | {unknown:,} | | |"] if unknown else []
    return rows + [
        f"| {label} | {latest[label]['tasks']:,} | {total['samples']:,} | {total['tokens']:,} |"
        f" {latest[label]['licence'] or 'see there'} | {latest[label]['sha256'] or ''} |"
        for label, total in sums.items()
    ]
