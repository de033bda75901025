"""How a command starts and ends: its arguments, its one sentence of complaint, its exit code."""

import argparse
import errno
import io
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from .errors import MachineError, UserError

_THEIRS = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)  # what is wrong with a path that a user gave
Say = Callable[[str], None]  # takes a line for the person at the keyboard


_called = "bin/"  # how commands are called here: see `run_main`
# Not a part of a user's path, such as /home/me/bin/train/x.
_CALL = re.compile(r"(?<![\w./~-])bin/(solve|score|train|submit|data|show|report|study|bench)(?![\w/-]|\.\w)")


def as_called(text: str) -> str:
    """A text with its commands as they are called here: bin/solve is `arc-solver solve` where a wheel is installed."""
    return text if _called == "bin/" else _CALL.sub(rf"{_called}\1", text)


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are `UserError`s.

    Args:
        prog: the command as it is called in a checkout.
    """

    def __init__(self, *, prog: str, **settings: Any):
        super().__init__(prog=as_called(prog), **settings)

    def format_help(self) -> str:
        return as_called(super().format_help())

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog.partition(' --')[0]} --help")


def user_path(text: str) -> Path:
    """A path as a user writes it: `~` is the home folder, which shells do not see in --out=~/runs."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"there is no home folder for {text!r}") from None


def add_task_arguments(parser: Parser, required: bool = False) -> None:
    """The arguments that name a set and choose tasks of it, the same for every command."""
    parser.add_argument(
        "--tasks",
        metavar="SPEC",
        required=required,
        help="demo, arc-agi-1/training, arc-agi-1/evaluation, a file or a folder",
    )
    add_choice_arguments(parser)


def add_choice_arguments(parser: Parser) -> None:
    """The arguments that choose tasks of a set."""
    parser.add_argument("--solutions", metavar="FILE", help="solutions file, if not beside the challenges")
    parser.add_argument("--ids", help="only these tasks, separated by commas")
    parser.add_argument("--limit", type=int, metavar="N", help="the N tasks with the fewest tokens")
    parser.add_argument("--sample", type=int, metavar="N", help="N tasks drawn at random, spread over all sizes")
    parser.add_argument("--sample-seed", type=int, metavar="S", help="of that draw; default 0")


def task_overrides(args: argparse.Namespace) -> list[str]:
    """What those arguments say, as overrides for `load_config`."""
    for option, count in (("--limit", args.limit), ("--sample", args.sample)):
        if count is not None and count < 1:
            raise UserError(f"{option} is at least 1, got {count}; leave it out for all tasks")
    if args.sample_seed is not None and args.sample is None:
        raise UserError("--sample-seed is of the draw that --sample N makes: give that too, or leave it out")
    ids = None if args.ids is None else [i.strip() for i in args.ids.split(",") if i.strip()]
    if ids == []:
        raise UserError("--ids names no task: give ids with commas between, or leave it out")
    given = {
        "spec": args.tasks,
        "solutions": args.solutions,
        "ids": ids,
        "limit": args.limit,
        "sample": args.sample,
        "sample_seed": args.sample_seed,
    }
    return [f"tasks.{key}={json.dumps(value, ensure_ascii=False)}" for key, value in given.items() if value is not None]


def require_new_dir(folder: Path) -> None:
    """Refuses an --out that is a file or holds anything."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file: give a folder")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} exists and is not empty: give another --out")


def run_main(main: Callable[[list[str]], int], called: str = "bin/") -> None:
    """Runs a command: exit code 0 done, 2 the user's input is wrong (one sentence, no traceback), 1 anything else.

    Args:
        called: what stands before a command's name in the words that call it.
    """
    global _called
    _called = called
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal may not know a sign
    try:
        code = main(sys.argv[1:])
    except (UserError, MachineError) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # of several training processes of a machine one says it
            print(as_called(f"error: {error}"), file=sys.stderr)
        code = 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 1
    except BrokenPipeError:  # whoever read what is printed, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains at its end
        code = 1
    except OSError as error:
        if error.errno not in _THEIRS or not error.filename:
            raise
        name = str(error.filename)
        print(f"error: {name[:100]}{'...' * (len(name) > 100)}: {error.strerror}", file=sys.stderr)
        code = 2
    sys.exit(code)
