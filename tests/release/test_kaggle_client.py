"""The real client against the stand-in. It signs in when it is imported, so it has a process of its own."""

import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from kaggle_server import (
    CLIENTS,
    COMPETITION,
    KEY,
    SESSIONS_FULL,
    SIGNATURE,
    SUBMISSION,
    TOKEN,
    Server,
    client_path,
    environment,
)

from arc_solver.errors import MachineError
from arc_solver.release.retry import RequestFailed, RetryingSender, RetryPolicy, _asked_wait_s, one_line, safe_path

WHEELS, NOTEBOOK = "ada/arc-solver-wheels", "ada/arc-solver"
LOOP = """
import contextlib, dataclasses, io, json, sys
from pathlib import Path
from arc_solver.errors import MachineError, UserError
from arc_solver.release.kaggle_client import DownloadLimits, connect
from arc_solver.release.retry import RetryPolicy

def plain(value):
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else str(value)

for line in sys.stdin:
    code, policy = json.loads(line)
    said, printed, answer = [], io.StringIO(), {}
    try:
        with contextlib.redirect_stdout(printed):
            kaggle = connect(RetryPolicy(**policy), said.append)
            answer["value"] = eval(code)
    except (MachineError, UserError) as error:
        answer |= {"error": type(error).__name__, "words": str(error), "code": getattr(error, "code", None)}
    print(json.dumps({**answer, "said": said, "printed": printed.getvalue()}, default=plain), flush=True)
"""
HURRY = {"tries": 4, "first_wait_s": 0.01, "longest_wait_s": 0.02, "limit_s": 5, "silence_s": 5}


@dataclass(frozen=True)
class Answer:
    value: Any = None
    error: str = ""
    words: str = ""
    code: int | None = None
    said: list[str] = field(default_factory=list)
    printed: str = ""


class Driver:
    """Asks one version of the client, in a process that is kept."""

    def __init__(self, env: dict[str, str]) -> None:
        command = [sys.executable, "-P", "-c", LOOP]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, stderr=pipe, text=True)

    def __call__(self, code: str, **policy: float) -> Answer:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps([code, HURRY | policy]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, self.close()
        answer = Answer(**json.loads(line))
        assert answer.printed == ""
        assert not any(secret in f"{answer.words} {answer.said}" for secret in (KEY, TOKEN, SIGNATURE))
        return answer

    def close(self) -> str:
        return self.process.communicate()[1]


@pytest.fixture(scope="module")
def shared():
    with Server() as server:
        yield server


@pytest.fixture(scope="module", params=CLIENTS)
def driver(request, shared, tmp_path_factory):
    asked = Driver(environment(shared, tmp_path_factory.mktemp("client"), client_path(request.param)))
    yield asked
    assert asked.close() == "", "the client wrote on stderr"


@pytest.fixture
def server(shared):
    shared.reset()
    yield shared
    assert {request.host for request in shared.journal} <= {"localhost"}
    assert not shared.calls("CONNECT")


@pytest.fixture
def ask(driver, server):
    return driver


@pytest.fixture
def folder(tmp_path) -> Path:
    """A dataset."""
    made = tmp_path / "dataset"
    made.mkdir()
    (made / "dataset-metadata.json").write_text("{}")
    (made / "SHA256SUMS").write_text("sums\n")
    (made / "solver.whl").write_bytes(bytes(range(256)) * 40)
    return made


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "dataset-metadata.json"}


def create(folder: Path) -> str:
    return f"kaggle.create_dataset({WHEELS!r}, 'arc-solver-wheels', 'CC0-1.0', Path({str(folder)!r}), 'content=a')"


def version(folder: Path) -> str:
    return f"kaggle.create_version({WHEELS!r}, Path({str(folder)!r}), 'content=b')"


SOURCE = json.dumps(
    {
        "cells": [{"cell_type": "code", "source": ["import sys\n", "print(1)"], "outputs": [{"text": "1"}]}],
        "nbformat": 4,
    }
)
METADATA = {
    "id": NOTEBOOK,
    "title": "arc-solver",
    "code_file": "main.ipynb",
    "language": "python",
    "kernel_type": "notebook",
    "is_private": True,
    "enable_internet": False,
    "enable_gpu": True,
    "machine_shape": "NvidiaL4",
    "competition_sources": [COMPETITION],
}


def save(**changes: Any) -> str:
    return f"kaggle.save_notebook({METADATA | changes!r}, {SOURCE!r})"


SUBMIT = f"kaggle.submit({COMPETITION!r}, {NOTEBOOK!r}, 1, 'submission.json', 'content=a')"
RUN = f"kaggle.run_status({NOTEBOOK!r}, 1)"


