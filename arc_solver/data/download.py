"""A file from the web over connections that break: what has arrived stays, and the next try goes on behind it."""

import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import IO

from ..command import Say
from ..errors import MachineError, UserError

WAITS_S = (1.0, 2.0, 4.0, 8.0, 16.0)  # before each try but the first
SILENCE_S = 60.0  # a connection on which nothing comes for so long is lost
MOST_BYTES = 2 << 30  # that are taken
CHUNK = 1 << 16

Told = Callable[[int, int | None], None]  # takes the bytes that are here, and those of the whole file if known


class _Lost(Exception):
    """A try that failed for a reason that may pass."""


def download(url: str, part: IO[bytes], told: Told, say: Say) -> None:
    """Brings what is missing of a file behind what `part` has of it already.

    Servers that cannot begin in the middle send all of it again. Nobody knows yet whether it is the right file.

    Args:
        part: opened for appending.
        told: called at every piece that arrives.
        say: told of every try that failed.

    Raises:
        UserError: the server has no such file, or will not give it.
        MachineError: it cannot be reached, or sends too much; what has arrived stays in `part`.
    """
    for wait_s in WAITS_S:
        try:
            _attempt(url, part, told)
            return
        except _Lost as lost:
            say(f"{lost}; again in {wait_s:.0f} s")
            time.sleep(wait_s)
    try:
        _attempt(url, part, told)
    except _Lost as lost:
        raise MachineError(
            f"{url}: {lost}; {part.tell():,} bytes of it are here, and the same command goes on behind them; --archive"
            " takes a copy that you got in another way"
        ) from None


def _attempt(url: str, part: IO[bytes], told: Told) -> None:
    at = part.seek(0, 2)
    request = urllib.request.Request(url, headers={"Range": f"bytes={at}-"} if at else {})
    try:
        with urllib.request.urlopen(request, timeout=SILENCE_S) as answer:
            if answer.status != 206:
                at = part.truncate(0)
            length = answer.headers["Content-Length"]
            whole = at + int(length) if length else None
            while chunk := answer.read1(CHUNK):  # what is there: `read` would wait for all of it
                part.write(chunk)
                part.flush()  # whatever ends this process, it is there
                at += len(chunk)
                if at > MOST_BYTES:
                    raise MachineError(f"{url} is larger than {MOST_BYTES:,} bytes, and was not taken")
                told(at, whole)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # nothing is behind what is here
            return
        if error.code == 429 or error.code >= 500:
            raise _Lost(f"the server answers {error.code} {error.reason}") from None
        raise UserError(
            f"{url}: the server answers {error.code} {error.reason}: check whether a browser gets it; --archive takes a"
            " copy that you got in another way"
        ) from None
    except (OSError, http.client.HTTPException) as error:  # a URLError is the former
        why = getattr(error, "reason", None) or error
        raise _Lost(f"the connection failed ({str(why) or type(error).__name__})") from None
    if whole is not None and at < whole:
        raise _Lost(f"the connection was closed after {at:,} of {whole:,} bytes")
