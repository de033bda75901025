"""Kaggle, as `bin/submit` needs it: a few calls, each of which did what it says, or raises.

They are the typed requests of the `kaggle` client (2.2.4 and 2.2.5, an extra), never its commands: those end well on
several real failures, and send a creation whose answer got lost again, which makes two. Which requests are sent again,
and the exceptions, are in `sender`.

Credentials are what the client finds. None is read, printed or kept here.
"""

import contextlib
import functools
import importlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import MachineError, UserError, install_command
from .retry import (
    SIGN_IN,
    OutcomeUnknown,
    Refused,
    RetryingSender,
    RetryPolicy,
    Unreachable,
    one_line,
    safe_path,
    translate_errors,
)

__all__ = [
    "Dataset",
    "DownloadLimits",
    "Kaggle",
    "KaggleSubmission",
    "Notebook",
    "OutcomeUnknown",
    "Refused",
    "RetryPolicy",
    "SubmissionQuota",
    "Unreachable",
    "connect",
]

STEMS = {"blobs": "blob_api", "datasets": "dataset_api", "kernels": "kernels_api", "competitions": "competition_api"}
SOURCES = ("dataset_sources", "competition_sources", "kernel_sources", "model_sources", "tags")  # that may be invalid
NOT_CONTENT = ("dataset-metadata.json", "datapackage.json")  # what describes a dataset is no file of it


@dataclass(frozen=True)
class DownloadLimits:
    """Caps on a download of a run's output, in bytes and files: it was written by code that ran elsewhere."""

    file: int = 200 << 20
    total: int = 1 << 30
    files: int = 1000


@dataclass(frozen=True)
class Dataset:
    ref: str  # owner/slug
    version: int  # the current one
    status: str  # of the current version: READY, FAILED, or what Kaggle still does to it
    notes: str  # of the current version
    private: bool


@dataclass(frozen=True)
class Notebook:
    ref: str  # owner/slug
    version: int  # the current one
    source: str
    private: bool
    internet: bool


@dataclass(frozen=True)
class SubmissionQuota:
    """How many submissions were made, and how many may be made now; all zero if the competition was not entered."""

    left: int  # that may be made now
    today: int  # made today
    total: int  # made in all
    by_total: bool  # it is the number in all that is limited


@dataclass(frozen=True)
class KaggleSubmission:
    """One submission as Kaggle lists it: status, scores, description."""

    ref: int
    status: str  # PENDING, COMPLETE, ERROR
    score: str = ""  # the public one; "" = none, or none yet
    private_score: str = ""
    error: str = ""
    description: str = ""
    file: str = ""
    date: str = ""  # ISO, UTC


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def connect(policy: RetryPolicy | None = None, say: Callable[[str], None] = _to_stderr) -> "Kaggle":
    """Signs in with what the kaggle client finds.

    Args:
        say: is told of each wait.

    Raises:
        UserError: there is no client, or there are no credentials that Kaggle accepts.
        Unreachable: Kaggle could not be asked.
    """
    for name in ("VERBOSE", "VERBOSE_OUTPUT"):  # with these the client prints every request, credentials and all
        os.environ.pop(name, None)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # its import signs in, and prints help if it cannot
            from kaggle import api  # type: ignore[attr-defined] # mypy takes the folder kaggle/ for it
    except ImportError as error:
        missing = "" if error.name == "kaggle" else f" ({one_line(str(error))})"
        raise UserError(
            f"bin/submit needs the kaggle client{missing}: run {install_command('arc_solver[kaggle]')}"
        ) from None
    except OSError as error:  # the import makes a folder
        raise MachineError(f"the kaggle client cannot make its folder {error.filename}: {error.strerror}") from None
    api.already_printed_version_warning = True  # it goes to stdout
    sender = RetryingSender(policy or RetryPolicy(), say)
    if not api._authenticated:  # a second time, as the import hides why
        try:
            sender.send_idempotent("the sign-in", lambda: _sign_in(api))
        except Refused as refused:
            raise UserError(f"{refused}: {SIGN_IN}") from None
    if not api.config_values.get("username"):
        raise UserError(f"the kaggle client's credentials have no user name: {SIGN_IN}")
    return Kaggle(api, sender)


def _sign_in(api: Any) -> None:
    try:
        with translate_errors(), contextlib.redirect_stdout(io.StringIO()):
            api.authenticate()
    except SystemExit:
        raise UserError(f"the kaggle client found no credentials that Kaggle accepts: {SIGN_IN}") from None