def ended_run(ask: Driver, server: Server) -> None:
    """A notebook whose run has ended."""
    server.polls = 0
    assert ask(f"[{save()}, {RUN}]").value == [[NOTEBOOK, 1], ["COMPLETE", ""]]


def fetch(folder: Path, limits: str = "None") -> str:
    return f"kaggle.download_output({NOTEBOOK!r}, 1, Path({str(folder)!r}), {limits})"


def test_the_version_of_the_client(request, ask):
    version = ask("__import__('kaggle').__version__").value
    assert version == "2.2.5" if "2.2.5" in request.node.name else version.startswith("2.2.")


# Datasets


def test_datasets(ask, server, folder):
    look = f"kaggle.dataset({WHEELS!r})"
    assert ask(look).value is None
    assert ask(create(folder)).value is None
    first = {"ref": WHEELS, "version": 1, "notes": "content=a", "private": True}
    assert [ask(look).value for _ in range(3)] == [
        first | {"status": status} for status in ("BLOBS_RECEIVED", "BLOBS_DECOMPRESSED", "READY")
    ]
    dataset = server.datasets[WHEELS]
    assert (dataset.private, dataset.licence, dataset.title) == (True, "CC0-1.0", "arc-solver-wheels")
    assert dataset.versions[0].files == files_of(folder)

    (folder / "another.whl").write_bytes(b"")
    assert ask(version(folder)).error == ""
    assert ask(look).value == {"ref": WHEELS, "version": 2, "notes": "content=b", "private": True} | {
        "status": "BLOBS_RECEIVED"
    }
    assert [len(each.files) for each in dataset.versions] == [2, 3]
    assert dataset.versions[1].files == files_of(folder)


def test_the_files_of_a_version(ask, server, folder):
    server.page = 1
    ask(create(folder))
    sizes = {name: len(content) for name, content in files_of(folder).items()}
    assert ask(f"kaggle.dataset_files({WHEELS!r}, 1)").value == sizes
    assert len(server.calls("ListDatasetFiles")) == len(sizes) == 2


def test_notes_are_found_where_kaggle_lists_no_versions(ask, server, folder, monkeypatch):
    server.polls = 0
    ask(f"[{create(folder)}, kaggle.dataset({WHEELS!r}), {version(folder)}]")
    plain = server._get_dataset
    monkeypatch.setattr(server, "_get_dataset", lambda **name: plain(**name) | {"versions": []})
    found = ask(f"kaggle.dataset({WHEELS!r})").value
    assert (found["version"], found["notes"]) == (2, "content=b")


def test_a_public_dataset(ask, server, folder):
    ask(create(folder).replace("'content=a'", "'content=a', private=False"))
    assert ask(f"kaggle.dataset({WHEELS!r})").value["private"] is False


def test_a_version_while_the_first_is_worked_on(ask, server, folder):
    ask(create(folder))
    answer = ask(version(folder))
    assert (answer.error, answer.code) == ("Refused", 403)
    assert len(server.datasets[WHEELS].versions) == 1


def test_a_name_that_is_taken(ask, server, folder):
    ask(create(folder))
    answer = ask(create(folder))
    assert (answer.error, answer.code) == ("Refused", 200) and "already in use" in answer.words
    assert len(server.datasets[WHEELS].versions) == 1


def test_a_folder_in_a_dataset(ask, server, folder):
    (folder / "more").mkdir()
    assert ask(create(folder)).error == "UserError"
    assert not server.journal


@pytest.mark.parametrize("code", [0, 503])
@pytest.mark.parametrize("at", [0, 1, 9_999])
def test_a_cut_upload_goes_on_where_it_was_cut(ask, server, folder, code, at):
    (folder / "SHA256SUMS").unlink()
    server.fault("PUT", "cut", at=at, code=code)
    server.fault("PUT", "status")  # asking how much has arrived fails too
    assert ask(create(folder)).error == ""
    assert server.datasets[WHEELS].versions[0].files == files_of(folder)
    rest = f"bytes {at}-10239/10240" if at else ""
    assert [put.range for put in server.calls("PUT")] == ["", "bytes */10240", "bytes */10240", rest]
    assert len(server.calls("StartBlobUpload")) == 1


def test_an_upload_whose_answer_is_lost(ask, server, folder):
    server.fault("PUT", "lose")
    assert ask(create(folder)).error == ""
    assert server.datasets[WHEELS].versions[0].files == files_of(folder)
    assert [put.range for put in server.calls("PUT")] == ["", "bytes */5", ""]


