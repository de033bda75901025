"""`bin/report`: the code is in `command.py`."""

from ..command import run_main
from .command import main

run_main(main)