class Kaggle:
    """Kaggle for one account. Made by `connect`."""

    def __init__(self, api: Any, sender: RetryingSender) -> None:
        self._api, self._sender = api, sender
        self.owner: str = api.config_values["username"]

    def dataset(self, ref: str) -> Dataset | None:
        """The dataset with this owner/slug, or None: there is none that this account may see."""
        owner, slug = _parts(ref)
        name = {"owner_slug": owner, "dataset_slug": slug}
        found = self._seen(f"dataset {ref}", "datasets", "get_dataset", **name)
        if not found:
            return None
        said = self._read(f"the status of dataset {ref}", "datasets", "get_dataset_status", **name)
        version = found.current_version_number or 0
        notes = next((each.version_notes for each in found.versions or [] if each.version_number == version), "")
        # Kaggle gives the first version notes of its own, so what `create_dataset` was told is in the description.
        notes = found.description if version <= 1 or not notes else notes
        return Dataset(ref, version, said.status.name, notes, found.is_private)

    def dataset_files(self, ref: str, version: int) -> dict[str, int]:
        """The sizes in bytes of a version's files, by name. Of their content Kaggle says nothing."""
        owner, slug = _parts(ref)
        fields = {"owner_slug": owner, "dataset_slug": slug, "dataset_version_number": version, "page_size": 200}
        pages = self._pages(f"the files of dataset {ref} v{version}", "datasets", "list_dataset_files", **fields)
        return {file.name: file.total_bytes for page in pages for file in page.dataset_files or []}

    def create_dataset(
        self, ref: str, title: str, licence: str, folder: Path, notes: str, private: bool = True
    ) -> None:
        """A new dataset of all files in a folder, which has no sub-folders. Kaggle works on it until it is READY.

        Raises:
            Refused, Unreachable: there is no dataset.
            OutcomeUnknown: there may be one.
        """
        owner, slug = _parts(ref)
        what = f"the new dataset {ref}"
        fields = {"owner_slug": owner, "slug": slug, "title": title, "license_name": licence, "is_private": private}
        files = self._uploaded(folder)
        answer = self._once(what, "datasets", "create_dataset", **fields, description=notes, files=files)
        _refuse_error(what, answer)

    def create_version(self, ref: str, folder: Path, notes: str) -> None:
        """A new version of a dataset, of all files in a folder; earlier versions stay.

        Raises:
            Refused, Unreachable: there is no new version.
            OutcomeUnknown: there may be one.
        """
        owner, slug = _parts(ref)
        what = f"a new version of dataset {ref}"
        body = _made("datasets", "ApiCreateDatasetVersionRequestBody", version_notes=notes, description=notes)
        body.files, body.delete_old_versions = self._uploaded(folder), False
        answer = self._once(what, "datasets", "create_dataset_version", owner_slug=owner, dataset_slug=slug, body=body)
        _refuse_error(what, answer)

    def notebook(self, ref: str) -> Notebook | None:
        """The notebook with this owner/slug as it was saved last, or None: there is none that this account may see."""
        owner, slug = _parts(ref)
        found = self._seen(f"notebook {ref}", "kernels", "get_kernel", user_name=owner, kernel_slug=slug)
        if not found:
            return None
        said, source = found.metadata, found.blob.source if found.blob else ""
        return Notebook(ref, said.current_version_number, source, said.is_private, said.enable_internet)

    def save_notebook(self, metadata: Mapping[str, Any], source: str) -> tuple[str, int]:
        """Saves a new version of a notebook and starts its run.

        Args:
            metadata: the content of kernel-metadata.json. Unless it says otherwise: private, and without internet.
            source: the content of the .ipynb file.

        Returns:
            ref, version: which Kaggle chose. A new notebook may get another name, made from its title.

        Raises:
            Refused: nothing was saved, or (if it is for a source that Kaggle does not know) what is of no use.
            Unreachable: nothing was saved.
            OutcomeUnknown: it may have been saved.
        """
        what = f"the notebook {metadata['id']}"
        answer = self._once(what, "kernels", "save_kernel", **_notebook_fields(metadata, source))
        _refuse_error(what, answer)
        if not answer.ref or not answer.version_number:
            raise OutcomeUnknown(f"Kaggle did not say which version of {what} it saved: read what it has")
        return "/".join(answer.ref.strip("/").split("/")[-2:]), answer.version_number

    def run_status(self, ref: str, version: int) -> tuple[str, str]:
        """The status of the run of exactly this version and, if it failed, Kaggle's reason.

        Returns:
            status: QUEUED, RUNNING, COMPLETE, ERROR, CANCEL_REQUESTED, CANCEL_ACKNOWLEDGED or NEW_SCRIPT.
            message: of a failed run, or "".
        """
        found = self._read(f"the run of {ref} v{version}", "kernels", "get_kernel_session_status", **_run(ref, version))
        return found.status.name, one_line(found.failure_message)

    def download_output(self, ref: str, version: int, folder: Path, limits: DownloadLimits | None = None) -> str:
        """Writes what exactly this version's run left into a folder, and answers its log as text.

        All names are looked at before the first file is fetched. A file is there whole, or not at all.

        Raises:
            MachineError: a name leads out of the folder, a file is too large, or it cannot be written.
        """
        limits, what = limits or DownloadLimits(), f"the output of {ref} v{version}"
        fields = {**_run(ref, version), "page_size": 200}
        pages = list(self._pages(what, "kernels", "list_kernel_session_output", **fields))
        files = [file for page in pages for file in page.files or []]
        if len(files) > limits.files:
            raise MachineError(f"{what} has {len(files)} files, and at most {limits.files} are taken")
        targets = [safe_path(folder, file.file_name, what) for file in files]
        if len(set(targets)) < len(targets):
            raise MachineError(f"{what} has the same file twice: nothing was fetched")
        left = limits.total
        for file, target in zip(files, targets, strict=True):
            left -= self._sender.download(f"{file.file_name} in {what}", file.url, target, min(limits.file, left))
        return _plain_log(pages[0].log)

    def submission_quota(self, competition: str) -> SubmissionQuota:
        """How many submissions are left."""
        what = f"the submissions left in {competition}"
        found = self._read(what, "competitions", "get_submission_limits", competition_name=competition)
        return SubmissionQuota(found.num_allowed_now, found.num_today, found.num_total, found.limited_by_total)

    def submissions(self, competition: str) -> list[KaggleSubmission]:
        """All that the account's team has submitted, in Kaggle's order."""
        what, fields = f"the submissions to {competition}", {"competition_name": competition, "page_size": 100}
        pages = self._pages(what, "competitions", "list_submissions", **fields)
        return [_submitted(each) for page in pages for each in page.submissions or []]

    def submission(self, ref: int) -> KaggleSubmission:
        """One submission. One that Kaggle cannot find is PENDING: it may be too new."""
        try:
            return _submitted(self._read(f"submission {ref}", "competitions", "get_submission", ref=ref))
        except Refused as refused:
            if refused.code == 404:
                return KaggleSubmission(ref, "PENDING")
            raise

    def submit(self, competition: str, ref: str, version: int, file: str, description: str) -> int:
        """Enters the competition with a file that this version of a notebook left. This cannot be taken back.

        Returns:
            ref: the number of the submission.

        Raises:
            Refused, Unreachable: nothing was submitted.
            OutcomeUnknown: it may have been.
        """
        owner, slug = _parts(ref)
        what = f"the submission of {ref} v{version} to {competition}"
        fields = {"kernel_owner": owner, "kernel_slug": slug, "kernel_version": version, "file_name": file}
        fields |= {"competition_name": competition, "submission_description": description}
        answer = self._once(what, "competitions", "create_code_submission", **fields)
        if not answer.ref:
            raise OutcomeUnknown(
                f"Kaggle did not say the number of {what} ({one_line(answer.message)}): read the submissions"
            )
        return answer.ref

    def _read(self, what: str, service: str, call: str, /, **fields: Any) -> Any:
        """The answer to a request that may be sent again."""
        return self._sender.send_idempotent(what, lambda: self._send(service, call, fields))

    def _seen(self, what: str, service: str, call: str, /, **fields: Any) -> Any:
        """The same of what may not be there: then None. Kaggle says 403 of what does not exist too."""
        try:
            return self._read(what, service, call, **fields)
        except Refused as refused:
            if refused.code in (403, 404):
                return None
            raise

    def _once(self, what: str, service: str, call: str, /, **fields: Any) -> Any:
        """The answer to a request that must not be sent again once it may have been read."""
        return self._sender.send_at_most_once(what, lambda: self._send(service, call, fields))

    def _pages(self, what: str, service: str, call: str, /, **fields: Any) -> Iterator[Any]:
        seen = {""}  # which is what the last page has
        page = self._read(what, service, call, **fields)
        yield page
        while page.next_page_token not in seen:
            seen.add(page.next_page_token)
            page = self._read(what, service, call, **fields, page_token=page.next_page_token)
            yield page

    def _send(self, service: str, call: str, fields: Mapping[str, Any]) -> Any:
        """One request: ("kernels", "get_kernel", {...}) sends an ApiGetKernelRequest by `get_kernel`."""
        request = _made(service, f"Api{call.title().replace('_', '')}Request", **fields)
        with translate_errors(), self._api.build_kaggle_client() as client:
            session = client.http_client()._session
            # The client would wait for an answer forever.
            session.send = functools.partial(session.send, timeout=self._sender.policy.silence_s)
            return getattr(getattr(getattr(client, service), f"{STEMS[service]}_client"), call)(request)

    def _uploaded(self, folder: Path) -> list[Any]:
        """Sends the files of a dataset, and answers what stands for them in the request that makes a version."""
        files = sorted(file for file in folder.iterdir() if file.name not in NOT_CONTENT)
        for file in files:
            if file.is_symlink() or not file.is_file():
                raise UserError(f"{file} is no plain file, and a dataset has nothing else: take it away")
        return [_made("datasets", "ApiDatasetNewFile", token=self._upload(file)) for file in files]

    def _upload(self, file: Path) -> str:
        kind = _types("blobs").ApiBlobType.DATASET
        about = {"type": kind, "name": file.name, "content_length": file.stat().st_size}

        def begin() -> tuple[str, str]:
            place = self._send("blobs", "start_blob_upload", about)
            return place.token, place.create_url

        return self._sender.upload(file, begin)