def test_an_upload_whose_place_expired(ask, server, folder):
    server.fault("PUT", "cut", at=1)
    server.fault("PUT", "expire")
    assert ask(create(folder)).error == ""
    assert server.datasets[WHEELS].versions[0].files == files_of(folder)
    assert len(server.calls("StartBlobUpload")) == 3


def test_an_upload_that_gets_on_is_never_given_up(ask, server, folder):
    (folder / "SHA256SUMS").unlink()
    for _ in range(12):
        server.fault("PUT", "cut", at=10)
        server.fault("PUT", "none")  # the question how much has arrived
    assert ask(create(folder), tries=3).error == ""
    assert server.datasets[WHEELS].versions[0].files == files_of(folder)
    assert len([put for put in server.calls("PUT") if "*" not in put.range]) == 13


@pytest.mark.parametrize(("code", "error"), [(400, "Refused"), (503, "Unreachable")])
def test_without_a_file_there_is_no_version(ask, server, folder, code, error):
    server.fault("PUT", "status", times=99, code=code)
    assert ask(create(folder)).error == error
    assert not server.datasets and not server.calls("CreateDataset")


# Notebooks


def test_notebooks(ask, server):
    look = f"kaggle.notebook({NOTEBOOK!r})"
    server.models.add("ada/model/pyTorch/small/1")
    assert ask(look).value is None
    assert ask(save(model_sources=["ada/model/pyTorch/small/1"])).value == [NOTEBOOK, 1]
    assert ask(save()).value == [NOTEBOOK, 2]
    assert [(call.body["isPrivate"], call.body["enableInternet"]) for call in server.calls("SaveKernel")] == [
        (True, False)
    ] * 2
    saved = server.notebooks[NOTEBOOK][0]
    assert saved.settings["machine_shape"] == "NvidiaL4" and saved.settings["enable_gpu"] is True
    assert saved.settings["model_data_sources"] == ["ada/model/pyTorch/small/1"]
    assert json.loads(saved.source)["cells"] == [{"cell_type": "code", "source": "import sys\nprint(1)", "outputs": []}]
    found = ask(look).value
    assert json.loads(found.pop("source")) == json.loads(saved.source)
    assert found == {"ref": NOTEBOOK, "version": 2, "private": True, "internet": False}


def test_what_the_metadata_leaves_out_is_private_and_without_internet(ask, server):
    fields = {name: METADATA[name] for name in ("id", "title", "language", "kernel_type")}
    assert ask(f"kaggle.save_notebook({fields!r}, {SOURCE!r})").value == [NOTEBOOK, 1]
    (call,) = server.calls("SaveKernel")
    assert (call.body["isPrivate"], call.body["enableInternet"]) == (True, False)


def test_a_public_notebook_with_internet(ask, server):
    ask(save(is_private=False, enable_internet=True))
    found = ask(f"kaggle.notebook({NOTEBOOK!r})").value
    assert (found["private"], found["internet"]) == (False, True)


def test_a_name_that_kaggle_makes_from_the_title(ask, server):
    assert ask(save(title="Another Title")).value == ["ada/another-title", 1]


@pytest.mark.parametrize("kind", ["Dataset", "Competition", "Kernel", "Model"])
def test_a_source_that_is_unknown(ask, server, kind):
    server.fault("SaveKernel", "invalid", field=f"invalid{kind}Sources", refs=["ada/nothing"])
    answer = ask(save())
    assert (answer.error, answer.code) == ("Refused", 200)
    assert "ada/nothing" in answer.words and kind.lower() in answer.words


def test_a_tag_that_is_unknown(ask, server):
    answer = ask(save(keywords=["nonsense"]))
    assert (answer.error, answer.code) == ("Refused", 200) and "nonsense" in answer.words


def test_too_many_sessions(ask, server):
    server.fault("SaveKernel", "error", words=SESSIONS_FULL)
    answer = ask(save())
    assert (answer.error, answer.code) == ("Refused", 200)
    assert SESSIONS_FULL in answer.words and "running notebooks has ended" in answer.words
    assert not server.notebooks


def test_runs_are_asked_for_by_their_version(ask, server):
    server.run_endings.extend([("ERROR", "Your notebook\nfailed"), ("CANCEL_ACKNOWLEDGED", "")])
    ask(f"[{save()}, {save()}]")
    asked = [ask(f"[kaggle.run_status({NOTEBOOK!r}, n) for n in (1, 2)]").value for _ in range(5)]
    assert asked == [
        [["QUEUED", ""]] * 2,
        [["QUEUED", ""]] * 2,
        [["RUNNING", ""]] * 2,
        [["RUNNING", ""]] * 2,
        [["ERROR", "Your notebook failed"], ["CANCEL_ACKNOWLEDGED", ""]],
    ]
    labels = [call.body["versionLabel"] for call in server.calls("GetKernelSessionStatus")]
    assert labels == ["v1", "v2"] * 5


