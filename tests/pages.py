"""What pages are made of and how they are read again, for the tests of reports."""

import json
from html.parser import HTMLParser
from pathlib import Path

from arc_solver.answers.vote import rank
from arc_solver.config import VoteConfig
from arc_solver.report.collect import TaskFacts


def facts_of(task, found, solution=None) -> TaskFacts:
    """A task as a run knows it that selects by votes."""
    ranked = [rank(found, task, test, VoteConfig(rule="votes")) for test in range(len(task.test))]
    attempts = [(r[0].grid, r[1 if len(r) > 1 else 0].grid) for r in ranked]
    return TaskFacts(task, solution, found, ranked, attempts, "tasks", None, 1.0, 1.0, None, None, [])


class Reader(HTMLParser):
    """The text of all table cells and headings, and of the scripts by their id; addresses that would be loaded."""

    def __init__(self, page: str):
        super().__init__()
        self.text, self.scripts, self.loaded, self.inside = [], {}, [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.inside = [tag, attributes]
        self.loaded += [attributes[name] for name in ("src", "srcset", "data", "poster") if name in attributes]
        self.loaded += [attributes["href"]] if tag in ("link", "base") and "href" in attributes else []

    def handle_endtag(self, tag):
        self.inside = []

    def handle_data(self, data):
        if self.inside and self.inside[0] == "script":
            name = self.inside[1].get("id", "code")
            self.scripts[name] = self.scripts.get(name, "") + data
        else:
            self.text.append(data)


def text_of(page: str) -> str:
    """All that can be read on it, in one line."""
    return " ".join(" ".join(Reader(page).text).split())


def write_training(out: Path, steps: int = 40) -> Path:
    """What a training of two stages leaves, 100 steps together, that has come to its second."""
    (out / "partition").mkdir(parents=True)
    stages = [{"name": name, "train": {"lr": lr, "steps": of}} for name, lr, of in (("a", 1e-3, 30), ("b", 5e-4, 70))]
    usual = {"lr": 1e-3, "steps": 30}
    (out / "config.json").write_text(json.dumps({"stages": stages, "train": usual, "run": {"seed": 3}}))
    lines = []
    for step in range(1, steps + 1):
        stage, began = ("a" if step <= 30 else "b"), 2.0 * step
        record = {"step": step, "loss": 2.0 / step, "rate": 0.5, "stage": stage, "tokens": 100 * step}
        record |= {"began_s": began, "elapsed_s": began + 1.0}
        lines.append(record | ({"validation_loss": 0.7, "accuracy": 0.25} if step == 20 else {}))
    (out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    checkpoint = out / "checkpoints" / "step-0000040"
    checkpoint.mkdir(parents=True)
    counts = {"samples": 30, "tokens": 4000, "demonstrations_dropped": 2, "too_long": 1, "left_out": 0}
    progress = {"total_steps": 40, "counts": {"RE-ARC": counts, "<b>mine": counts | {"samples": 10}}}
    (checkpoint / "progress.json").write_text(json.dumps(progress))
    return out
