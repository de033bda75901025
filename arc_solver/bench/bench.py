"""Speed, measured in one run on the machine in hand: `bin/bench NAME [--json]`.

Every benchmark answers rows of the same form: name, ours, baseline (what it is compared with, or nothing), ratio, unit.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.table import Table

from ..command import Parser
from ..config import CorpusConfig, FormatConfig, ModelConfig, TasksConfig, TrainConfig
from ..data.sources import PairMaker, read_source
from ..data.stream import SampleStream
from ..errors import UserError, install_command
from ..files import git_commit
from ..models import cpu_name, describe_precision, pick_device
from ..puzzles import TaskSet, load_tasks
from ..rng import named_rng
from .adaptation import compare_adaptation, profile_adaptation
from .memory import measure_all
from .precision import compare_precisions
from .schedule import TASKS, overhead_s
from .solving import (
    AS_MANY_SOLVED,
    RANDOM_TASKS,
    RANDOM_VIEWS,
    SCORE_TASKS,
    SETTINGS,
    SolveFigures,
    large_tasks,
    random_model,
    solve_alone,
)
from .solving import compare as compare_solving
from .training import BF16, QWEN_05B, compare, flop_utilisation

MEASURED_S = 5.0  # how long a speed is measured
DRAWS, PAIRS = 40, 4  # pairs of each rule that are timed, and of each task among them
SMALL_SHAPES = (
    ModelConfig(),
    ModelConfig(layers=8),
    ModelConfig(layers=8, width=384, heads=6, kv_heads=6, mlp_width=1024),
)


@dataclass(frozen=True)
class Measurement:
    """One line of a benchmark report: our value, the baseline's, their ratio, the unit."""

    name: str
    ours: float
    baseline: float | None
    ratio: float | None
    unit: str


def bench_stream() -> list[Measurement]:
    """Tokens a second that one core feeds: drawing, augmenting and encoding samples; then with live RE-ARC too.

    Then what a RE-ARC pair takes: of all rules, and of the slowest.
    """
    torch.set_num_threads(1)
    rows = []
    live, files = (read_source(source) for source in CorpusConfig().sources)
    for name, mixture in (("stream without generation", [files]), ("stream with live RE-ARC", [live, files])):
        stream = SampleStream(mixture, CorpusConfig(), FormatConfig(), 0)
        for i in range(200):  # imports and first calls are not measured
            stream[i]
        start, tokens = time.perf_counter(), 0
        for i in count(200):
            tokens += len(stream[i].sample)
            if (elapsed := time.perf_counter() - start) > MEASURED_S:
                break
        rows.append(Measurement(name, round(tokens / elapsed), None, None, "tokens/s per core"))
    means = {rule: _mean_draw_ms(maker) for rule, maker in live.tasks.items()}
    slowest = max(means, key=means.__getitem__)
    rows.append(Measurement("a live RE-ARC pair", sum(means.values()) / len(means), None, None, "ms"))
    rows.append(Measurement(f"a pair of the slowest rule, {slowest}", means[slowest], None, None, "ms"))
    return rows


