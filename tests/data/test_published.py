"""Public sets on their way here: a repository made with git, and a server on loopback that breaks as servers do."""

import json
import signal
import subprocess
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from forked import Forked

from arc_solver.data import download as downloading
from arc_solver.data.command import main
from arc_solver.data.published import PUBLISHED, PublishedSet, git_object
from arc_solver.errors import MachineError, UserError

PAIR = {"input": [[1, 2]], "output": [[2, 1]]}
TASK = {"train": [PAIR, PAIR], "test": [PAIR]}
# A folder and a file that begin alike: git sorts folders as if a slash stood behind their names.
FILES = {"B/a.json", "B/b c.json", "B.json", "A/deeper/x.json", "A0/y.json"}
ANSWERING = """import sys
sys.path.insert(0, {tests!r})
from arc_solver.command import run_main
from arc_solver.data import command, published
published.PUBLISHED["toy"] = published.PublishedSet(**{made!r})
run_main(command.main)
"""


def git(folder: Path, *words: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b.example")
    return subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


class Server:
    """Gives out files, and does to each request what `ways` says next: nothing once they are used up."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.ways: list[str] = []  # "cut", "503", "page", "stall"
        self.ranges: list[str | None] = []  # that were asked for
        self.knows_ranges = True
        self.go_on = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        way = self.ways.pop(0) if self.ways else ""
        asked = request.headers.get("Range")
        self.ranges.append(asked)
        content = b"<!DOCTYPE html>" if way == "page" else self.files.get(request.path)
        if content is None or way == "503":
            request.send_error(503 if way == "503" else 404)
            return
        at = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.knows_ranges else 0
        if at and at >= len(content):
            request.send_error(416)
            return
        request.send_response(206 if at else 200)
        request.send_header("Content-Length", str(len(content) - at))
        request.end_headers()
        middle = at + (len(content) - at) // 2
        request.wfile.write(content[at:middle])
        if way == "stall":
            request.wfile.flush()
            self.go_on.wait(60)
        if way not in ("cut", "stall"):
            request.wfile.write(content[middle:])


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    monkeypatch.setattr(downloading, "WAITS_S", (0.01, 0.01))
    server = Server()
    yield server
    server.go_on.set()
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def published(tmp_path, server, monkeypatch) -> PublishedSet:
    """A set in a repository that the server has, as GitHub gives it out."""
    repository = tmp_path / "repository"
    for name in sorted(FILES):
        file = repository / "corpus" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(TASK | {"name": name}))
    (repository / "README.md").write_text("what is not taken")
    git(repository, "init", "--quiet")
    git(repository, "add", "--all")
    git(repository, "commit", "--quiet", "--message", "all of it")
    commit = git(repository, "rev-parse", "HEAD")
    git(repository, "archive", "--format=zip", f"--prefix=set-{commit}/", "--output=set.zip", "HEAD")
    made = PublishedSet(
        name="toy",
        what="5 tasks",
        repository="someone/set",
        commit=commit,
        objects={"corpus": git(repository, "rev-parse", "HEAD:corpus")},
        becomes="toy",
        licence="MIT",
        overlap="none",
    )
    server.files[f"/someone/set/archive/{commit}.zip"] = (repository / "set.zip").read_bytes()
    monkeypatch.setitem(PUBLISHED, "toy", made)
    monkeypatch.chdir(tmp_path)
    return made


def get(server: Server, *words: str | Path) -> int:
    return main(["get", "toy", "--mirror", server.url, *map(str, words)])


def names_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def refused(*words: str | Path) -> str:
    """What a command says that ends with exit code 2 or 1."""
    with pytest.raises((UserError, MachineError)) as caught:
        main([*map(str, words)])
    return str(caught.value)


def test_a_set_arrives_as_it_is_published(published, server, capsys):
    assert get(server) == 0
    assert names_below(Path("data")) == {f"toy/{name}" for name in FILES}
    assert json.loads(Path("data/toy/B/b c.json").read_text()) == TASK | {"name": "B/b c.json"}
    assert "bin/solve --tasks data/toy" in capsys.readouterr().out
    assert main(["hash", "data/toy/B", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tasks"] == 2


def test_the_ids_of_objects_are_gits(published, tmp_path):
    repository = tmp_path / "repository"
    for path in ("corpus", "corpus/A", "corpus/B", "corpus/B.json"):
        file = repository / path
        inside = [file] if file.is_file() else [each for each in file.rglob("*") if each.is_file()]
        files = {"" if each == file else each.relative_to(file).as_posix(): each.read_bytes() for each in inside}
        assert git_object(files) == git(repository, "rev-parse", f"HEAD:{path}"), path


@pytest.mark.parametrize("ways", [["cut"], ["503"], ["cut", "cut"], ["503", "cut"]], ids="-".join)
@pytest.mark.parametrize("knows_ranges", [True, False])
def test_a_broken_connection_is_taken_up_where_it_broke(published, server, capsys, ways, knows_ranges):
    server.ways, server.knows_ranges = [*ways], knows_ranges
    assert get(server) == 0
    assert names_below(Path("data")) == {f"toy/{name}" for name in FILES}
    assert len(server.ranges) == len(ways) + 1 and bool(server.ranges[-1]) == ("cut" in ways)
    assert capsys.readouterr().err.count("again in") == len(ways)


def test_what_arrived_stays_for_the_next_call(published, server):
    server.ways = ["cut"] * 3
    half = len(next(iter(server.files.values()))) // 2
    said = refused("get", "toy", "--mirror", server.url)
    assert "the same command goes on" in said and "--archive" in said
    assert Path("data/.toy.part").stat().st_size > half and not Path("data/toy").exists()
    assert get(server) == 0
    assert names_below(Path("data")) == {f"toy/{name}" for name in FILES}


def test_a_killed_download_goes_on(published, server, tmp_path):
    server.ways = ["stall"]
    half = len(next(iter(server.files.values()))) // 2
    program = tmp_path / "toy_data.py"
    program.write_text(ANSWERING.format(tests=str(Path(__file__).parents[1]), made=vars(published)))
    words = ["get", "toy", "--mirror", server.url]
    killed = Forked(program, words, cwd=tmp_path)
    part = tmp_path / "data" / ".toy.part"
    while not (part.exists() and part.stat().st_size == half):
        assert killed.poll() is None
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    ended = Forked(program, words, cwd=tmp_path)
    assert ended.wait() == 0
    assert server.ranges == [None, f"bytes={half}-"]
    assert names_below(tmp_path / "data") == {f"toy/{name}" for name in FILES}


def test_what_is_not_the_set_is_not_taken(published, server, tmp_path):
    server.ways = ["page"]
    assert "is no zip archive" in refused("get", "toy", "--mirror", server.url)
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("set-1/corpus/A0/y.json", "{}")
    said = refused("get", "toy", "--archive", tmp_path / "other.zip")
    assert "corpus is not what it was there" in said and published.address() in said
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("set-1/readme", "")
    assert "corpus is not in it" in refused("get", "toy", "--archive", tmp_path / "other.zip")
    assert "does not exist" in refused("get", "toy", "--archive", tmp_path / "none.zip")
    server.files.clear()
    assert "404" in refused("get", "toy", "--mirror", server.url)
    assert names_below(tmp_path / "data") == set()


def test_half_of_another_file_does_not_stay(published, server):
    Path("data").mkdir()
    Path("data/.toy.part").write_bytes(bytes(600))
    assert get(server) == 0
    assert server.ranges == ["bytes=600-", None]
    assert names_below(Path("data")) == {f"toy/{name}" for name in FILES}


def test_what_is_there_is_looked_at(published, server, capsys):
    assert get(server) == 0
    assert get(server) == 0 and len(server.ranges) == 1
    assert "was in data/toy" in capsys.readouterr().out
    Path("data/toy/B.json").write_text("{}")
    assert "move it away" in refused("get", "toy", "--mirror", server.url)


def test_a_copy_from_elsewhere(published, server, tmp_path):
    assert main(["get", "toy", "--archive", str(tmp_path / "repository/set.zip"), "--out", "else"]) == 0
    assert names_below(Path("else")) == {f"toy/{name}" for name in FILES} and not server.ranges


def test_a_single_file_stays_packed(server, tmp_path, monkeypatch, capsys):
    with zipfile.ZipFile(tmp_path / "pairs.zip", "w") as archive:
        archive.writestr("re_arc/tasks/aa.json", json.dumps([PAIR] * 3))
    content = (tmp_path / "pairs.zip").read_bytes()
    made = PublishedSet(
        name="toy",
        what="3 pairs",
        repository="someone/pairs",
        commit="0" * 40,
        objects={"pairs.zip": git_object({"": content})},
        becomes="toy.zip",
        licence="MIT",
        overlap="none",
        kind="pairs",
    )
    monkeypatch.setitem(PUBLISHED, "toy", made)
    monkeypatch.chdir(tmp_path)
    server.files[f"/someone/pairs/raw/{made.commit}/pairs.zip"] = content
    assert get(server) == get(server) == 0
    assert Path("data/toy.zip").read_bytes() == content
    assert 'kind = "pairs"' in capsys.readouterr().out


def test_known_sets_are_listed_with_all_that_matters(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("data/mini-arc").mkdir(parents=True)
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    for name, known in PUBLISHED.items():
        for part in (name, known.what, known.licence, known.repository, known.overlap):
            assert part in shown
        assert len(known.commit) == 40 and all(len(found) == 40 for found in known.objects.values())
    assert shown.count("here: ") == 1 and "here: data/mini-arc" in shown
    assert main(["list", "--json"]) == 0
    assert [each["name"] for each in json.loads(capsys.readouterr().out)] == [*PUBLISHED]


@pytest.mark.parametrize(
    ("name", "said"),
    [("nope", "concept-arc, mini-arc"), ("ConceptARC", "did you mean concept-arc"), ("demo", "comes with arc_solver")],
)
def test_unknown_sets_are_refused_with_what_helps(name, said):
    assert said in refused("get", name)
