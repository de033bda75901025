"""What goes wrong: for the person at the keyboard one sentence, for a program an exit code."""

import sys
from collections.abc import Sequence
from difflib import get_close_matches


class UserError(Exception):
    """What the user or a file got wrong, as one sentence that says what to do. Commands exit with code 2."""


class MachineError(Exception):
    """What the machine could not do, such as writing to a full disk, as one sentence. Commands exit with code 1."""


def install_command(what: str) -> str:
    """What installs a package, or arc_solver with an extra, where this program runs: `pip` alone may be another's."""
    return f"{sys.executable} -m pip install '{what}'"


def counted(number: int, noun: str) -> str:
    """A number of things as one says it: 1 task, 1,200 tasks."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def few(names: Sequence[object], most: int = 5, separator: str = ", ") -> str:
    """The first of many names, and how many more there are."""
    left = len(names) - most
    return separator.join(map(str, names[:most])) + (f" and {left:,} more" if left > 0 else "")


def meant(name: str, known: Sequence[str], prefix: str = "") -> str:
    """What to say of a name that is not known: the one that was probably meant, or else all there are.

    Args:
        prefix: stands before the names where they are used.
    """
    alike = get_close_matches(name, known, 1)
    return f"did you mean {prefix}{alike[0]}?" if alike else f"known: {', '.join(known)}"


def first_line(error: Exception) -> str:
    """What a library's error says, short enough for one sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
