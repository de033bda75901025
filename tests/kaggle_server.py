"""A stand-in for Kaggle on loopback, which the real `kaggle` client is pointed at.

With KAGGLE_API_ENVIRONMENT=LOCALHOST the client calls http://localhost, and with HTTP_PROXY set to this server it asks
here for that, on any port. HTTPS_PROXY is this server too, and CONNECT is refused: no mistake reaches the real service.

It keeps what Kaggle keeps (datasets, notebooks, runs, submissions), takes the time that Kaggle takes (in polls, not in
seconds), writes down every request, and fails as a test planned: `server.fault("SaveKernel", "lose")`. Where it
answers no on its own account, as to a dataset that does not exist, it does what has been seen of Kaggle.
"""

import base64
import json
import os
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).parent.parent
COMPETITION = "arc-prize-2026-arc-agi-2"
KEY, TOKEN = "key-that-nobody-may-see", "token-that-nobody-may-see"
SIGNATURE = "signature-that-nobody-may-see"
SESSIONS_FULL = "Maximum batch GPU session count of 2 reached."
STAGES = ("BLOBS_RECEIVED", "BLOBS_DECOMPRESSED", "BLOBS_COPIED_TO_SDS", "INDIVIDUAL_BLOBS_COMPRESSED")
LICENCES = ("CC0-1.0", "apache-2.0", "CC-BY-4.0", "GPL-3.0", "other")
SUBMISSION = {"submission.json": b'{"00000000": [{"attempt_1": [[0]], "attempt_2": [[0]]}]}'}

CLIENTS = ["installed", "2.2.5"]


def client_path(name: str) -> str:
    """What goes in front of PYTHONPATH for a version of the kaggle client; skips a test whose version is not here."""
    base = os.environ.get("ARC_SOLVER_KAGGLE", "")  # a folder that has it, where it is not installed
    if not base and not find_spec("kagglesdk"):
        pytest.skip("the kaggle client is not installed: bin/test brings it")
    if name == "installed":
        return base
    newer = Path(os.environ.get("ARC_SOLVER_KAGGLE_225") or ROOT / ".venv" / "kaggle-2.2.5")
    if not (newer / "kaggle").is_dir():
        pytest.skip(f"kaggle 2.2.5 is not in {newer}: bin/test --all brings it")
    return os.pathsep.join(filter(None, (str(newer), base)))


@dataclass
class Request:
    """One that came in, for tests to look at."""

    host: str
    call: str  # SaveKernel, ...; PUT and GET of files; CONNECT
    body: dict[str, Any]
    range: str = ""  # Content-Range of a PUT
    status: int = 0  # of the answer; 0 = the connection was dropped
    fault: str = ""
    at_s: float = field(default_factory=time.monotonic)


@dataclass
class Version:
    notes: str
    files: dict[str, bytes]
    polls: int = 0  # of the status so far


@dataclass
class Dataset:
    title: str
    licence: str
    private: bool
    description: str
    versions: list[Version]


@dataclass
class Saved:
    """A version of a notebook, and its run."""

    ref: str
    number: int
    source: str
    settings: dict[str, Any]  # the request, less the source
    ending: str
    message: str
    inputs: dict[str, int]  # datasets, and of each the last version that was ready when this was saved
    outputs: dict[str, bytes] = field(default_factory=dict)
    polls: int = 0
    ended: bool = False


@dataclass
class Entry:
    """A submission."""

    ref: int
    notebook: str
    version: int
    file: str
    description: str
    ending: dict[str, str]
    polls: int = 0


@dataclass
class Blob:
    name: str
    size: int
    content: bytes = b""


@dataclass
class Fault:
    call: str
    kind: str
    times: int
    details: dict[str, Any]