def test_a_run_that_is_not_there(ask, server):
    assert ask(RUN).code == 403
    ask(save())
    assert ask(f"kaggle.run_status({NOTEBOOK!r}, 2)").code == 404


# Outputs


def test_outputs(ask, server, tmp_path):
    outputs = {"submission.json": b"{}", "logs/a.txt": b"a", "logs/deep/b.txt": b"", "big": bytes(3_000_000)}
    server.outputs = lambda saved: outputs if saved.number == 1 else {"submission.json": b"of the second version"}
    server.log = lambda saved: f"first line of v{saved.number}\nsecond\n"
    server.page = 3
    ended_run(ask, server)
    ask(save())
    (tmp_path / "submission.json").write_bytes(b"older and longer")
    assert ask(fetch(tmp_path)).value == "first line of v1\nsecond\n"
    found = {str(file.relative_to(tmp_path)): file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert found == outputs
    assert {call.body["versionLabel"] for call in server.calls("ListKernelSessionOutput")} == {"v1"}


def test_a_log_that_is_none_of_lines(ask, server, tmp_path, monkeypatch):
    server.outputs = lambda saved: {}
    ended_run(ask, server)
    monkeypatch.setattr(server, "_list_kernel_session_output", lambda **asked: {"log": "plain words"})
    assert ask(fetch(tmp_path)).value == "plain words"


@pytest.mark.parametrize(
    "name", ["../out", "a/../../out", "/etc/out", "a\\out", "..\\out", "a//out", "", ".", "..", "a/", "a\0b", "a\nb"]
)
def test_names_that_lead_elsewhere(ask, server, tmp_path, name):
    server.outputs = lambda saved: {"submission.json": b"{}", name: b"x"}
    ended_run(ask, server)
    target = tmp_path / "in" / "here"
    target.mkdir(parents=True)
    assert ask(fetch(target)).error == "MachineError"
    assert [*(tmp_path / "in").rglob("*")] == [target]
    assert not server.calls("GET")


def test_links_are_not_followed(ask, server, tmp_path):
    server.outputs = lambda saved: {"submission.json": b"{}"}
    ended_run(ask, server)
    outside, target = tmp_path / "outside", tmp_path / "here"
    outside.mkdir()
    target.mkdir()
    (outside / "kept").write_bytes(b"kept")
    (target / "submission.json").symlink_to(outside / "kept")
    assert ask(fetch(target)).error == ""
    assert (outside / "kept").read_bytes() == b"kept" and (target / "submission.json").read_bytes() == b"{}"
    server.outputs = lambda saved: {"link/kept": b"lost"}
    (target / "link").symlink_to(outside)
    ask(save())
    assert ask(
        f"[kaggle.run_status({NOTEBOOK!r}, 2), kaggle.download_output({NOTEBOOK!r}, 2, Path({str(target)!r}))]"
    ).error
    assert (outside / "kept").read_bytes() == b"kept"


@pytest.mark.parametrize("limits", ["DownloadLimits(file=9)", "DownloadLimits(total=19)", "DownloadLimits(files=1)"])
def test_outputs_that_are_too_large(ask, server, tmp_path, limits):
    server.outputs = lambda saved: {"a": bytes(10), "b": bytes(10)}
    ended_run(ask, server)
    assert ask(fetch(tmp_path, limits)).error == "MachineError"
    assert {file.name for file in tmp_path.iterdir()} <= {"a"} and not (tmp_path / "b").exists()
    assert ask(fetch(tmp_path, "DownloadLimits(file=10, total=20, files=2)")).error == ""


def test_an_output_that_is_cut_is_fetched_again(ask, server, tmp_path):
    content = bytes(range(256)) * 10_000
    server.outputs = lambda saved: {"big": content}
    ended_run(ask, server)
    server.fault("GET", "cut", at=1_500_000)
    assert ask(fetch(tmp_path)).error == ""
    assert [file.name for file in tmp_path.iterdir()] == ["big"] and (tmp_path / "big").read_bytes() == content


@pytest.mark.parametrize(("code", "error"), [(403, "Refused"), (404, "Refused"), (503, "Unreachable")])
def test_an_error_page_is_no_output(ask, server, tmp_path, code, error):
    ended_run(ask, server)
    server.fault("GET", "status", times=99, code=code)
    assert ask(fetch(tmp_path)).error == error
    assert not [*tmp_path.iterdir()]


def test_a_folder_where_a_file_is_to_go(ask, server, tmp_path):
    ended_run(ask, server)
    (tmp_path / "submission.json").mkdir()
    assert ask(fetch(tmp_path)).error == "MachineError"
    assert [file.name for file in tmp_path.iterdir()] == ["submission.json"]


# The competition


def test_a_submission(ask, server):
    ended_run(ask, server)
    server.polls = 1
    look, left = f"kaggle.submission_quota({COMPETITION!r})", {"left": 1, "today": 0, "total": 0, "by_total": False}
    assert ask(look).value == left
    assert ask(f"kaggle.submissions({COMPETITION!r})").value == []
    ref = ask(SUBMIT).value
    assert ask(look).value == left | {"left": 0, "today": 1, "total": 1}
    pending = {"ref": ref, "status": "PENDING", "score": "", "private_score": "", "error": ""}
    pending |= {"description": "content=a", "file": "submission.json", "date": "2026-09-01T12:00:00.123000"}
    assert ask(f"kaggle.submission({ref})").value == pending
    scored = pending | {"status": "COMPLETE", "score": "12.5"}
    assert ask(f"kaggle.submission({ref})").value == scored
    assert ask(f"kaggle.submissions({COMPETITION!r})").value == [scored]
    (entry,) = server.entries
    assert (entry.notebook, entry.version, entry.file) == (NOTEBOOK, 1, "submission.json")


def test_many_submissions(ask, server):
    ended_run(ask, server)
    server.left_today, server.page = 5, 2
    refs = ask(f"[{', '.join([SUBMIT] * 5)}]").value
    assert [each["ref"] for each in ask(f"kaggle.submissions({COMPETITION!r})").value] == refs[::-1]


def test_submissions_that_get_no_score(ask, server):
    ended_run(ask, server)
    server.left_today = 2
    wrong = {"status": "ERROR", "errorDescription": "Submission Scoring Error"}
    server.entry_endings.extend([{"status": "COMPLETE"}, wrong])
    refs = ask(f"[{SUBMIT}, {SUBMIT}]").value
    without, failed = ask(f"[kaggle.submission(ref) for ref in {refs}]").value
    assert (without["status"], without["score"], without["error"]) == ("COMPLETE", "", "")
    assert (failed["status"], failed["score"], failed["error"]) == ("ERROR", "", "Submission Scoring Error")


def test_a_submission_too_new_to_be_found(ask, server):
    assert ask("kaggle.submission(5)").value["status"] == "PENDING"


def test_no_submission_left(ask, server):
    ended_run(ask, server)
    server.left_today = 0
    answer = ask(SUBMIT)
    assert (answer.error, answer.code) == ("Refused", 400)
    assert "daily submission limit" in answer.words and "wait" in answer.words
    assert not server.entries


def test_a_submission_of_nothing(ask, server):
    ended_run(ask, server)
    assert ask(SUBMIT.replace("submission.json", "other.json")).error == "Refused"
    assert not server.entries and server.left_today == 1


# What goes wrong on the way

READS = {
    "GetDataset": f"kaggle.dataset({WHEELS!r})",
    "GetDatasetStatus": f"kaggle.dataset({WHEELS!r})",
    "GetKernel": f"kaggle.notebook({NOTEBOOK!r})",
    "GetKernelSessionStatus": RUN,
    "ListKernelSessionOutput": "kaggle.download_output('ada/arc-solver', 1, Path('.'))",
    "GetSubmissionLimits": f"kaggle.submission_quota({COMPETITION!r})",
    "ListSubmissions": f"kaggle.submissions({COMPETITION!r})",
    "GetSubmission": "kaggle.submission(4000000)",
}
PASSING = {"503": {"kind": "status"}, "429": {"kind": "status", "code": 429, "retry_after": 0.05}} | {
    kind: {"kind": kind} for kind in ("drop", "lose", "garbage")
}
MADE = {  # what each call makes, in `everything` and once more
    "CreateDataset": lambda server: len(server.datasets),
    "CreateDatasetVersion": lambda server: len(server.datasets[WHEELS].versions),
    "SaveKernel": lambda server: len(server.notebooks[NOTEBOOK]),
    "CreateCodeSubmission": lambda server: len(server.entries),
}


@pytest.fixture
def everything(ask, server, folder):
    """A dataset, a run that has ended, a submission that is scored."""
    server.outputs = lambda saved: {}
    ended_run(ask, server)
    server.outputs = lambda saved: SUBMISSION
    server.notebooks[NOTEBOOK][0].outputs = dict(SUBMISSION)
    assert ask(f"[{SUBMIT}, {create(folder)}, kaggle.dataset({WHEELS!r})]").error == ""
    server.left_today = 1
    server.notebooks[NOTEBOOK][0].outputs = {}
    server.journal.clear()


@pytest.fixture
def sent(folder):
    return {
        "CreateDataset": create(folder).replace(WHEELS, WHEELS + "-2"),
        "CreateDatasetVersion": version(folder),
        "SaveKernel": save(),
        "CreateCodeSubmission": SUBMIT,
    }


@pytest.mark.parametrize("call", READS)
@pytest.mark.parametrize("fault", PASSING)
def test_reads_are_sent_again(ask, server, everything, call, fault):
    plain = ask(READS[call])
    assert plain.error == ""
    server.journal.clear()
    server.fault(call, **PASSING[fault])
    answer = ask(READS[call])
    assert (answer.value, answer.error) == (plain.value, "")
    assert len(server.calls(call)) == 2 and len(answer.said) == 1


@pytest.mark.parametrize("call", READS)
def test_reads_are_given_up(ask, server, everything, call):
    server.fault(call, "status", times=99)
    answer = ask(READS[call])
    assert (answer.error, answer.code) == ("Unreachable", None) and "planned" in answer.words
    assert len(server.calls(call)) == HURRY["tries"]


@pytest.mark.parametrize("call", READS)
def test_a_no_is_not_asked_for_twice(ask, server, everything, call):
    server.fault(call, "status", code=400, message="Nonsense")
    answer = ask(READS[call])
    assert (answer.error, answer.code) == ("Refused", 400) and "Nonsense" in answer.words
    assert len(server.calls(call)) == 1


@pytest.mark.parametrize("call", MADE)
@pytest.mark.parametrize(("fault", "more"), [("drop", 0), ("status", 0), ("lose", 1), ("late", 1), ("garbage", 1)])
def test_nothing_is_made_twice(ask, server, everything, sent, call, fault, more):
    server.notebooks[NOTEBOOK][0].outputs = dict(SUBMISSION)
    before = MADE[call](server)
    server.fault(call, fault)
    answer = ask(sent[call])
    assert (answer.error, answer.said) == ("OutcomeUnknown", [])
    assert MADE[call](server) == before + more
    assert len(server.calls(call)) == 1


@pytest.mark.parametrize("call", MADE)
def test_what_was_not_even_begun_is_sent_again(ask, server, everything, sent, call):
    server.notebooks[NOTEBOOK][0].outputs = dict(SUBMISSION)
    before = MADE[call](server)
    server.fault(call, "status", times=2, code=429, retry_after=0.05)
    answer = ask(sent[call])
    assert (answer.error, len(answer.said)) == ("", 2)
    assert MADE[call](server) == before + 1
    assert len(server.calls(call)) == 3


@pytest.mark.parametrize("call", MADE)
def test_too_many_requests_for_long(ask, server, everything, sent, call):
    server.fault(call, "status", times=99, code=429)
    before = MADE[call](server)
    assert ask(sent[call]).error == "Unreachable"
    assert MADE[call](server) == before and len(server.calls(call)) == HURRY["tries"]


@pytest.mark.parametrize("call", ["CreateDataset", "CreateDatasetVersion", "SaveKernel"])
def test_an_error_in_an_answer_that_is_none(ask, server, everything, sent, call):
    before = MADE[call](server)
    server.fault(call, "error", words="No such thing")
    answer = ask(sent[call])
    assert (answer.error, answer.code) == ("Refused", 200) and "No such thing" in answer.words
    assert MADE[call](server) == before


def test_kaggle_says_how_long_to_wait(ask, server, everything):
    server.fault("GetKernel", "status", code=429, retry_after=0.4)
    assert ask(READS["GetKernel"]).error == ""
    first, second = server.calls("GetKernel")
    assert second.at_s - first.at_s >= 0.4


def test_kaggle_asks_for_more_than_there_is(ask, server, everything):
    server.fault("GetKernel", "status", code=429, retry_after=3600)
    answer = ask(READS["GetKernel"])
    assert answer.error == "Unreachable" and "3600 s" in answer.words
    assert len(server.calls("GetKernel")) == 1


def test_an_error_in_the_body_of_a_success(ask, server, everything):
    """The client takes its code for that of the answer."""
    for code, error in ((400, "Refused"), (403, ""), (503, "")):
        server.fault("GetKernel", "status", code=code, message="Hidden", hidden=True)
        answer = ask(READS["GetKernel"])
        assert (answer.error, answer.value is None) == (error, code != 503)


def test_a_server_that_falls_silent(ask, server, everything):
    server.fault("GetKernel", "hang", seconds=0.5)
    answer = ask(READS["GetKernel"], silence_s=0.1)
    assert (answer.error, len(answer.said)) == ("", 1)
    server.fault("SaveKernel", "hang", seconds=0.5)
    assert ask(save(), silence_s=0.1).error == "OutcomeUnknown"


# Signing in


@pytest.fixture(params=CLIENTS)
def env(request, server, tmp_path) -> dict[str, str]:
    return environment(server, tmp_path, client_path(request.param))


def once(env: dict[str, str], code: str = "kaggle.owner", before: str = "") -> subprocess.CompletedProcess[str]:
    """A process of its own, for what happens when the client is imported."""
    lines = [
        before,
        "from arc_solver.command import run_main",
        "from arc_solver.release.kaggle_client import connect",
        "from arc_solver.release.retry import RetryPolicy",
        f"def main(argv):\n    kaggle = connect(RetryPolicy(**{HURRY}))\n    print({code})\n    return 0",
        "run_main(main)",
    ]
    command = [sys.executable, "-P", "-c", "\n".join(lines)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


def without_key(env: dict[str, str], **more: str) -> dict[str, str]:
    return {name: value for name, value in env.items() if name not in ("KAGGLE_USERNAME", "KAGGLE_KEY")} | more


def test_a_key(env, server):
    done = once(env)
    assert (done.stdout, done.stderr, done.returncode) == ("ada\n", "", 0)
    assert not server.journal


def test_an_upload_shows_how_far_it_is(env, server, folder):
    (folder / "large.whl").write_bytes(bytes(32_000_000))  # more than a connection holds that nobody reads from
    server.fault("PUT", "none")  # of SHA256SUMS, which comes first
    server.fault("PUT", "hang", seconds=0.3)
    soon = "from arc_solver.waiting import waiting as w; w.__wrapped__.__kwdefaults__.update(quiet_s=0, line_s=0.001)"
    done = once(env, create(folder), before=f"from pathlib import Path\n{soon}")
    assert done.returncode == 0
    assert re.search(r"^uploading large\.whl \.\.\. \d+\.\d of 32\.0 MB, 1 s so far, ETA", done.stderr, re.MULTILINE)
    assert server.datasets[WHEELS].versions[0].files == files_of(folder)


def test_a_token(env, server):
    done = once(without_key(env, KAGGLE_API_TOKEN=TOKEN), "kaggle.dataset('ada/nothing')")
    assert (done.stdout, done.stderr, done.returncode) == ("None\n", "", 0)
    assert [request.call for request in server.journal] == ["IntrospectToken", "GetDataset"]


def test_a_token_that_cannot_be_checked_at_once(env, server):
    server.fault("IntrospectToken", "status", times=2)  # when the client is imported, and when it is asked again
    done = once(without_key(env, KAGGLE_API_TOKEN=TOKEN))
    assert (done.stdout, done.returncode) == ("ada\n", 0) and "again in" in done.stderr
    server.fault("IntrospectToken", "drop", times=99)
    done = once(without_key(env, KAGGLE_API_TOKEN=TOKEN))
    assert (done.stdout, done.returncode) == ("", 1) and "try again later" in done.stderr
    assert TOKEN not in done.stderr


@pytest.mark.parametrize("token", ["", "wrong"])
def test_no_credentials(env, server, token):
    done = once(without_key(env, **({"KAGGLE_API_TOKEN": token} if token else {})))
    assert (done.stdout, done.returncode) == ("", 2)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "kaggle auth login`" in done.stderr


def test_the_command_to_sign_in_with_is_one_that_is_there(tmp_path):
    """Beside the interpreter, or else what the interpreter itself runs."""
    for python in (sys.executable, str(tmp_path / "python")):
        code = f"import sys; sys.executable = {python!r}; from arc_solver.release.retry import SIGN_IN; print(SIGN_IN)"
        said = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True).stdout
        beside = Path(python).with_name("kaggle")
        assert f"`{beside if beside.exists() else f'{python} -m kaggle'} auth login`" in said


@pytest.fixture
def browser(env) -> dict[str, str]:
    """Signed in with `kaggle auth login`."""
    file = Path(env["HOME"]) / ".kaggle" / "credentials.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"refresh_token": KEY, "username": "ada"}))
    return without_key(env)


def test_a_sign_in_with_the_browser(browser, server):
    done = once(browser, "kaggle.dataset('ada/nothing')")
    assert (done.stdout, done.stderr, done.returncode) == ("None\n", "", 0)
    assert [request.call for request in server.journal] == ["GenerateAccessToken", "GetDataset"]


@pytest.mark.parametrize("code", [400, 401])
def test_a_sign_in_that_has_ended(browser, server, code):
    server.fault("GenerateAccessToken", "status", times=9, code=code, message="Ended")
    done = once(browser)
    assert (done.stdout, done.returncode) == ("", 2)
    assert "kaggle auth login`" in done.stderr and KEY not in done.stderr


def test_a_key_that_is_not_accepted(env, server):
    done = once(env | {"KAGGLE_KEY": "wrong-key"}, "kaggle.dataset('ada/nothing')")
    assert (done.stdout, done.returncode) == ("", 2)
    assert "kaggle auth login`" in done.stderr and "wrong-key" not in done.stderr


def test_verbose_shows_no_credentials(env, server):
    for name in ("VERBOSE", "VERBOSE_OUTPUT"):
        token = without_key(env, KAGGLE_API_TOKEN=TOKEN)
        for given in (env, token):
            done = once(given | {name: "true"}, "kaggle.dataset('ada/nothing')")
            assert (done.stdout, done.stderr, done.returncode) == ("None\n", "", 0)


@pytest.mark.parametrize("there", ["None", "types.ModuleType('kaggle')"])
def test_no_client(tmp_path, server, there):
    """Not even a folder with its name, such as that of a checkout."""
    done = once(environment(server, tmp_path), before=f"import sys, types\nsys.modules['kaggle'] = {there}")
    assert (done.stdout, done.returncode) == ("", 2)
    install = f"{sys.executable} -m pip install 'arc_solver[kaggle]'"
    assert done.stderr == f"error: bin/submit needs the kaggle client: run {install}\n"


def test_a_client_without_six(env):
    done = once(env, before="import sys\nsys.modules['six'] = None")
    assert (done.stdout, done.returncode) == ("", 2)
    assert "six" in done.stderr and "pip install 'arc_solver[kaggle]'" in done.stderr


def test_a_home_that_cannot_be_written(env, tmp_path):
    (tmp_path / "file").touch()
    done = once(env | {"KAGGLE_CONFIG_DIR": str(tmp_path / "file" / "config")})
    assert (done.stdout, done.returncode) == ("", 1) and done.stderr.startswith("error: the kaggle client cannot make")


def test_nobody_else_is_behind_the_stand_in(env, server):
    """So that the tests above would see a request to another host."""
    code = """
import requests
for url in ("http://example.com/x", "https://example.com/x"):
    try:
        print(requests.get(url).status_code)
    except requests.ConnectionError:
        print("refused")
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout == "502\nrefused\n"
    assert [(request.host, request.call) for request in server.journal] == [
        ("example.com", "GET"),
        ("example.com", "CONNECT"),
    ]
    server.journal.clear()


# Without a client


def test_a_request_that_takes_long_is_sent_again_too():
    tries, said = iter([RequestFailed("lost"), None]), []

    def send() -> str:
        time.sleep(0.1)
        if failure := next(tries):
            raise failure
        return "done"

    assert (
        RetryingSender(RetryPolicy(first_wait_s=0.001, limit_s=0.05), said.append).send_idempotent("it", send) == "done"
    )
    assert said == ["Kaggle, it: lost; again in 0 s"]


def test_waits_grow_up_to_the_longest():
    policy = RetryPolicy(first_wait_s=1, longest_wait_s=8)
    for attempt, middle in enumerate([1, 2, 4, 8, 8, 8]):
        waits = [policy.wait_s(attempt) for _ in range(100)]
        assert middle / 2 <= min(waits) < max(waits) <= middle * 1.5


def test_retry_after():
    assert _asked_wait_s("2.5") == 2.5 and _asked_wait_s("0") == 0
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    assert 97 <= _asked_wait_s(later) <= 100
    for nothing in ("", "soon", "-5", "nan", "inf", "Thu, 01 Jan 1970 00:00:00 GMT"):
        assert _asked_wait_s(nothing) == 0


def test_names_that_stay_inside(tmp_path):
    for name in ("a", "a/b.json", "..a", "a..", "a b", "C:", "~"):
        assert safe_path(tmp_path, name, "it") == tmp_path / name
    with pytest.raises(MachineError, match="lead elsewhere"):
        safe_path(tmp_path, "..", "it")


def test_words_of_others_are_one_line():
    assert one_line(" a\n\x1b[31mb\t") == "a [31mb"
    assert len(one_line("x" * 1000)) < 310
