"""A release's way into the competition: datasets, notebook, its run, its output, the submission, its score.

What was done is written into the release's state.json after every step, and what Kaggle has is read before anything is
sent: so any step that was interrupted, or whose answer got lost, is taken up where it was, and nothing is there twice.
Every version of a dataset has its content in its notes, the notebook has it in its source, and a submission in its
description.
"""

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from ..answers import read_submission
from ..clock import format_duration
from ..command import Say
from ..errors import MachineError, UserError, counted
from ..files import write_json
from ..puzzles import Task, read_json
from ..waiting import Wait, waiting
from .bundle import NOBODY, NOT_DATA, Release, dataset_content
from .kaggle_client import Dataset, Kaggle, KaggleSubmission, OutcomeUnknown, Refused

ENDED = ("COMPLETE", "ERROR", "CANCEL_ACKNOWLEDGED")
LOG_LINES = 30  # of a failed run are shown


class TimedOut(MachineError):
    """Kaggle took longer than we wait. Nothing is lost: the same command goes on waiting."""


@dataclass(frozen=True)
class PollPolicy:
    """How to wait for Kaggle."""

    limit_s: float = 14 * 3600.0  # for a run or a score: 12 h, and the queue
    first_s: float = 5.0  # between two looks; half as much again after each
    longest_s: float = 60.0
    line_s: float = 300.0  # between two lines that say what is waited for, where no row is seen
    unnamed_s: float = 300.0  # in which a dataset that is ready may yet show its notes; then its files are looked at

    def polls(self, what: str, say: Say) -> Iterator[Wait]:
        """Yields once for each poll, with growing pauses, until the limit; shows that it is waited for meanwhile.

        Raises:
            TimedOut: it took too long.
        """
        most, pause = format_duration(self.limit_s), self.first_s
        with waiting(say, f"waiting for {what}, {most} at most", quiet_s=self.line_s, line_s=self.line_s) as wait:
            while True:
                yield wait
                if wait.elapsed_s + pause > self.limit_s:
                    raise TimedOut(
                        f"{what} is not done after {self.limit_s:.0f} s: give the same command again to go on waiting"
                    )
                time.sleep(pause)
                pause = min(self.longest_s, 1.5 * pause)


class State:
    """What is known of a release on Kaggle, in state.json."""

    def __init__(self, release: Release):
        self.file = release.folder / "state.json"
        self.content: dict[str, Any] = read_json(self.file) if self.file.exists() else {}

    def __getitem__(self, key: str) -> Any:
        return self.content.get(key)

    def update(self, **what: Any) -> None:
        self.content |= what
        try:
            write_json(self.file, self.content)
        except OSError as error:
            raise MachineError(
                f"{self.file} cannot be written ({error.strerror}); give the same command again"
            ) from None


