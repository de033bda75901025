"""`bin/report`: its words, and what they ask for.

bin/report RUN_DIR [--watch] [--open]   a run, as it is or as it goes on
bin/report RUN_A RUN_B [--open]         two runs of the same tasks
bin/report TRAINING_DIR [--watch]       a training, ended or going on
"""

import os
import sys
import time
import webbrowser
from pathlib import Path
from urllib.parse import quote

from ..command import Parser, user_path
from ..errors import MachineError, UserError
from ..files import write_whole
from .collect import RunReader
from .compare import compare_folders, page_name
from .page import EVERY_S, comparison_page, run_page, training_page, warnings_of
from .training import is_training, read_training
from .writer import PAGE


def main(arguments: list[str]) -> int:
    parser = Parser(
        prog="bin/report", description="Write what a run or a training came to as one page that any browser opens."
    )
    parser.add_argument(
        "folders",
        type=user_path,
        nargs="+",
        metavar="DIR",
        help="what bin/solve or bin/train wrote; two runs to compare",
    )
    parser.add_argument("--out", type=user_path, metavar="FILE", help="the page; default: report.html in the folder")
    parser.add_argument("--watch", action="store_true", help="write it again and again until the end")
    parser.add_argument("--open", action="store_true", help="open it in the browser")
    args = parser.parse_args(arguments)
    if len(args.folders) > 2 or (args.watch and len(args.folders) > 1):
        raise UserError("give one folder, or two runs to compare, without --watch")
    first = args.folders[0]
    name = PAGE if len(args.folders) == 1 else page_name(*args.folders)
    page = args.out or first / name
    goes_on, reader, warnings = False, None, list[str]()
    if len(args.folders) == 2:
        links = [_link(folder / PAGE, page) for folder in args.folders]
        _write(comparison_page(compare_folders(*args.folders), links), page)
    elif is_training(first):
        goes_on = _write_training(first, page, args.watch)
    else:
        reader = RunReader(first)
        goes_on, warnings = _write_run(reader, page)
    print(page, flush=True)
    if args.open and not webbrowser.open(page.resolve().as_uri()):
        print(f"no browser could be started here: open {page} in one", file=sys.stderr)
    while args.watch and goes_on:
        time.sleep(EVERY_S)
        if reader:
            goes_on, warnings = _write_run(reader, page)
        else:
            goes_on = _write_training(first, page, watch=True)
    for warning in warnings:
        print(warning, file=sys.stderr)
    return 0


def _write_run(reader: RunReader, page: Path) -> tuple[bool, list[str]]:
    """Whether the run goes on, and what must be known of it."""
    run = reader.read()
    _write(run_page(run), page)
    return run.is_running, warnings_of(run)


def _write_training(folder: Path, page: Path, watch: bool) -> bool:
    """Whether the training goes on. Nothing says that it was killed: a page that is not written again tells its age."""
    training = read_training(folder)
    goes_on = watch and not training.has_ended
    _write(training_page(training, EVERY_S if goes_on else None), page)
    return goes_on


def _link(file: Path, page: Path) -> str:
    """The address of a file on a page; "": there is no such file."""
    return quote(os.path.relpath(file.resolve(), page.resolve().parent)) if file.is_file() else ""


def _write(text: str, file: Path) -> None:
    try:
        write_whole(file, text, sync=False)
    except OSError as error:
        raise MachineError(f"{file} cannot be written ({error.strerror}): give another --out") from None
