"""bin/_env, with a Python that writes down what it is asked."""

import os
import pty
import shutil
import subprocess
from pathlib import Path

import pytest
from versions import ROOT

PYTHON = """#!/bin/sh
case "$*" in *install*) echo "$*" >>"$0.calls"; echo "Downloading torch"; exit ${STATUS:-0};; esac
"""


@pytest.fixture
def checkout(tmp_path) -> Path:
    (tmp_path / "bin").mkdir()
    for file in ("bin/_env", "pyproject.toml"):
        shutil.copy(ROOT / file, tmp_path / file)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    return tmp_path


def install(checkout: Path, stderr: int, status: int = 0) -> tuple[int, str, list[str]]:
    """Exit code, stderr if it is a pipe, and what pip was called with."""
    command = ["bash", "-euo", "pipefail", "-c", f"source {checkout}/bin/_env train; echo $python"]
    env = {**os.environ, "STATUS": str(status)}
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=stderr, text=True, env=env, timeout=60)
    calls = checkout / ".venv" / "bin" / "python.calls"
    return done.returncode, done.stderr or "", calls.read_text().splitlines() if calls.exists() else []


def test_in_a_log_file_pip_is_quiet_and_what_it_does_is_said(checkout):
    code, said, calls = install(checkout, subprocess.PIPE)
    assert code == 0 and len(calls) == 2 and all(call.endswith(" --quiet") for call in calls)
    assert said.startswith("installing requirements (train), which takes minutes the first time")
    assert install(checkout, subprocess.PIPE)[1:] == ("", calls), "it is installed once"


def test_in_a_terminal_pip_shows_how_far_it_is(checkout):
    ours, theirs = pty.openpty()
    code, _, calls = install(checkout, theirs)
    os.close(theirs)
    said = os.read(ours, 10_000).decode()
    os.close(ours)
    assert code == 0 and len(calls) == 2 and not any("--quiet" in call for call in calls)
    assert "Downloading torch" in said


def test_an_installation_that_failed_is_tried_again(checkout):
    code, said, _ = install(checkout, subprocess.PIPE, status=1)
    assert code == 2 and said.splitlines()[-1].startswith("error: pip could not install the requirements, see above")
    assert len(install(checkout, subprocess.PIPE)[2]) == 3