@dataclass(frozen=True)
class Pusher:
    """Takes a release through its steps. Each may be called at any time, and does what is missing.

    Args:
        dry_run: say what would be sent, and send nothing.
    """

    release: Release
    kaggle: Kaggle
    owner: str
    waiting: PollPolicy
    say: Say
    public: bool = False
    dry_run: bool = False

    @property
    def state(self) -> State:
        return State(self.release)

    @property
    def notebook_ref(self) -> str:
        return self._owned(self.release.notebook["id"])

    def _owned(self, ref: str) -> str:
        return f"{self.owner}/{ref.partition('/')[2]}" if ref.startswith(f"{NOBODY}/") else ref

    # ---- datasets ----

    def push_datasets(self) -> None:
        """Uploads the datasets that Kaggle lacks in this content, and waits until they are ready."""
        for folder in self.release.datasets:
            self._push_dataset(folder)

    def _push_dataset(self, folder: Path) -> None:
        about = json.loads((folder / "dataset-metadata.json").read_text())
        ref, notes = self._owned(about["id"]), f"content={dataset_content(folder)}"
        found = self.kaggle.dataset(ref)
        if found and found.private == self.public:
            kind, other = ("public", "private") if self.public else ("private", "public")
            raise UserError(
                f"dataset {ref} is to be {kind}, and is {other} on Kaggle: change it there, or set kaggle.name"
            )
        if found and found.status != "FAILED":
            found = self._ready(ref)  # a version is refused while the one before is worked on
        known = (self.state["datasets"] or {}).get(ref)
        if found and found.status == "READY" and (notes in found.notes or known == _pushed(found, notes)):
            self.say(f"dataset {ref} v{found.version} has this content")
        elif self.dry_run:
            self.say(f"would {'make a version of' if found else 'create'} dataset {ref}: {_size(folder)}")
            return
        else:
            before = found.version if found else 0
            self.say(f"{'a new version of' if found else 'creating'} dataset {ref}: uploading {_size(folder)}")
            if found:
                send = partial(self.kaggle.create_version, ref, folder, notes)
            else:
                private = not self.public
                send = partial(
                    self.kaggle.create_dataset,
                    ref,
                    about["title"],
                    about["licenses"][0]["name"],
                    folder,
                    notes,
                    private,
                )
            self._once(send, lambda: self._is_later(ref, before, notes), f"dataset {ref}")
            found = self._ready(ref, notes, folder, before)
            self.say(f"dataset {ref} v{found.version} is ready")
        self.state.update(datasets={**(self.state["datasets"] or {}), ref: _pushed(found, notes)})

    def _is_later(self, ref: str, version: int, notes: str) -> bool:
        found = self.kaggle.dataset(ref)
        return bool(found and found.version > version and notes in found.notes)

    def _ready(self, ref: str, notes: str = "", folder: Path | None = None, before: int = 0) -> Dataset:
        """The dataset, once its current version is ready; and is the one with these notes, which may show late.

        Args:
            folder: what was sent with the notes; where they never show, Kaggle's files are compared with it.
            before: the version that was the current one then.
        """
        shown, ready_s = "READY", math.inf
        for wait in self.waiting.polls(f"dataset {ref}", self.say):
            found = self.kaggle.dataset(ref)
            if found and found.status == "READY" and notes in found.notes:
                return found
            is_ready = bool(found and found.status == "READY")
            wait.note = "ready, without its notes" if is_ready else ""
            ready_s = min(ready_s, wait.elapsed_s) if is_ready else math.inf
            if found and folder and wait.elapsed_s - ready_s >= self.waiting.unnamed_s:
                return self._with_our_files(found, folder, before)
            if found and found.status != shown:
                shown = found.status
                self.say(f"dataset {ref}: {_words(shown)}")
            if found and found.status in ("FAILED", "DELETED"):
                raise MachineError(
                    f"Kaggle could not take in dataset {ref} ({found.status}): give the same command again"
                )
        raise AssertionError("the looks do not end")

    def _with_our_files(self, found: Dataset, folder: Path, before: int) -> Dataset:
        """The dataset, if its version is new and its files are ours as far as Kaggle tells: by name and size."""
        name, late = f"dataset {found.ref} v{found.version}", format_duration(self.waiting.unnamed_s)
        self.say(f"{name} is ready, and after {late} does not show what it was sent with: looking at its files")
        theirs, ours = self.kaggle.dataset_files(found.ref, found.version), _sizes(folder)
        if found.version > before and theirs == ours:
            self.say(
                f"{name} is newer than what was there before, and has our {len(ours)} files by name and size; Kaggle"
                " does not tell their content, which the notebook checks before it uses one"
            )
            return found
        others = sorted({file for file, _ in theirs.items() ^ ours.items()})
        why = f"other files than were sent: {', '.join(others)}" if others else "the version that was there before"
        raise MachineError(
            f"{name} is ready with {why}; look at https://www.kaggle.com/datasets/{found.ref}, then give the same"
            " command again, which sends the files once more"
        )

    def _once(self, send: Callable[[], Any], is_there: Callable[[], bool], what: str) -> Any:
        """Sends what must not be there twice. Where the answer got lost, it is looked for before it is sent again."""
        for _ in range(2):
            try:
                return send()
            except OutcomeUnknown as unsure:
                self.say(f"{unsure}; looking for {what}")
                for _, _ in zip(range(3), self.waiting.polls(what, self.say), strict=False):  # it may show late
                    if is_there():
                        return None
        raise MachineError(f"Kaggle's answers about {what} got lost twice: give the same command again, it looks first")

    # ---- the notebook and its run ----

    def push_notebook(self, again: bool = False) -> None:
        """Saves the notebook on Kaggle unless this content is there, which starts its run.

        Args:
            again: save it once more although it is there, as its run failed for a reason that passes.
        """
        ref = self.notebook_ref
        version, known = self._saved(ref), self.state["notebook"] or {}
        again = again and bool(self.state["run"]) and version == known.get("version")  # else that has been done
        if version and version != self.state["refused"] and not again:
            self.say(f"notebook {ref} v{version} has this content")
        elif self.dry_run:
            self.say(
                f"would save notebook {ref}, which runs it for up to {self.release.manifest['smoke_budget_s']:.0f} s"
            )
            return
        else:
            before, about = version or 0, self.release.notebook
            sources = [self._owned(each) for each in about["dataset_sources"]]
            self.say(f"saving notebook {ref}")
            metadata = {**about, "id": ref, "dataset_sources": sources}
            save = partial(self.kaggle.save_notebook, metadata, self.release.source)
            try:
                saved = self._once(save, lambda: (self._saved(ref) or 0) > before, f"notebook {ref}")
            except Refused:  # though with sources that it does not know, it is saved, and of no use
                self.state.update(refused=self._saved(ref))
                raise
            if saved and saved[0] != ref:
                raise MachineError(
                    f"Kaggle saved the notebook as {saved[0]}, not {ref}: delete it there, and set another kaggle.name"
                )
            version = saved[1] if saved else self._saved(ref)
            self.say(f"notebook {ref} v{version} is saved")
        if not self.state["notebook"] or self.state["notebook"]["version"] != version:
            self.state.update(notebook={"ref": ref, "version": version}, run=None, output=None)

    def _saved(self, ref: str) -> int | None:
        """The version of the notebook on Kaggle, if it has this content."""
        found = self.kaggle.notebook(ref)
        return found.version if found and self.release.content in found.source else None

    def wait_for_run(self) -> None:
        """Waits until the notebook's run has ended; raises if it failed.

        Raises:
            MachineError: it failed, with the end of its log.
            TimedOut: it goes on.
        """
        ref, version = self._pushed()
        shown = ""
        for wait in self.waiting.polls(f"the run of {ref} v{version}", self.say):
            status, why = self.kaggle.run_status(ref, version)
            wait.note = _words(status)
            if status != shown:
                self.say(f"run of {ref} v{version}: {_words(status)}")
                shown = status
            if status in ENDED:
                break
        self.state.update(run=status)
        if status != "COMPLETE":
            log = self._fetched(ref, version)[1]
            raise MachineError(
                f"the run of {ref} v{version} ended as {status}{': ' * bool(why)}{why}; mend that and push again, or"
                f" push with --again if it may pass. The end of its log:\n{_end(log)}"
            )

    def fetch(self, tasks: list[Task] | None) -> Path:
        """The run's submission, checked: it is whole, and of this content.

        Args:
            tasks: those that the run was shown; None: not known here, so only the form is checked.
        """
        ref, version = self._pushed()
        if self.state["output"] and (self.release.folder / self.state["output"]).is_file():
            return self.release.folder / self.state["output"]
        folder, log = self._fetched(ref, version)
        file = folder / "submission.json"
        if not file.is_file():
            raise MachineError(f"the run of {ref} v{version} left no submission.json. The end of its log:\n{_end(log)}")
        if f"content {self.release.content[:12]}" not in log:
            raise MachineError(
                f"the run of {ref} v{version} was of another content: see {folder}/log.txt; push with --again"
            )
        try:
            answers = read_submission(file, tasks)
        except UserError as error:
            raise MachineError(f"the run of {ref} v{version} left a bad submission: {error}") from None
        self.say(f"{file} is whole: {counted(len(answers), 'task')}")
        self.state.update(output=file.relative_to(self.release.folder).as_posix())
        return file

    def _fetched(self, ref: str, version: int) -> tuple[Path, str]:
        """Folder and log of what a run left."""
        folder = self.release.folder / "output" / f"v{version}"
        folder.parent.mkdir(exist_ok=True)
        part = Path(mkdtemp(dir=folder.parent, prefix=".part-"))
        try:
            log = self.kaggle.download_output(ref, version, part)
            (part / "log.txt").write_text(log)
            shutil.rmtree(folder, ignore_errors=True)
            part.rename(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return folder, log

    def _pushed(self) -> tuple[str, int]:
        notebook = self.state["notebook"]
        if not notebook:
            raise UserError("this release was not pushed yet: give the step push first")
        return notebook["ref"], notebook["version"]

    # ---- the submission ----

    def submit(self, yes: bool) -> KaggleSubmission | None:
        """Enters the competition with this version of the notebook, once; waits for its score. None: a dry run.

        Raises:
            UserError: without `yes`; without a run that ended well; entered before; or none is allowed now.
            MachineError: Kaggle refused it, or could not score it.
        """
        ref, version = self._pushed()
        if not self.state["output"]:
            raise UserError(
                f"the run of {ref} v{version} has not ended with a whole submission: give the step push first"
            )
        known = self.state["submission"] or {}
        if known.get("status"):
            outcome = f"score {known['score']}" if known["score"] else f"not scored ({known['error']})"
            raise UserError(f"{ref} v{version} was entered already: submission {known['ref']}, {outcome}; push another")
        number = known.get("ref") or self._entered(version)
        if not number:
            self._allow(ref, version, yes)
            if self.dry_run:
                return None
            number = self._enter(ref, version)
        self.state.update(submission={"ref": number})
        return self._scored(number)

    def _entered(self, version: int) -> int | None:
        """The submission of this version that Kaggle has."""
        said, all_of_it = self._description(version), self.kaggle.submissions(self.release.competition)
        number = next((found.ref for found in all_of_it if said in found.description), None)
        if number:
            self.say(f"v{version} was entered before, as submission {number}")
        return number

    def _description(self, version: int) -> str:
        return f"content={self.release.content[:16]} v{version}"

    def _allow(self, ref: str, version: int, yes: bool) -> None:
        """Says what would be done.

        Raises:
            UserError: it may not be done.
        """
        competition = self.release.competition
        allowed = self.kaggle.submission_quota(competition)
        self.say(
            f"submissions to {competition}: {allowed.left} left, {allowed.today} made today, {allowed.total} in all"
        )
        if allowed.left <= 0:
            raise UserError(
                f"no submission to {competition} is left now: try again tomorrow (UTC), if the rules allow more"
            )
        self.say(f"{'would enter' if self.dry_run else 'to enter'} {competition} with {ref} v{version}")
        if not yes and not self.dry_run:
            raise UserError("a submission cannot be taken back: give --yes to make it")

    def _enter(self, ref: str, version: int) -> int:
        competition = self.release.competition
        said = f"arc_solver {self._description(version)}"
        send = partial(self.kaggle.submit, competition, ref, version, "submission.json", said)
        try:
            number = send()
        except OutcomeUnknown as unsure:  # it is scarce: it is looked for, and never sent again without being asked to
            self.say(f"{unsure}; looking for the submission")
            for _, _ in zip(range(3), self.waiting.polls("the submission", self.say), strict=False):
                if found := self._entered(version):
                    return found
            raise MachineError(
                "nobody knows whether the submission arrived: look at the competition's page, then give the same"
                " command again; it is not sent if it is there"
            ) from None
        self.say(f"entered {competition} with {ref} v{version}: submission {number}")
        return number

    def _scored(self, number: int) -> KaggleSubmission:
        shown = ""
        for wait in self.waiting.polls(f"the score of submission {number}", self.say):
            found = self.kaggle.submission(number)
            wait.note = _words(found.status)
            if found.status != shown:
                self.say(f"submission {number}: {_words(found.status)}")
                shown = found.status
            if found.status != "PENDING":
                break
        self.state.update(
            submission={"ref": number, "status": found.status, "score": found.score, "error": found.error}
        )
        if found.status != "COMPLETE" or found.error or not found.score:
            why = found.error or "no score and no reason given; out of memory, disk or time is likely"
            raise MachineError(
                f"submission {number} was not scored ({found.status.lower()}: {why}); of the scored run nothing else is"
                " known, so rehearse with less memory or time, mend, and push again"
            )
        self.say(f"submission {number}: score {found.score}")
        return found


def _words(status: str) -> str:
    return status.lower().replace("_", " ")


def _pushed(found: Dataset, notes: str) -> dict[str, Any]:
    """What state.json has of a dataset."""
    return {"version": found.version, "notes": notes}


def _sizes(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in folder.iterdir() if file.name not in NOT_DATA}


def _size(folder: Path) -> str:
    sizes = _sizes(folder).values()
    return f"{counted(len(sizes), 'file')}, {sum(sizes) / 1e6:.1f} MB"


def _end(log: str) -> str:
    return "\n".join(log.splitlines()[-LOG_LINES:])