def _mean_draw_ms(maker: PairMaker) -> float:
    """CPU time of a pair, over `DRAWS` that are drawn a task's worth at a time."""
    rng = named_rng(0, "bench")
    maker(rng, 1)  # imports and first calls are not measured
    start = time.process_time()
    for _ in range(DRAWS // PAIRS):
        maker(rng, PAIRS)
    return 1000 * (time.process_time() - start) / (DRAWS // PAIRS * PAIRS)


def bench_train() -> list[Measurement]:
    """Offline training against TRL and PEFT; on a GPU also how much of it is used."""
    if find_spec("trl") is None:
        raise UserError(f"bin/bench train compares with TRL: run {install_command('arc_solver[bench]')}")
    sides = compare()
    ours, baseline = sides["ours"], sides["baseline"]
    speed = ours.tokens_per_s / baseline.tokens_per_s
    memory = ours.peak_memory_bytes / baseline.peak_memory_bytes
    rows = [
        Measurement("tokens_per_second", ours.tokens_per_s, baseline.tokens_per_s, speed, "useful tokens/s"),
        Measurement("peak_memory", ours.peak_memory_bytes / 2**20, baseline.peak_memory_bytes / 2**20, memory, "MiB"),
    ]
    if torch.cuda.is_available():
        share = flop_utilisation(QWEN_05B, BF16, steps=10, device="cuda").share
        rows.append(Measurement("flop_utilisation", 100 * share, None, None, "% of peak, Qwen2.5-0.5B's shape"))
    return rows


def bench_scratch() -> list[Measurement]:
    """Training small models from scratch: tokens a second, and how much of the device's peak that is."""
    device = pick_device("auto")
    train = TrainConfig(batch_tokens=32_768 if device.type == "cuda" else 8192)
    rows = []
    for shape in SMALL_SHAPES:
        found = flop_utilisation(shape, train, steps=10, device=str(device))
        name = f"{found.parameters / 1e6:.1f}M_parameters"
        rows.append(
            Measurement(name, round(found.tokens_per_s), None, None, f"tokens/s, {shape.layers} x {shape.width}")
        )
        rows.append(Measurement(f"{name}_share", round(found.share, 3), None, None, "of the device's peak"))
    return rows


def bench_solve() -> list[Measurement]:
    """Test time against PEFT and `generate`: the demo set; decoding of large outputs; decoding with random weights."""
    _require_peft("solve")
    demo = load_tasks(TasksConfig(spec="demo"))
    ours, baseline = compare_solving(demo, scored=SCORE_TASKS)
    rows = [
        _more("adapt", ours.adapt_tokens_per_s, baseline.adapt_tokens_per_s, "tokens/s"),
        _less("decode_steps", ours.view_steps, baseline.view_steps, "forward steps x views"),
        _less("decode_batches", ours.batches, baseline.batches, "forward steps of batches"),
        _less("decode_time", ours.decode_s, baseline.decode_s, "s"),
        _more("score", ours.scores_per_s, baseline.scores_per_s, "candidates x views/s"),
        _more("whole", ours.tasks_per_hour, baseline.tasks_per_hour, "tasks/hour"),
        _at_equal_score(demo, baseline),
        Measurement("solved", ours.solved, baseline.solved, None, f"test outputs of {len(demo.tasks)} tasks"),
        _less("peak_memory", ours.peak_memory_bytes / 2**20, baseline.peak_memory_bytes / 2**20, "MiB, all processes"),
    ]
    ours, baseline = compare_solving(large_tasks())
    rows.append(_less("decode_time_200_cells", ours.decode_s, baseline.decode_s, "s"))
    rows.append(_less("decode_steps_200_cells", ours.view_steps, baseline.view_steps, "forward steps x views"))
    few = TaskSet(
        demo.name, demo.tasks[:RANDOM_TASKS], {task.id: demo.solutions[task.id] for task in demo.tasks[:RANDOM_TASKS]}
    )
    with TemporaryDirectory() as folder:
        settings = (*SETTINGS, "adapt.enabled=false", f"predict.views={RANDOM_VIEWS}")
        ours, baseline = compare_solving(few, random_model(Path(folder)), settings)
    rows.append(_less("decode_time_random", ours.decode_s, baseline.decode_s, "s"))
    return rows


def _require_peft(name: str) -> None:
    if find_spec("peft") is None:
        raise UserError(f"bin/bench {name} compares with PEFT: run {install_command('arc_solver[train]')}")


def _at_equal_score(task_set: TaskSet, baseline: SolveFigures) -> Measurement:
    """Tasks an hour where ours need not do the same work: it says how many outputs both solve."""
    least = solve_alone(task_set, AS_MANY_SOLVED)
    unit = f"tasks/hour; {least.solved} and {baseline.solved} test outputs solved"
    return _more("whole_at_equal_score", least.tasks_per_hour, baseline.tasks_per_hour, unit)


def _more(name: str, ours: float, baseline: float, unit: str) -> Measurement:
    return Measurement(name, ours, baseline, ours / baseline, unit)


def _less(name: str, ours: float, baseline: float, unit: str) -> Measurement:
    """A row of what should be little: the ratio says how many times less ours is."""
    return Measurement(name, ours, baseline, baseline / ours, unit)


def bench_schedule() -> list[Measurement]:
    """What a run costs besides solving, a task, with very many of them."""
    return [Measurement("overhead_per_task", 1000 * overhead_s(), None, None, f"ms, {TASKS:,} tasks")]


def bench_adapt() -> list[Measurement]:
    """Adaptation alone against PEFT's loop, on one core or GPU."""
    _require_peft("adapt")
    return [_more(found.name, found.ours, found.baseline, "tokens/s") for found in compare_adaptation()]


def profile_adapt() -> list[Measurement]:
    """Where the time of a step of adaptation goes."""
    return [Measurement(x.name, x.milliseconds, None, None, f"ms, {x.calls:.0f} calls") for x in profile_adaptation()]


def bench_precision() -> list[Measurement]:
    """Adapting and answering in the type that is used here, beside float32 (in the column of the baseline)."""
    found = compare_precisions()
    rows = {"tokens/s": _more, "s": _less}
    return [rows[compared.unit](compared.name, compared.used, compared.float32, compared.unit) for compared in found]


def bench_memory() -> list[Measurement]:
    """A step of adaptation: its peak beside the estimate (in the column of the baseline)."""
    gib = 2**30
    return [
        Measurement(
            name, step.measured / gib, step.estimated / gib, step.measured / step.estimated, "GiB beside the weights"
        )
        for name, step in measure_all().items()
    ]


BENCHES: dict[str, Callable[[], list[Measurement]]] = {
    "stream": bench_stream,
    "train": bench_train,
    "scratch": bench_scratch,
    "adapt": bench_adapt,
    "solve": bench_solve,
    "schedule": bench_schedule,
    "precision": bench_precision,
    "memory": bench_memory,
}


def main(arguments: list[str]) -> int:
    parser = Parser(prog="bin/bench", description="Measure speed on this machine.")
    parser.add_argument("name", choices=BENCHES)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--profile", action="store_true", help="with adapt: where the time of a step goes")
    args = parser.parse_args(arguments)
    if args.profile and args.name != "adapt":
        raise UserError("--profile is for bin/bench adapt")
    rows = profile_adapt() if args.profile else BENCHES[args.name]()
    precision = describe_precision(pick_device("auto"))
    if args.json:
        about = {"machine": cpu_name(), "precision": precision, "commit": git_commit()}
        print(json.dumps({"rows": [asdict(row) for row in rows], **about}))
        return 0
    table = Table("what", "ours", "baseline", "ratio", "unit", title=f"{args.name} on {cpu_name()}, {precision}")
    for row in rows:
        ours = f"{row.ours:,.{0 if row.ours > 100 else 2}f}"
        table.add_row(row.name, ours, *("-" if v is None else f"{v:,.2f}" for v in (row.baseline, row.ratio)), row.unit)
    Console().print(table)
    return 0
