"""Retries for requests to Kaggle: what may be sent twice, what must not, and uploads and downloads.

- What may be sent twice (all reads, the upload of a file) is sent again on 429, 5xx and lost connections, with growing
  waits, for as long as `RetryPolicy` says; after that it is `Unreachable`.
- What must not be sent twice (a dataset, a version, a notebook, a submission) is sent again on 429 only, which a server
  answers before it does anything. After a 5xx or a lost answer nobody knows whether it was done: that is
  `OutcomeUnknown`, and whoever asked reads the state before asking again.
- Everything else that Kaggle says no to is `Refused`, with its words and what to do.

No message here has an address in it: those of files are signed, which makes them as good as a password.
"""

import contextlib
import math
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from ..errors import MachineError, UserError
from ..waiting import Wait, waiting

T = TypeVar("T")

CHUNK = 1 << 20  # bytes of a download that are held at a time
_BESIDE = Path(sys.executable).with_name("kaggle")  # not there where the client was installed elsewhere
_CLIENT = _BESIDE if _BESIDE.is_file() else f"{sys.executable} -m kaggle"
SIGN_IN = f"run `{_CLIENT} auth login`, or make a token on kaggle.com/settings and follow what is said there"
ADVICE = (  # a part of Kaggle's words in lower case, or the code of its answer: what helps
    ("session count", "wait until one of your running notebooks has ended, or stop it; then continue"),
    ("rules", "accept the rules on the competition's page, then continue"),
    ("limit", "wait until Kaggle allows more, such as the next day (UTC), then continue"),
    (403, "check that it belongs to the account that is signed in, and that this account may do it"),
    (404, "check the name"),
    (409, "check that the title makes the name, and that the account is the right one"),
)


class Refused(MachineError):
    """Kaggle said no. `code` is that of its answer: 200 where the error is in the answer to a request that it took."""

    def __init__(self, what: str, code: int, words: str) -> None:
        fitting = (advice for sign, advice in ADVICE if sign == code or str(sign) in words.lower())
        super().__init__(f"Kaggle refused {what}: {words}; {next(fitting, 'put that right, then continue')}")
        self.code = code


class Unreachable(MachineError):
    """Kaggle could not be reached, or was too busy, for longer than `RetryPolicy`. Nothing was made."""


class OutcomeUnknown(MachineError):
    """What must not be sent twice was sent, and nobody knows whether it was done: read the state first."""


class RequestFailed(Exception):
    """A request that failed once. Never leaves `RetryingSender`: it becomes one of those above, or is tried again."""

    def __init__(self, words: str, code: int = 0, wait_s: float = 0) -> None:
        super().__init__(words)
        self.code = code  # of the answer; 0 = there was none that could be read
        self.wait_s = wait_s  # what Kaggle asks to wait

    @property
    def passing(self) -> bool:
        """Whether it may go well the next time."""
        return self.code in (0, 429) or self.code >= 500


@dataclass(frozen=True)
class RetryPolicy:
    """How long to try what may be sent again."""

    tries: int = 10
    first_wait_s: float = 1.0  # doubled after each try; half of it to half as much again, at random
    longest_wait_s: float = 60.0  # unless Kaggle asks for more
    limit_s: float = 900.0  # of waiting between the tries of a request
    silence_s: float = 180.0  # a connection on which nothing comes for so long is lost

    def wait_s(self, attempt: int) -> float:
        return min(self.longest_wait_s, self.first_wait_s * 2**attempt) * random.uniform(0.5, 1.5)