class Answer(Exception):
    """An answer that is no success, and ends what was being done."""

    def __init__(self, status: int, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers


class Server:
    """Kaggle, with one account. Used as `with Server() as server`."""

    def __init__(self, owner: str = "ada") -> None:
        self.owner = owner
        self.reset()
        self._lock = threading.RLock()
        self._http = _Http(("127.0.0.1", 0), _Handler)
        self._http.kaggle = self  # type: ignore[attr-defined]
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def reset(self) -> None:
        """As on the first day."""
        self.datasets: dict[str, Dataset] = {}
        self.notebooks: dict[str, list[Saved]] = {}
        self.entries: list[Entry] = []
        self.competitions = {COMPETITION}
        self.models: set[str] = set()
        self.left_today = 1
        self.shows_notes = True  # of versions; a dataset's description is its first notes
        self.polls = 2  # after which a dataset is ready, a run has begun and later ended, and a submission is scored
        # What runs and submissions come to, in this order; when there is none left: COMPLETE, and a score.
        self.run_endings: deque[tuple[str, str]] = deque()  # status, message
        self.entry_endings: deque[dict[str, str]] = deque()  # status, publicScore, errorDescription
        self.outputs: Callable[[Saved], dict[str, bytes]] = lambda saved: dict(SUBMISSION)
        self.log: Callable[[Saved], str] = lambda saved: f"run of {saved.ref} v{saved.number}\n"
        self.page = 200  # most files and submissions on one
        self.journal: list[Request] = []
        self.hook: Callable[[Request], None] = lambda request: None  # after a request is done, before its answer
        self._faults: list[Fault] = []
        self._blobs: dict[str, Blob] = {}
        self._downloads: dict[str, bytes] = {}

    def fault(self, call: str, kind: str, times: int = 1, **details: Any) -> None:
        """Plans that a call fails, the next `times` times.

        Args:
            call: SaveKernel and so on; PUT and GET are those of files.
            kind: status (code, message, retry_after): answers that, and does nothing; with hidden=True as a 200, and
                the code in its body.
                drop: breaks the connection, and does nothing. lose: does it, then breaks the connection.
                late (code): does it, then answers 503 or what is asked for.
                hang (seconds): says nothing for so long, then does it and answers.
                error (words): does nothing, and says so in a 200.
                invalid (field, refs): does it, and calls these invalid, such as invalidModelSources.
                garbage: does it, then answers with a page that is no JSON.
                cut (at, code): a PUT is taken up to this byte, a GET is given up to there; then the connection breaks,
                or the PUT is answered with that code.
                expire: forgets the place of an upload. none: nothing, for faults at later calls.
        """
        self._faults.append(Fault(call, kind, times, details))

    def calls(self, call: str) -> list[Request]:
        return [request for request in self.journal if request.call == call]

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> "Server":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    # What the handler asks

    def take_fault(self, call: str) -> Fault | None:
        with self._lock:
            for fault in self._faults:
                if fault.call == call and fault.times > 0:
                    fault.times -= 1
                    return fault
        return None

    def do(self, call: str, body: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            method = getattr(self, "_" + re.sub(r"(?<!^)([A-Z])", r"_\1", call).lower(), None)
            if not method:
                raise Answer(404, f"there is no {call}")
            return method(**{re.sub(r"([A-Z])", r"_\1", key).lower(): value for key, value in body.items()})

    def put(self, token: str, where: str, content: bytes, fault: Fault | None) -> tuple[int, dict[str, str]]:
        with self._lock:
            if fault and fault.kind == "expire":
                self._blobs.pop(token)
            if token not in self._blobs:
                return 404, {}
            blob = self._blobs[token]
            if not where.startswith("bytes */"):
                begin = int(where.removeprefix("bytes ").partition("-")[0]) if where else 0
                assert begin <= len(blob.content), "a gap"
                blob.content = blob.content[:begin] + content
            if len(blob.content) == blob.size:
                return 200, {}
            return 308, {"Range": f"bytes=0-{len(blob.content) - 1}"} if blob.content else {}

    def get(self, name: str) -> bytes | None:
        with self._lock:
            return self._downloads.get(name)

    # Calls, by name

    def _introspect_token(self, token: str = "") -> dict[str, Any]:
        return {"active": True, "username": self.owner} if token == TOKEN else {"active": False}

    def _generate_access_token(self, refresh_token: str, **rest: Any) -> dict[str, Any]:
        if refresh_token != KEY:
            raise Answer(401, "Unauthenticated")
        return {"token": TOKEN, "expiresIn": 43200}

    def _start_blob_upload(self, type: str, name: str, content_length: int = 0, **rest: Any) -> dict[str, Any]:
        if type != "DATASET":
            raise Answer(400, f"no blobs of type {type}")
        token = f"blob{len(self._blobs)}"
        self._blobs[token] = Blob(name, content_length)
        return {"token": token, "createUrl": f"http://localhost/upload/{token}?sig={SIGNATURE}"}

    def _get_dataset(self, owner_slug: str, dataset_slug: str) -> dict[str, Any]:
        dataset = self._dataset(owner_slug, dataset_slug)
        shown = {} if self.shows_notes else {"description": "", "versions": []}
        return {
            "ref": f"{owner_slug}/{dataset_slug}",
            "title": dataset.title,
            "licenseName": dataset.licence,
            "description": dataset.description,
            "currentVersionNumber": len(dataset.versions),
            "versions": [
                {"versionNumber": number, "versionNotes": version.notes}
                for number, version in reversed([*enumerate(dataset.versions, 1)])
            ],
            **({"isPrivate": True} if dataset.private else {}),
            **shown,
        }

    def _list_dataset_files(
        self,
        owner_slug: str,
        dataset_slug: str,
        dataset_version_number: int = 0,
        page_size: int = 20,
        page_token: str = "0",
    ) -> dict[str, Any]:
        version = self._dataset(owner_slug, dataset_slug).versions[dataset_version_number - 1]
        begin, size = int(page_token), min(page_size, self.page)
        files = [{"name": name, "totalBytes": len(content)} for name, content in sorted(version.files.items())]
        more = {"nextPageToken": str(begin + size)} if begin + size < len(files) else {}
        return {"datasetFiles": files[begin : begin + size], **more}

    def _get_dataset_status(self, owner_slug: str, dataset_slug: str) -> dict[str, Any]:
        version = self._dataset(owner_slug, dataset_slug).versions[-1]
        version.polls += 1
        return {"status": "READY" if version.polls > self.polls else STAGES[(version.polls - 1) % len(STAGES)]}

    def _create_dataset(
        self,
        owner_slug: str,
        slug: str,
        title: str,
        license_name: str,
        files: list[dict[str, Any]] | None = None,
        description: str = "",
        is_private: bool = False,
    ) -> dict[str, Any]:
        ref = f"{owner_slug}/{slug}"
        if owner_slug != self.owner:
            raise Answer(403, "Permission 'datasets.create' was denied")
        if ref in self.datasets:
            return {"status": "error", "error": f'The requested slug "{slug}" is already in use by a dataset.'}
        if not (6 <= len(title) <= 50 and re.fullmatch("[a-z0-9-]{6,50}", slug) and license_name in LICENCES):
            raise Answer(400, "The title, the slug or the license is not valid")
        first = Version("Initial release", self._files(files))
        self.datasets[ref] = Dataset(title, license_name, is_private, description, [first])
        return {"ref": f"/{ref}", "url": f"https://www.kaggle.com/datasets/{ref}", "status": "ok"}

    def _create_dataset_version(self, owner_slug: str, dataset_slug: str, body: dict[str, Any]) -> dict[str, Any]:
        dataset = self._dataset(owner_slug, dataset_slug)
        if len(dataset.versions) == 1 and dataset.versions[0].polls <= self.polls:
            raise Answer(403, "Permission 'datasets.update' was denied")  # the first one is still worked on
        if body.get("deleteOldVersions"):
            dataset.versions.clear()
        dataset.versions.append(Version(body.get("versionNotes", ""), self._files(body.get("files"))))
        dataset.description = body.get("description") or dataset.description
        return {"ref": f"/{owner_slug}/{dataset_slug}", "status": "ok"}

    def _save_kernel(
        self, slug: str, text: str, language: str, kernel_type: str, new_title: str = "", **settings: Any
    ) -> dict[str, Any]:
        owner, _, name = slug.partition("/")
        if owner != self.owner:
            raise Answer(403, "Permission 'kernels.update' was denied")
        if len(text) > 1_000_000 or language != "python" or kernel_type not in ("notebook", "script"):
            raise Answer(400, "The source must be less than 1 megabytes, of a known language and type")
        if slug not in self.notebooks:
            name = re.sub("[^a-z0-9]+", "-", new_title.lower()).strip("-")  # a new one is called after its title
        ref = f"{owner}/{name}"
        invalid = {
            "invalidDatasetSources": set(settings.get("dataset_data_sources", ())) - self.datasets.keys(),
            "invalidCompetitionSources": set(settings.get("competition_data_sources", ())) - self.competitions,
            "invalidKernelSources": set(settings.get("kernel_data_sources", ())) - self.notebooks.keys(),
            "invalidModelSources": set(settings.get("model_data_sources", ())) - self.models,
            "invalidTags": set(settings.get("category_ids", ())),
        }
        versions = self.notebooks.setdefault(ref, [])
        ending, message = self.run_endings.popleft() if self.run_endings else ("COMPLETE", "")
        settings |= {"title": new_title, "language": language, "kernel_type": kernel_type}
        inputs = {name: self._ready(name) for name in settings.get("dataset_data_sources", ()) if name in self.datasets}
        saved = Saved(ref, len(versions) + 1, text, settings, ending, message, inputs)
        versions.append(saved)
        saved.outputs = self.outputs(saved)
        unknown = {field: sorted(refs) for field, refs in invalid.items() if refs}
        where = {"ref": f"/code/{ref}", "url": f"https://www.kaggle.com/code/{ref}", "kernelId": 7}
        return {**where, "versionNumber": saved.number, **unknown}

    def _get_kernel(self, user_name: str, kernel_slug: str) -> dict[str, Any]:
        saved = self._saved(user_name, kernel_slug)
        settings = saved.settings
        metadata = {
            "ref": saved.ref,
            "title": settings["title"],
            "currentVersionNumber": saved.number,
            "isPrivate": settings.get("is_private", True),
            "enableInternet": settings.get("enable_internet", True),
            "machineShape": settings.get("machine_shape", ""),
            "datasetDataSources": settings.get("dataset_data_sources", []),
        }
        source = saved.source
        if settings["kernel_type"] == "notebook":
            source = json.dumps(json.loads(source), indent=1, sort_keys=True)  # its bytes are not what was sent
        return {"metadata": metadata, "blob": {"source": source, "language": "python"}}

    def _get_kernel_session_status(self, user_name: str, kernel_slug: str, version_label: str = "") -> dict[str, Any]:
        saved = self._saved(user_name, kernel_slug, version_label)
        saved.polls += 1
        if not self._ended(saved):
            return {"status": "QUEUED" if saved.polls <= self.polls else "RUNNING"}
        return {"status": saved.ending, **({"failureMessage": saved.message} if saved.message else {})}

    def _list_kernel_session_output(
        self, user_name: str, kernel_slug: str, version_label: str = "", page_size: int = 20, page_token: str = "0"
    ) -> dict[str, Any]:
        saved = self._saved(user_name, kernel_slug, version_label)
        begin, size = int(page_token), min(page_size, self.page)
        names = [*saved.outputs] if self._ended(saved) else []
        files = []
        for index, name in [*enumerate(names)][begin : begin + size]:
            key = f"{saved.ref}/{saved.number}/{index}"
            self._downloads[key] = saved.outputs[name]
            files.append({"fileName": name, "url": f"http://localhost/output/{key}?sig={SIGNATURE}"})
        lines = self.log(saved).splitlines(keepends=True)
        log = [{"stream_name": "stdout", "time": float(number), "data": line} for number, line in enumerate(lines)]
        more = {"nextPageToken": str(begin + size)} if begin + size < len(names) else {}
        return {"files": files, "log": json.dumps(log), **more}

    def _get_submission_limits(self, competition_name: str) -> dict[str, Any]:
        self._competition(competition_name)
        made = len(self.entries)
        return {"numToday": made, "numTotal": made, "numAllowedNow": self.left_today}

    def _create_code_submission(
        self,
        competition_name: str,
        kernel_owner: str,
        kernel_slug: str,
        kernel_version: int,
        file_name: str,
        submission_description: str = "",
    ) -> dict[str, Any]:
        self._competition(competition_name)
        saved = self._saved(kernel_owner, kernel_slug, f"v{kernel_version}")
        if self.left_today < 1:
            raise Answer(400, "You have reached your daily submission limit of 1.")
        if not self._ended(saved) or saved.ending != "COMPLETE" or file_name not in saved.outputs:
            raise Answer(400, f"Version {kernel_version} has no output file {file_name}")
        self.left_today -= 1
        ending = {"status": "COMPLETE", "publicScore": "12.5"}
        ending = self.entry_endings.popleft() if self.entry_endings else ending
        ref = 4_000_000 + len(self.entries)
        self.entries.append(Entry(ref, saved.ref, saved.number, file_name, submission_description, ending))
        return {"ref": ref, "message": "Successfully submitted"}

    def _list_submissions(
        self, competition_name: str, page_size: int = 20, page_token: str = "0", **rest: Any
    ) -> dict[str, Any]:
        self._competition(competition_name)
        begin, size = int(page_token), min(page_size, self.page)
        entries = [*reversed(self.entries)]
        more = {"nextPageToken": str(begin + size)} if begin + size < len(entries) else {}
        return {"submissions": [self._entry(entry) for entry in entries[begin : begin + size]], **more}

    def _get_submission(self, ref: int) -> dict[str, Any]:
        for entry in self.entries:
            if entry.ref == ref:
                entry.polls += 1
                return self._entry(entry)
        raise Answer(404, f"Submission {ref} not found")

    # Beneath them

    def _entry(self, entry: Entry) -> dict[str, Any]:
        said = entry.ending if entry.polls > self.polls else {}  # PENDING is the default, which is not sent
        about = {"ref": entry.ref, "fileName": entry.file, "description": entry.description}
        return {**about, "date": "2026-09-01T12:00:00.123Z", **said}

    def _dataset(self, owner: str, slug: str) -> Dataset:
        if f"{owner}/{slug}" not in self.datasets:
            raise Answer(403, "Permission 'datasets.get' was denied")
        return self.datasets[f"{owner}/{slug}"]

    def _ready(self, ref: str) -> int:
        versions = enumerate(self.datasets[ref].versions, 1)
        return max((number for number, version in versions if version.polls > self.polls), default=0)

    def _saved(self, owner: str, slug: str, label: str = "") -> Saved:
        versions = self.notebooks.get(f"{owner}/{slug}")
        if not versions:
            raise Answer(403, "Permission 'kernels.get' was denied")
        if label and not (re.fullmatch(r"v[1-9]\d*", label) and int(label[1:]) <= len(versions)):
            raise Answer(404, f"There is no version {label}")
        return versions[int(label[1:]) - 1 if label else -1]

    def _competition(self, name: str) -> None:
        if name not in self.competitions:
            raise Answer(404, f"There is no competition {name}")

    def _ended(self, saved: Saved) -> bool:
        saved.ended = saved.ended or saved.polls > 2 * self.polls
        return saved.ended

    def _files(self, files: list[dict[str, Any]] | None) -> dict[str, bytes]:
        blobs = [self._blobs.get(file["token"]) for file in files or []]
        if not blobs or any(blob is None or len(blob.content) < blob.size for blob in blobs):
            raise Answer(400, "A file was not uploaded")
        return {blob.name: blob.content for blob in blobs if blob}


class _Http(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client may go, or be killed
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60
    disable_nagle_algorithm = True  # or each answer waits for 40 ms

    @property
    def kaggle(self) -> Server:
        return self.server.kaggle  # type: ignore[attr-defined]

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def parse_request(self) -> bool:
        """Nobody but Kaggle is behind this proxy."""
        if not super().parse_request():
            return False
        if self.command == "CONNECT" or urlsplit(self.path).hostname == "localhost":
            return True
        self._begin(self.command)
        self._reply(502, b"")
        return False

    def do_CONNECT(self) -> None:
        self._begin("CONNECT", host=self.path.partition(":")[0])
        self._reply(403, b"")

    def do_POST(self) -> None:
        parts = urlsplit(self.path)
        body = json.loads(self._content() or b"{}")
        call = parts.path.rpartition("/")[2]
        fault = self._begin(call, body=body)
        if not parts.path.startswith("/api/v1/"):
            return self._reply(404, b"")
        if fault and fault.kind in ("status", "drop", "error"):
            return self._fail(fault)
        if call not in ("IntrospectToken", "GenerateAccessToken") and not self._signed_in():
            return self._message(401, "Unauthenticated")
        try:
            answer = self.kaggle.do(call, body)
        except Answer as no:
            return self._message(no.status, str(no), **no.headers)
        if fault and fault.kind == "invalid":
            answer[fault.details["field"]] = fault.details["refs"]
        if fault and fault.kind in ("lose", "late", "garbage"):
            return self._fail(fault)
        return self._reply(200, json.dumps(answer).encode())

    def do_PUT(self) -> None:
        where = self.headers.get("Content-Range", "")
        fault = self._begin("PUT", range=where)
        token = urlsplit(self.path).path.removeprefix("/upload/")
        if fault and fault.kind == "cut":
            code = fault.details.get("code", 0)
            size = fault.details["at"]
            content = self._content()[:size] if code else self.rfile.read(size)
            self.kaggle.put(token, where, content, None)
            return self._message(code, "try again") if code else self._drop()
        content = self._content()
        if fault and fault.kind in ("status", "drop"):
            return self._fail(fault)
        status, headers = self.kaggle.put(token, where, content, fault)
        if fault and fault.kind == "lose":
            return self._drop()
        return self._reply(status, b"", **headers)

    def do_GET(self) -> None:
        fault = self._begin("GET")
        content = self.kaggle.get(urlsplit(self.path).path.removeprefix("/output/"))
        if fault and fault.kind in ("status", "drop"):
            return self._fail(fault)
        if content is None:
            return self._message(404, "not found")
        if fault:  # cut
            self._reply(200, content[: fault.details["at"]], length=len(content))
            return self._drop()
        return self._reply(200, content, kind="application/octet-stream")

    def _begin(self, call: str, host: str = "", **about: Any) -> Fault | None:
        host = host or urlsplit(self.path).hostname or "nobody"
        fault = self.kaggle.take_fault(call)
        self.entry = Request(host, call, about.pop("body", {}), fault=fault.kind if fault else "", **about)
        self.kaggle.journal.append(self.entry)
        if fault and fault.kind == "hang":
            time.sleep(fault.details["seconds"])
            return None
        return fault

    def _content(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _signed_in(self) -> bool:
        basic = base64.b64encode(f"{self.kaggle.owner}:{KEY}".encode()).decode()
        return self.headers.get("Authorization") in (f"Basic {basic}", f"Bearer {TOKEN}")

    def _fail(self, fault: Fault) -> None:
        about = fault.details
        if fault.kind in ("drop", "lose"):
            return self._drop()
        if fault.kind == "error":
            words = {"error": about["words"], "status": "error"}
            return self._reply(200, json.dumps(words).encode())
        if fault.kind == "garbage":
            return self._reply(200, b"<html>maintenance</html>", kind="text/html")
        headers = {"Retry-After": str(about["retry_after"])} if "retry_after" in about else {}
        code, words = about.get("code", 503), about.get("message", "planned")
        if about.get("hidden"):
            return self._reply(200, json.dumps({"code": code, "message": words}).encode())
        return self._message(code, words, **headers)

    def _message(self, status: int, message: str, **headers: str) -> None:
        self._reply(status, json.dumps({"code": status, "message": message}).encode(), **headers)

    def _reply(
        self, status: int, content: bytes, kind: str = "application/json", length: int = -1, **headers: str
    ) -> None:
        self.entry.status = status
        self.kaggle.hook(self.entry)
        self.send_response(status)
        headers["X-Kaggle-ApiVersion"] = "99.0"  # which makes the client tell its user of a newer one
        headers |= {"Content-Type": kind, "Content-Length": str(len(content) if length < 0 else length)}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def _drop(self) -> None:
        """Without a word."""
        self.kaggle.hook(self.entry)
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(2)


def environment(server: Server, folder: Path, client: str = "") -> dict[str, str]:
    """Of a process that knows no Kaggle but the stand-in, and no credentials but its own.

    Args:
        folder: for everything that the client keeps.
        client: what `client_path` answered.
    """
    ours = {name: folder / name for name in ("home", "config", "tmp", "cache")}
    for path in ours.values():
        path.mkdir(parents=True, exist_ok=True)
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("KAGGLE_", "VERBOSE")) and not name.lower().endswith("_proxy")
    }
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), server.address)
    return {
        **kept,
        **proxies,
        "NO_PROXY": "",
        "no_proxy": "",
        "KAGGLE_API_ENVIRONMENT": "LOCALHOST",
        "KAGGLE_CONFIG_DIR": str(ours["config"]),
        "KAGGLE_USERNAME": server.owner,
        "KAGGLE_KEY": KEY,
        "HOME": str(ours["home"]),
        "XDG_CONFIG_HOME": str(ours["home"]),
        "XDG_CACHE_HOME": str(ours["cache"]),
        "TMPDIR": str(ours["tmp"]),
        "PYTHONPATH": os.pathsep.join(filter(None, (client, str(ROOT), os.environ.get("PYTHONPATH", "")))),
    }
