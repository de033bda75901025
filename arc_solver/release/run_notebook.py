"""Executes a notebook as Kaggle does, cell after cell, and prints what it prints: run_notebook.py NOTEBOOK EXECUTED.

It runs in the rehearsal's sandbox, where there is no other file of this package. The exit code is 1 if a cell raises or
the kernel dies; what came of it until then is written all the same.
"""

import re
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

START_S = 300  # in which the kernel must answer


class PrintingNotebookClient(NotebookClient):
    """An nbclient that prints outputs at once, so that a killed notebook leaves a log."""

    def process_message(self, msg: dict[str, Any], cell: Any, cell_index: int) -> Any:
        content = msg["content"]
        if msg["msg_type"] == "stream":
            print(content["text"], end="", flush=True)
        elif msg["msg_type"] == "error":
            text = "\n".join(content["traceback"]) or f"{content['ename']}: {content['evalue']}"
            print(f"cell {cell_index + 1} raised:\n" + re.sub(r"\x1b\[[0-9;]*m", "", text), flush=True)
        return super().process_message(msg, cell, cell_index)


def main(notebook_file: str, executed_file: str) -> int:
    notebook = nbformat.read(notebook_file, as_version=4)
    kernel_file = Path(executed_file).with_suffix(".kernel.txt")
    client = PrintingNotebookClient(notebook, timeout=None, startup_timeout=START_S, kernel_name="python3")
    try:
        with kernel_file.open("w") as output:  # the kernel says again here what its children print
            client.execute(stdout=output, stderr=output)
    except CellExecutionError:
        return 1
    except DeadKernelError:
        print(f"{kernel_file.read_text()[-2000:]}\nthe kernel died, as it does when memory runs out", flush=True)
        return 1
    finally:
        nbformat.write(notebook, executed_file)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