def _types(service: str) -> Any:
    return importlib.import_module(f"kagglesdk.{service}.types.{STEMS[service]}_service")


def _made(service: str, name: str, /, **fields: Any) -> Any:
    """An object of the client's types. It refuses fields that it does not have, and values of another type."""
    made = getattr(_types(service), name)()
    for field, value in fields.items():
        setattr(made, field, value)
    return made


def _parts(ref: str) -> tuple[str, str]:
    owner, _, slug = ref.partition("/")
    assert owner and slug and "/" not in slug, ref
    return owner, slug


def _run(ref: str, version: int) -> dict[str, Any]:
    """A run in a request: without the label it would be the last one."""
    owner, slug = _parts(ref)
    return {"user_name": owner, "kernel_slug": slug, "version_label": f"v{version}"}


def _refuse_error(what: str, answer: Any) -> None:
    """Errors that Kaggle says in an answer that is none."""
    error = answer.error or ("it answers 'error'" if (getattr(answer, "status", "") or "").lower() == "error" else "")
    invalid = {name: getattr(answer, f"invalid_{name}", None) for name in SOURCES}
    unknown = [f"{name.replace('_', ' ')} {', '.join(refs)}" for name, refs in invalid.items() if refs]
    if error or unknown:
        words = error or f"it does not know {' and '.join(unknown)}, or this account may not use them"
        raise Refused(what, 200, one_line(words))


