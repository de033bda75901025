"""Speed, measured in one run on the machine in hand: `bin/bench NAME [--json]`.

Every benchmark answers rows of the same form: name, ours, field (what it is compared with, if anything), ratio, unit.
"""

import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import count

import torch
from rich.console import Console
from rich.table import Table

from .config import PACKAGE_DIR, CorpusConfig, FormatConfig, Parser, run_main
from .corpus import SampleStream
from .train import cpu_name

MEASURED_S = 5.0  # how long a speed is measured


@dataclass(frozen=True)
class Row:
    name: str
    ours: float
    field: float | None
    ratio: float | None
    unit: str


def bench_stream() -> list[Row]:
    """Tokens a second that one core feeds: drawing, augmenting and encoding samples; then with live RE-ARC too."""
    rows = []
    for name, config in (
        ("stream without generation", CorpusConfig(re_arc=0, arc_training=1)),
        ("stream with live RE-ARC", CorpusConfig()),
    ):
        stream = SampleStream(config, FormatConfig(), seed=0)
        for i in range(200):  # imports and first calls are not measured
            stream[i]
        start, tokens = time.perf_counter(), 0
        for i in count(200):
            tokens += len(stream[i])
            if (elapsed := time.perf_counter() - start) > MEASURED_S:
                break
        rows.append(Row(name, round(tokens / elapsed), None, None, "tokens/s per core"))
    return rows


BENCHES: dict[str, Callable[[], list[Row]]] = {"stream": bench_stream}


def main(arguments: list[str]) -> int:
    parser = Parser(prog="bin/bench", description="Measure speed on this machine.")
    parser.add_argument("name", choices=BENCHES)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = BENCHES[args.name]()
    if args.json:
        print(json.dumps({"rows": [asdict(row) for row in rows], "machine": cpu_name(), "commit": _commit()}))
        return 0
    table = Table("what", "ours", "field", "ratio", "unit", title=f"{args.name} on {cpu_name()}")
    for row in rows:
        table.add_row(
            row.name, f"{row.ours:,.0f}", *("-" if v is None else f"{v:,.2f}" for v in (row.field, row.ratio)), row.unit
        )
    Console().print(table)
    return 0


def _commit() -> str:
    """The commit of the checkout, or "" outside one."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=PACKAGE_DIR, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


if __name__ == "__main__":
    run_main(main)
