"""bin/submit against a stand-in for Kaggle: the real command, the real client, in every version that is supported."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from forked import Forked, output_of
from kaggle_server import CLIENTS, COMPETITION, KEY, SIGNATURE, Request, Server, client_path, environment

from arc_solver.config import load_config
from arc_solver.release.bundle import CHECKOUT, Release, build
from arc_solver.release.check import check
from arc_solver.release.push import PollPolicy

NAME = "arc-solver-cpu"
OWNED = f"ada/{NAME}"
MUTATING = ("CreateDataset", "CreateDatasetVersion", "SaveKernel", "CreateCodeSubmission")
GRID = [[0]]


@pytest.fixture(scope="module")
def releases(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("releases")


def make(releases: Path, *overrides: str) -> Path:
    config = load_config(CHECKOUT / "configs" / "kaggle-cpu.toml", overrides)
    return build(config, releases, lambda line: None).folder


@pytest.fixture(scope="module")
def built(releases) -> Path:
    return make(releases)


@pytest.fixture
def release(built, tmp_path) -> Release:
    return Release(Path(shutil.copytree(built, tmp_path / "release")))


@pytest.fixture
def server(release):
    with Server() as server:
        server.log = lambda saved: f"content {release.content[:12]}, commit abc\nsolved\n"
        yield server


class Command:
    """bin/submit RELEASE, in a process of its own that knows only the stand-in."""

    def __init__(self, server: Server, release: Release, folder: Path, client: str = "installed"):
        self.server, self.release = server, release
        self.client = client_path(client)
        self.env = environment(server, folder / "client", self.client)

    def start(self, *words: str) -> Forked | subprocess.Popen[str]:
        steps = [str(self.release.folder), "--poll", "0.02s", "--timeout", "20s", *words]
        if not self.client:
            return Forked("arc_solver.submit", steps, env=self.env)
        command = [sys.executable, "-P", "-m", "arc_solver.submit", *steps]
        return subprocess.Popen(command, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def __call__(self, *words: str, expect: int = 0) -> str:
        out, errors = output_of(self.start(*words), expect)
        said = errors + out
        assert "Traceback" not in said
        assert KEY not in said
        assert SIGNATURE not in said
        return said

    @property
    def state(self) -> dict:
        return json.loads((self.release.folder / "state.json").read_text())


@pytest.fixture
def command(server, release, tmp_path) -> Command:
    return Command(server, release, tmp_path)


def made(server: Server) -> dict[str, int]:
    """What is on Kaggle."""
    return {
        "versions": sum(len(dataset.versions) for dataset in server.datasets.values()),
        "notebooks": sum(map(len, server.notebooks.values())),
        "submissions": len(server.entries),
    }


def nothing_leaks(server: Server) -> None:
    assert {request.host for request in server.journal} == {"localhost"}
    assert not server.calls("CONNECT")
    assert all(request.body["isPrivate"] for request in server.calls("CreateDataset"))
    for request in server.calls("SaveKernel"):
        assert request.body["isPrivate"] is True
        assert request.body.get("enableInternet", None) is False
    assert KEY not in json.dumps([request.body for request in server.journal])


@pytest.mark.parametrize("client", CLIENTS)
def test_from_an_empty_account_to_a_score(client, server, release, tmp_path):
    command = Command(server, release, tmp_path, client)
    said = command("push")
    assert "run of ada/arc-solver-cpu v1: complete" in said
    assert made(server) == {"versions": 1, "notebooks": 1, "submissions": 0}
    files = {f.name: f.read_bytes() for f in release.datasets[0].iterdir() if f.name != "dataset-metadata.json"}
    assert server.datasets[f"{OWNED}-wheels"].versions[0].files == files
    assert (release.folder / command.state["output"]).is_file()

    before = [request.call for request in server.journal]
    assert "has this content" in command("push")
    after = [request.call for request in server.journal[len(before) :]]
    assert not {*after} & {*MUTATING, "StartBlobUpload", "PUT"}

    said = command("submit", expect=2)
    assert "1 left" in said
    assert "--yes" in said
    assert not server.entries
    assert "score 12.5" in command("submit", "--yes")
    assert made(server) == {"versions": 1, "notebooks": 1, "submissions": 1}
    assert "entered already: submission 4000000, score 12.5" in command("submit", "--yes", expect=2)
    assert made(server)["submissions"] == 1
    nothing_leaks(server)


def test_another_content_makes_versions_of_what_changed(command, server, releases, tmp_path):
    command("push")
    command.release = Release(Path(shutil.copytree(make(releases, "kaggle.time_budget=9h"), tmp_path / "other")))
    server.log = lambda saved: f"content {command.release.content[:12]}\n"
    command("push")
    assert made(server) == {"versions": 2, "notebooks": 2, "submissions": 0}
    assert command.state["notebook"]["version"] == 2


@pytest.mark.parametrize(
    "call",
    [
        "GetDataset",
        "StartBlobUpload",
        "PUT",
        "CreateDataset",
        "GetDatasetStatus",
        "GetKernel",
        "SaveKernel",
        "GetKernelSessionStatus",
        "ListKernelSessionOutput",
        "GET",
        "GetSubmissionLimits",
        "ListSubmissions",
        "CreateCodeSubmission",
        "GetSubmission",
    ],
)
def test_killed_at_any_step_and_continued_nothing_is_twice_or_missing(call, command, server):
    """Killed when Kaggle has done what was asked, and before it could say so."""
    running: list[Forked | subprocess.Popen[str]] = []

    def kill(request: Request) -> None:
        if request.call == call and running:
            running.pop().send_signal(signal.SIGKILL)

    server.hook = kill
    for words in (("push",), ("submit", "--yes")):
        process = command.start(*words)
        running[:] = [process]
        process.communicate(timeout=120)
        if process.returncode != 0:
            assert process.returncode == -signal.SIGKILL
            command(*words)
        running.clear()
    assert made(server) == {"versions": 1, "notebooks": 1, "submissions": 1}
    assert command.state["submission"]["score"] == "12.5"
    nothing_leaks(server)


PASSING = [  # the call, and what goes wrong with it once or twice; the command goes on by itself
    ("GetDataset", "status", {"code": 429, "retry_after": 0}),
    ("GetDataset", "drop", {}),
    ("StartBlobUpload", "status", {"code": 503}),
    ("PUT", "cut", {"at": 1000}),
    ("PUT", "cut", {"at": 1000, "code": 503}),
    ("PUT", "drop", {}),
    ("CreateDataset", "status", {"code": 429, "retry_after": 0}),
    ("CreateDataset", "drop", {}),
    ("CreateDataset", "lose", {}),
    ("CreateDataset", "late", {"code": 503}),
    ("CreateDataset", "garbage", {}),
    ("GetDatasetStatus", "status", {"code": 503}),
    ("GetKernel", "drop", {}),
    ("SaveKernel", "status", {"code": 429, "retry_after": 0}),
    ("SaveKernel", "drop", {}),
    ("SaveKernel", "lose", {}),
    ("SaveKernel", "late", {"code": 503}),
    ("GetKernelSessionStatus", "status", {"code": 429, "retry_after": 0}),
    ("GetKernelSessionStatus", "status", {"code": 503}),
    ("ListKernelSessionOutput", "drop", {}),
    ("GET", "cut", {"at": 10}),
    ("GET", "status", {"code": 503}),
    ("GetSubmissionLimits", "status", {"code": 503}),
    ("ListSubmissions", "drop", {}),
    ("CreateCodeSubmission", "status", {"code": 429, "retry_after": 0}),
    ("CreateCodeSubmission", "lose", {}),
    ("CreateCodeSubmission", "late", {"code": 503}),
    ("GetSubmission", "status", {"code": 429, "retry_after": 0}),
    ("GetSubmission", "drop", {}),
]


@pytest.mark.parametrize(("call", "kind", "how"), PASSING, ids=lambda value: str(value))
def test_what_passes_is_got_over_and_nothing_is_twice(call, kind, how, command, server):
    server.fault(call, kind, **how)
    command("push")
    command("submit", "--yes")
    assert made(server) == {"versions": 1, "notebooks": 1, "submissions": 1}
    assert any(request.fault == kind for request in server.journal)


def test_a_submission_whose_request_got_lost_is_not_sent_again_unasked(command, server):
    command("push")
    server.fault("CreateCodeSubmission", "drop")
    said = command("submit", "--yes", expect=1)
    assert "nobody knows whether the submission arrived" in said
    assert made(server)["submissions"] == 0
    command("submit", "--yes")
    assert made(server)["submissions"] == 1


REFUSED = [  # call, fault, what is said, how many notebooks are there afterwards
    ("CreateDataset", "error", {"words": "The slug is in use"}, "The slug is in use", 0),
    ("CreateDataset", "status", {"code": 401}, "auth login", 0),
    ("SaveKernel", "error", {"words": "Maximum batch GPU session count of 2 reached."}, "wait until one of your", 0),
    ("SaveKernel", "status", {"code": 409, "message": "conflict"}, "title", 0),
    ("SaveKernel", "invalid", {"field": "invalidDatasetSources", "refs": ["a/b"]}, "dataset sources a/b", 1),
    ("SaveKernel", "invalid", {"field": "invalidModelSources", "refs": ["a/b/c/d/1"]}, "model sources a/b/c/d/1", 1),
    ("SaveKernel", "invalid", {"field": "invalidCompetitionSources", "refs": ["arc"]}, "competition sources arc", 1),
]


@pytest.mark.parametrize(("call", "kind", "how", "says", "notebooks"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_kaggle_refuses_is_said_and_can_be_pushed_again(call, kind, how, says, notebooks, command, server):
    server.fault(call, kind, **how)
    said = command("push", expect=2 if how.get("code") == 401 else 1)
    assert says in said.replace("\n", " ")
    assert made(server)["notebooks"] == notebooks
    command("push")
    assert made(server) == {"versions": 1, "notebooks": notebooks + 1, "submissions": 0}


@pytest.mark.parametrize("ending", ["ERROR", "CANCEL_ACKNOWLEDGED"])
def test_a_run_that_failed_is_shown_and_is_pushed_again_only_when_asked(ending, command, server, release):
    server.run_endings.append((ending, "Notebook Threw Exception"))
    server.log = lambda saved: f"content {release.content[:12]}\nRuntimeError: 1 GPU instead of 4\n"
    for _ in range(2):
        said = command("push", expect=1)
        assert ending in said
        assert "Notebook Threw Exception" in said
        assert "1 GPU instead of 4" in said
        assert "--again" in said
    assert made(server)["notebooks"] == 1
    assert "not ended with a whole submission" in command("submit", "--yes", expect=2)
    ended, server._ended = server._ended, lambda saved: False
    for _ in range(2):
        command("push", "--again", "--timeout", "1s", expect=4)
        assert made(server)["notebooks"] == 2
    server._ended = ended
    command("push", "--again")
    assert made(server)["notebooks"] == 2


BAD_OUTPUTS = [
    ({}, "left no submission.json"),
    ({"submission.json": b"<html>"}, "bad submission"),
    ({"submission.json": b'{"aa": [{"attempt_1": [[0]]}]}'}, "attempt_2"),
    ({"submission.json": b"{}", "../../evil": b"x"}, "evil"),
]


@pytest.mark.parametrize(("outputs", "says"), BAD_OUTPUTS, ids=["none", "html", "half", "evil"])
def test_a_wrong_output_is_refused(outputs, says, command, server, release):
    server.outputs = lambda saved: outputs
    assert says in command("push", expect=1)
    assert "not ended with a whole submission" in command("submit", "--yes", expect=2)
    assert not list(release.folder.rglob("evil"))
    assert not list(release.folder.parent.glob("*evil*"))


def test_the_output_of_another_content_is_refused(command, server):
    server.log = lambda saved: "content 0123456789ab\n"
    assert "another content" in command("push", expect=1)


def test_the_output_is_checked_against_the_tasks_that_were_shown(command, server, tmp_path):
    task = {"train": [{"input": GRID, "output": GRID}], "test": [{"input": GRID}]}
    for name in ("00000000", "11111111"):
        (tmp_path / f"{name}.json").write_text(json.dumps({name: task}))
    assert "answers none of the tasks that --tasks holds (1): it was made for others" in command(
        "push", "--tasks", str(tmp_path / "11111111.json"), expect=1
    )
    command("push", "--tasks", str(tmp_path / "00000000.json"))


def test_a_slug_that_kaggle_made_otherwise_is_noticed(command, server):
    save = server._save_kernel
    server._save_kernel = lambda **body: save(**{**body, "new_title": "another title"})
    said = command("push", expect=1)
    assert "ada/another-title, not ada/arc-solver-cpu" in said


def test_no_submission_is_left(command, server):
    command("push")
    server.left_today = 0
    said = command("submit", "--yes", expect=2)
    assert "0 left" in said
    assert "tomorrow" in said
    assert not server.calls("CreateCodeSubmission")


@pytest.mark.parametrize(
    ("ending", "says"),
    [
        ({"status": "COMPLETE"}, "no score and no reason"),
        ({"status": "COMPLETE", "errorDescription": "Notebook Exceeded Allowed Compute"}, "Exceeded Allowed Compute"),
        ({"status": "ERROR", "errorDescription": "Submission Scoring Error"}, "Submission Scoring Error"),
    ],
    ids=["no score", "compute", "scoring"],
)
def test_a_submission_without_a_score_is_a_failure(ending, says, command, server):
    command("push")
    server.entry_endings.append(ending)
    assert says in command("submit", "--yes", expect=1)
    assert "entered already" in command("submit", "--yes", expect=2)
    assert made(server)["submissions"] == 1


def test_what_takes_too_long_is_waited_for_later(command, server):
    server.polls = 100_000
    assert "same command again" in command("push", "--timeout", "1s", expect=4)
    server.polls = 2
    command("push")
    assert made(server) == {"versions": 1, "notebooks": 1, "submissions": 0}


def test_a_wait_says_what_for_and_how_long():
    said: list[str] = []
    policy = PollPolicy(limit_s=14 * 3600.0, first_s=0.001, line_s=0.001)
    for wait in policy.polls("the run of ada/it v1", said.append):
        wait.note = "running"
        if any("running" in line for line in said):
            break
    assert "waiting for the run of ada/it v1, 14 h at most ... running, 1 s so far" in said


def test_a_dataset_that_never_shows_its_notes_is_known_by_its_files(command, server):
    server.shows_notes, server.page = False, 2
    said = command("push")
    files = len(server.datasets[f"{OWNED}-wheels"].versions[0].files)
    assert "is ready, and after 1 s does not show what it was sent with: looking at its files" in said
    assert f"v1 is newer than what was there before, and has our {files} files by name and size" in said
    assert "v1 has this content" in command("push")
    assert made(server) == {"versions": 1, "notebooks": 1, "submissions": 0}


@pytest.mark.parametrize("case", ["other size", "missing", "old version"])
def test_a_dataset_without_its_notes_and_with_other_files_is_not_taken(case, command, server):
    server.polls, files_of = 0, server._files
    if case == "old version":
        command("push")
        (command.release.folder / "state.json").unlink()
        server._create_dataset_version = lambda **body: {}  # which Kaggle takes, and nothing comes of it
    server.shows_notes = False
    if case != "old version":
        server._files = lambda files: (files_of(files) if case == "other size" else {}) | {"config.json": b"{}"}
    said = command("push", expect=1)
    says = {"other size": "other files than were sent: config.json", "missing": "requirements.lock"}
    assert says.get(case, "is ready with the version that was there before") in said
    assert f"https://www.kaggle.com/datasets/{OWNED}-wheels, then give the same command again" in said
    assert len(server.notebooks) == (case == "old version")


def test_ctrl_c_says_how_to_go_on(command, server):
    reached = []
    server.polls = 100_000

    def interrupt(request: Request) -> None:
        if request.call == "GetDatasetStatus" and not reached:
            reached.append(process.send_signal(signal.SIGINT))

    process = command.start("push")
    server.hook = interrupt
    said = "".join(output_of(process, expect=1))
    assert "the same command again" in said
    assert "Traceback" not in said


def test_dry_runs_send_nothing(command, server):
    said = command("push", "--dry-run")
    assert "would create dataset ada/arc-solver-cpu-wheels" in said
    assert "would save notebook ada/arc-solver-cpu" in said
    assert not {request.call for request in server.journal} & {*MUTATING, "StartBlobUpload", "PUT"}
    command("push")
    said = command("submit", "--dry-run")
    assert f"would enter {COMPETITION}" in said
    assert not server.entries


def test_json_is_one_object_and_status_says_what_is_known(command, server):
    said = command("push", "--json").splitlines()[-1]
    assert json.loads(said)["notebook"] == {"ref": OWNED, "version": 1}
    command("submit", "--yes")
    status = Forked("arc_solver.submit", ["status", command.release.folder, "--json"])  # no server, no credentials
    known = json.loads(output_of(status)[0])
    assert known["submission"]["score"] == "12.5"
    assert known["run"] == "COMPLETE"


def test_a_public_dataset_is_not_used_for_what_is_private(command, server):
    command("push")
    server.datasets[f"{OWNED}-wheels"].private = False
    assert "is to be private, and is public" in command("push", expect=2)


def test_an_error_is_one_object_too(command, server):
    server.fault("SaveKernel", "error", words="Maximum batch GPU session count of 2 reached.")
    said = command("push", "--json", expect=1).splitlines()
    (found,) = [json.loads(line) for line in said if line.startswith("{")]
    assert "session count" in found["error"]


def test_two_do_not_work_on_one_release(command, server):
    server.polls = 100_000
    first = command.start("push")
    try:
        while not server.calls("GetDatasetStatus"):
            assert first.poll() is None
        assert "another bin/submit works on" in command("push", expect=2)
    finally:
        first.kill()
        first.communicate()


@pytest.mark.parametrize("damage", ["changed", "gone", "more"])
def test_a_damaged_release_is_refused_and_built_again(damage, command, server, releases):
    wheels = command.release.folder / "datasets" / f"{NAME}-wheels"
    if damage == "gone":
        (wheels / "manifest.json").unlink()
    else:
        (wheels / ("config.json" if damage == "changed" else "more.txt")).write_text("{}")
    for step in ("check", "push"):
        command(step, expect=2)
    assert not server.journal
    shutil.copytree(command.release.folder, make(releases), dirs_exist_ok=True)
    whole = Release(make(releases))
    assert not (whole.folder / "datasets" / f"{NAME}-wheels" / "more.txt").exists()
    assert check(whole.folder, load_config(CHECKOUT / "configs" / "kaggle-cpu.toml")).complaints == ()


def test_what_is_wrong_with_a_release_is_a_line_each(command):
    (command.release.folder / "datasets" / "stray").write_text("")
    said = command("check", expect=2)
    lines = [line.strip() for line in said.splitlines() if line.startswith("  ")]
    assert f"{len(lines)} things are wrong in {command.release.folder}:" in said and len(lines) > 1
    assert "datasets/stray is in no dataset, and would not travel" in lines


def test_a_release_that_was_never_pushed_is_not_submitted(command, server):
    assert "not pushed yet" in command("submit", "--yes", expect=2)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["none.toml"], "none.toml does not exist"),
        (["{cpu}", "pull"], "pull is no step; they are build, check, dry-run, push, submit"),
        (["build", "{cpu}"], "the config comes first: bin/submit {cpu} build"),
        ([], "bin/submit needs a config"),
        (["."], "is no folder that bin/submit built"),
        (["{cpu}", "push", "--poll", "0s"], "more than 0s"),
        (["{cpu}", "build", "kaggle.time_budget=13h"], "kaggle.time_budget is at least 20 s and under 12 h"),
        (["{cpu}", "push", "--timeout", "soon"], "is no duration"),
        (["{cpu}", "dry-run", "--clock", "0"], "--clock"),
        (["{cpu}", "build", "kaggle.machine=H200"], "kaggle.machine"),
        (["{cpu}", "build", "kaggle.name=Arc_Solver"], "kaggle.name"),
        (["{cpu}", "check", "model.quantize=4bit"], "model.quantize needs bitsandbytes"),
        (["status"], "needs the folder of a release"),
        (["status", "nowhere"], "no folder that bin/submit built"),
    ],
)
def test_what_a_user_gets_wrong_is_one_sentence(words, says, tmp_path, server):
    cpu = str(CHECKOUT / "configs" / "kaggle-cpu.toml")
    words = [word.format(cpu=cpu) for word in words]
    env = environment(server, tmp_path / "client", client_path("installed"))
    process = Forked("arc_solver.submit", words, cwd=tmp_path, env=env)
    (line,) = output_of(process, expect=2)[1].splitlines()
    assert says.format(cpu=cpu) in line
    assert not server.journal