class RetryingSender:
    """Sends requests, and repeats those that failed for a passing reason, with growing waits."""

    def __init__(self, policy: RetryPolicy, say: Callable[[str], None]) -> None:
        self.policy, self.say = policy, say

    def send_idempotent(self, what: str, send: Callable[[], T]) -> T:
        """Sends a request that may safely be repeated, until it succeeds or the retry policy is used up.

        Raises:
            Refused, Unreachable, UserError: it failed for good.
        """
        waited_s, attempt = 0.0, 0
        while True:
            try:
                return send()
            except RequestFailed as failure:
                wait_s = failure.wait_s or self.policy.wait_s(attempt)
                attempt += 1
                waited_s += wait_s
                if not failure.passing or waited_s > self.policy.limit_s or attempt == self.policy.tries:
                    raise _final(what, failure) from None
                self.say(f"Kaggle, {what}: {failure}; again in {wait_s:.0f} s")
            time.sleep(wait_s)

    def send_at_most_once(self, what: str, send: Callable[[], T]) -> T:
        """Sends a request that must not take effect twice: repeated only where the server surely did nothing.

        Raises:
            Refused, Unreachable, UserError: it was not done.
            OutcomeUnknown: it may have been done.
        """

        def guarded() -> T:
            try:
                return send()
            except RequestFailed as failure:
                if failure.passing and failure.code != 429:
                    raise OutcomeUnknown(
                        f"Kaggle may or may not have taken {what} ({failure}): see what it has"
                    ) from None
                raise

        return self.send_idempotent(what, guarded)

    def upload(self, file: Path, begin: Callable[[], tuple[str, str]]) -> str:
        """Sends a file. One that was cut goes on where it was cut, for as long as it gets on at all.

        Args:
            begin: makes a place for it: the token that stands for it, and the address to send it to.

        Returns:
            token: of a file that Kaggle has whole.
        """
        with waiting(self.say, f"uploading {file.name}", file.stat().st_size) as wait:
            upload = _Upload(file, begin, self.policy, wait)
            while True:
                before = upload.at
                try:
                    return self.send_idempotent(f"file {file.name}", upload.attempt)
                except Unreachable:
                    if upload.at <= before:
                        raise

    def download(self, what: str, url: str, target: Path, largest: int) -> int:
        """Writes a file under another name, then renames it: it is there whole, or not at all.

        Args:
            largest: bytes that are taken.

        Returns:
            size: of the file in bytes.
        """
        part = None
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            number, part = tempfile.mkstemp(prefix=".part-", dir=target.parent)
            with os.fdopen(number, "wb") as stream, waiting(self.say, f"fetching {what}") as wait:
                self.send_idempotent(what, lambda: _receive(url, stream, largest, self.policy.silence_s, wait))
                size = stream.tell()
            os.replace(part, target)
            return size
        except _TooLarge:
            raise MachineError(f"{what} is larger than {largest:,} bytes, and was not taken") from None
        except OSError as error:
            raise MachineError(f"{what} cannot be written into {target.parent}: {error.strerror}") from None
        finally:
            if part:
                with contextlib.suppress(OSError):
                    os.unlink(part)  # not there after the renaming


@contextlib.contextmanager
def translate_errors() -> Iterator[None]:
    """Context manager: turns exceptions of requests and of the kaggle client into `RequestFailed`."""
    import requests

    try:
        yield
    except requests.HTTPError as error:
        if error.response is None:  # not `if error.response`: those of 4xx and 5xx are false
            raise RequestFailed("no answer came") from None
        raise _failure(error.response) from None
    except requests.RequestException as error:
        raise RequestFailed(f"the connection was lost ({type(error).__name__})") from None
    except (ValueError, KeyError, TypeError) as error:
        raise RequestFailed(f"the answer cannot be read ({type(error).__name__})") from None


def one_line(text: str) -> str:
    """A foreign message on one line: printable characters only, cut at 300."""
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return line if len(line) <= 300 else line[:300] + " ..."


def safe_path(folder: Path, name: str, what: str) -> Path:
    """The path of a foreign file name in a folder; refuses names that lead out of it.

    Raises:
        MachineError: out of the folder, or nobody can tell where.
    """
    parts, target = name.split("/"), folder / name
    plain = name.isprintable() and "\\" not in name and not {"", ".", ".."} & set(parts)
    between = [folder.joinpath(*parts[:depth]) for depth in range(1, len(parts))]
    if not plain or any(parent.is_symlink() for parent in between):
        raise MachineError(
            f"{what} has a file named {one_line(repr(name))}, which may lead elsewhere: nothing is fetched"
        )
    return target


class _TooLarge(Exception):
    pass