def _notebook_fields(metadata: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The content of kernel-metadata.json, as the request has it."""
    names = {
        "slug": "id",
        "new_title": "title",
        "language": "language",
        "kernel_type": "kernel_type",
        "enable_gpu": "enable_gpu",
        "enable_tpu": "enable_tpu",
        "machine_shape": "machine_shape",
        "dataset_data_sources": "dataset_sources",
        "competition_data_sources": "competition_sources",
        "kernel_data_sources": "kernel_sources",
        "model_data_sources": "model_sources",
        "category_ids": "keywords",
        "docker_image": "docker_image",
        "docker_image_pinning_type": "docker_image_pinning_type",
    }
    given = {field: metadata[name] for field, name in names.items() if metadata.get(name)}
    return {
        **given,
        "text": _one_text_a_cell(source) if metadata.get("kernel_type") == "notebook" else source,
        "is_private": metadata.get("is_private", True),
        "enable_internet": metadata.get("enable_internet", False),  # the client's own default is to have it
    }


def _one_text_a_cell(source: str) -> str:
    """A notebook as Kaggle takes it: without outputs, and a cell's lines as one text."""
    notebook = json.loads(source)
    for cell in notebook["cells"]:
        cell["source"] = "".join(cell["source"])
        if cell["cell_type"] == "code":
            cell["outputs"] = []
    return json.dumps(notebook)


def _plain_log(log: str) -> str:
    """A run's log as it was printed. Kaggle keeps it as a list of {stream_name, time, data}."""
    try:
        return "".join(str(entry["data"]) for entry in json.loads(log))
    except (ValueError, KeyError, TypeError):
        return log


def _submitted(found: Any) -> KaggleSubmission:
    return KaggleSubmission(
        found.ref,
        found.status.name,
        found.public_score or "",
        found.private_score or "",
        one_line(found.error_description or ""),
        found.description or "",
        found.file_name or "",
        found.date.isoformat() if found.date else "",
    )
