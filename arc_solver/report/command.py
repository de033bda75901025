"""`bin/report`: its words, and what they ask for.

bin/report RUN_DIR [--open]
"""

import webbrowser
from pathlib import Path

from ..command import Parser, user_path
from ..errors import MachineError
from ..files import write_whole
from .collect import RunReader
from .page import run_page

PAGE = "report.html"


def main(arguments: list[str]) -> int:
    parser = Parser(prog="bin/report", description="Write what a run came to as one page that any browser opens.")
    parser.add_argument("folder", type=user_path, metavar="RUN_DIR", help="a folder that bin/solve wrote")
    parser.add_argument("--open", action="store_true", help="open it in the browser")
    args = parser.parse_args(arguments)
    page = args.folder / PAGE
    write(run_page(RunReader(args.folder).read()), page)
    print(page)
    if args.open:
        webbrowser.open(page.resolve().as_uri())
    return 0


def write(text: str, file: Path) -> None:
    try:
        write_whole(file, text, sync=False)
    except OSError as error:
        raise MachineError(f"{file} cannot be written ({error.strerror}): give another --out") from None