class _Upload:
    """The upload of one file, which may take several attempts.

    The protocol is that of Google's resumable uploads: the whole file is PUT; after a cut, an empty PUT asks how much
    has arrived (308 and a Range), and the rest is PUT.
    """

    def __init__(self, file: Path, begin: Callable[[], tuple[str, str]], policy: RetryPolicy, wait: Wait) -> None:
        self.file, self.size, self._begin, self._policy, self._wait = file, file.stat().st_size, begin, policy, wait
        self.at = 0  # bytes that Kaggle has
        self._token = self._url = ""

    def attempt(self) -> str:
        resumed = bool(self._url)
        try:
            if resumed:
                self.at = self._arrived()
            else:
                (self._token, self._url), self.at = self._begin(), 0
            if self.at < self.size or not resumed:
                self._put_rest()
        except RequestFailed as failure:
            if resumed and failure.code in (404, 410):
                self._url = ""
                raise RequestFailed("the place for it has expired") from None
            raise
        return self._token

    def _arrived(self) -> int:
        answer = self._put(b"", {"Content-Range": f"bytes */{self.size}"})
        if answer.status_code != 308:
            return self.size
        last = answer.headers.get("Range", "").rpartition("-")[2]  # bytes=0-999, or no header: nothing
        return int(last) + 1 if last.isdecimal() else 0

    def _put_rest(self) -> None:
        with self.file.open("rb") as stream:
            stream.seek(self.at)
            where = {"Content-Range": f"bytes {self.at}-{self.size - 1}/{self.size}"} if self.at else {}
            content = _Counted(stream, self._wait)
            answer = self._put(content if self.size else b"", where)  # of an empty stream requests knows no length
        if answer.status_code == 308:
            raise RequestFailed("it arrived in part")

    def _put(self, data: Any, headers: dict[str, str]) -> Any:
        import requests

        with translate_errors():
            answer = requests.put(
                self._url, data=data, headers=headers, timeout=self._policy.silence_s, allow_redirects=False
            )
        if answer.status_code not in (200, 201, 308):
            raise _failure(answer)
        return answer


class _Counted:
    """A file that says how much of it was read, which is little more than what has been sent."""

    def __init__(self, stream: BinaryIO, wait: Wait) -> None:
        self._stream, self._wait = stream, wait

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self._wait.done = self._stream.tell()
        self._wait.note = f"{self._wait.done / 1e6:.1f} of {self._wait.total / 1e6:.1f} MB"
        return data

    def __iter__(self) -> Iterator[bytes]:
        return iter(lambda: self.read(CHUNK), b"")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _receive(url: str, stream: BinaryIO, largest: int, silence_s: float, wait: Wait) -> None:
    import requests

    stream.seek(0)
    stream.truncate()
    with translate_errors(), requests.get(url, stream=True, timeout=silence_s) as answer:
        if answer.status_code != 200:  # what comes with it is a page about the error
            raise _failure(answer)
        for chunk in answer.iter_content(CHUNK):
            if stream.tell() + len(chunk) > largest:
                raise _TooLarge
            stream.write(chunk)
            wait.note = f"{stream.tell() / 1e6:.1f} MB"


def _failure(answer: Any) -> RequestFailed:
    """What an answer that is an error says."""
    code, words = answer.status_code, answer.reason or ""
    with contextlib.suppress(ValueError):
        said = answer.json()
        if isinstance(said, dict):
            words = said.get("message") or words
            code = code if code >= 400 or not isinstance(said.get("code"), int) else said["code"]
    return RequestFailed(one_line(f"{code} {words}"), code, _asked_wait_s(answer.headers.get("Retry-After", "")))


def _asked_wait_s(text: str) -> float:
    """Seconds of a Retry-After header, which is a number or a date; 0 = it asks for nothing that can be read."""
    try:
        wait_s = float(text)
    except ValueError:
        try:
            wait_s = (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):
            return 0
    return max(0, wait_s) if math.isfinite(wait_s) else 0


def _final(what: str, failure: RequestFailed) -> UserError | MachineError:
    if failure.code == 401:
        return UserError(f"Kaggle does not accept the credentials that the kaggle client found: {SIGN_IN}")
    if failure.passing:
        asked = f", and asks to wait {failure.wait_s:.0f} s" if failure.wait_s else ""
        return Unreachable(f"Kaggle cannot be reached for {what} ({failure}{asked}): try again later")
    return Refused(what, failure.code, str(failure))
