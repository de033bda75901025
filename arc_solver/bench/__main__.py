"""`bin/bench`: the code is in `bench.py`."""

from ..command import run_main
from .bench import main

run_main(main)
