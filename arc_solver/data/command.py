"""`bin/data`: its words, and what they ask for."""

import argparse
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from ..command import Parser, as_called, require_new_dir, user_path
from ..config import AuditConfig, TasksConfig, ValidationConfig
from ..errors import MachineError, UserError, counted, meant
from ..files import sha256
from ..puzzles import Pair, TaskSet, load_tasks
from ..puzzles.task_files import BUILT_IN
from ..waiting import Reporter, Wait, waiting
from .corpus import make_partition, write_partition
from .generate import write_re_arc
from .leaks import pair_keys, shared_tasks
from .published import GITHUB, PUBLISHED, PublishedSet, get
from .sources import pairs_of, read_set
from .statistics import statistics

SHARED = 3  # exit code of an audit that found something
SHOWN = 20  # of what an audit found


def main(arguments: list[str]) -> int:
    args = _parser().parse_args(arguments)
    code: int = args.run(args)
    return code


def _parser() -> Parser:
    parser = Parser(prog="bin/data", description="Task sets: get them, know them, part them, make them, compare them.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], what: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, prog=f"{parser.prog} {name}", help=what, description=f"{what}.")
        made.set_defaults(run=run)
        return made

    fetch = command("get", _get, "bring a public set here, checked against its repository")
    fetch.add_argument("name", metavar="NAME", help=f"{', '.join(PUBLISHED)}; see bin/data list")
    fetch.add_argument("--out", type=user_path, default="data", metavar="DIR", help="where to; default data")
    fetch.add_argument("--archive", type=user_path, metavar="FILE", help="a copy that you got in another way")
    fetch.add_argument("--mirror", default=GITHUB, metavar="URL", help=f"with the paths of {GITHUB}, the default")

    listed = command("list", _list, "the public sets that are known: size, licence, overlap with evaluation sets")
    listed.add_argument("--out", type=user_path, default="data", metavar="DIR", help="where they are looked for")

    part = command("partition", _partition, "draw tasks for validation; both parts as Kaggle's files")
    part.add_argument("--of", required=True, metavar="SPEC", help="the set that is parted")
    part.add_argument("--tasks", required=True, type=int, metavar="N", help="for validation; the others for training")
    part.add_argument("--seed", type=int, default=0, metavar="S", help="of the draw: validation.seed of bin/train")
    part.add_argument("--out", required=True, type=user_path, metavar="DIR")

    make = command("make", _make, "generate pairs of RE-ARC's rules, which are the ARC-AGI-1 training tasks")
    make.add_argument("kind", choices=["re-arc"], metavar="re-arc")
    make.add_argument("--as", dest="form", choices=["pairs", "tasks"], default="pairs", help="default pairs")
    make.add_argument("--pairs", type=int, metavar="N", help="of each rule; default 1000, or 5 as tasks")
    make.add_argument("--difficulty", type=_range, default="0:1", metavar="LOW:HIGH", help="within 0:1, the default")
    make.add_argument("--seed", type=int, default=0, metavar="S")
    make.add_argument("--processes", type=int, default=os.cpu_count(), metavar="N", help="default: one a core")
    make.add_argument("--out", required=True, type=user_path, metavar="FILE", help=".json or .json.gz")

    stats = command("stats", _stats, "tokens, sizes, colours, and how much fits a context")
    audit = command("audit", _audit, "tasks that two sets share, by id or by pairs; exit code 3 if there are any")
    digest = command("hash", _hash, "what tells a set from others: digest of its tasks, sha256 of its file")
    for name in ("first", "second"):
        audit.add_argument(name, metavar="SPEC")
    for each in (stats, digest):
        each.add_argument(
            "spec", metavar="SPEC", help="as --tasks of bin/solve, or a file or folder of pairs as RE-ARC's"
        )
    for each in (listed, stats, audit, digest):
        each.add_argument("--json", action="store_true")
    return parser


def _range(text: str) -> tuple[float, float]:
    try:
        low, high = map(float, text.split(":"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no range such as 0:0.5") from None
    if not 0 <= low <= high <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not within 0:1")
    return low, high


def _show(wait: Wait, unit: str, done: int, of: int | None) -> None:
    """Notes how many of a unit are done."""
    wait.done, wait.total = done, of or 0
    if unit == "bytes":
        wait.note = f"{done / 1e6:,.1f}{f' of {of / 1e6:,.1f}' if of else ''} MB"
    else:
        wait.note = f"{done:,}{f' of {of:,}' if of else ''} {unit}"


# ---- public sets ---------------------------------------------------------------------------------------------------


def _get(args: argparse.Namespace) -> int:
    if args.name not in PUBLISHED:
        if args.name in BUILT_IN:
            raise UserError(f"{args.name} comes with arc_solver: give it to --tasks")
        raise UserError(f"there is no set {args.name!r} to get; {meant(args.name.lower(), [*PUBLISHED])}")
    if not args.mirror.startswith(("https://", "http://")):
        raise UserError(f"--mirror {args.mirror}: give an address that begins with https:// or http://")
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out} is a file: give a folder")
    wanted, say = PUBLISHED[args.name], Reporter(Console(stderr=True))
    with waiting(say, f"getting {wanted.name}") as wait:
        path, is_new = get(wanted, args.out, partial(_show, wait), say, args.archive, args.mirror.rstrip("/"))
    state = "is in" if is_new else "was in"
    print(f"{wanted.name} {state} {path}: {wanted.what}; {wanted.licence}, {wanted.repository} at {wanted.commit[:8]}")
    print(as_called(_use(wanted, path)))
    return 0


def _use(wanted: PublishedSet, path: Path) -> str:
    """How to use a set that is here."""
    if wanted.kind == "pairs":
        return f'to train on it: a source with kind = "pairs" and path = "{path}" (docs/training.md)'
    folders = [f"{path}/{part}" for part in wanted.parts] or [str(path)]
    return "\n".join(f"to solve it: bin/solve --tasks {folder}" for folder in folders)


def _list(args: argparse.Namespace) -> int:
    here = {name: (args.out / known.becomes).exists() for name, known in PUBLISHED.items()}
    if args.json:
        print(json.dumps([{**asdict(known), "here": here[name]} for name, known in PUBLISHED.items()], indent=1))
        return 0
    print(f"{', '.join(BUILT_IN)}\n  come with arc_solver: as they stand, for --tasks")
    for name, known in PUBLISHED.items():
        where = f"here: {args.out / known.becomes}" if here[name] else as_called(f"to get it: bin/data get {name}")
        print(f"{name}\n  {known.what}\n  {known.licence}, {known.repository} at {known.commit[:8]}")
        print(f"  in common with the evaluation sets: {known.overlap}\n  {where}")
    return 0


# ---- sets that are made --------------------------------------------------------------------------------------------


def _partition(args: argparse.Namespace) -> int:
    require_new_dir(args.out)
    if args.tasks < 1:
        raise UserError(f"--tasks is at least 1, got {args.tasks}")
    never = AuditConfig().exclude
    with waiting(Reporter(Console(stderr=True)), f"reading {args.of}"):
        partition = make_partition(ValidationConfig(of=args.of, tasks=args.tasks, seed=args.seed), never)
        kept, rest = (
            {task_id: pair_keys(pairs) for task_id, pairs in pairs_of(part).items()}
            for part in (partition.validation, partition.rest)
        )
    twins = {shared.first: shared.second for shared in shared_tasks(rest, kept)}
    partition = replace(partition, rest=partition.rest.without(twins))
    try:
        write_partition(partition, args.out)
    except OSError as error:
        raise MachineError(f"{args.out} cannot be written: {error.strerror}") from None
    for name, part in (("validation", partition.validation), ("training", partition.rest)):
        files = f"{args.out}/{name}_challenges.json and {name}_solutions.json"
        print(f"{files}: {counted(len(part.tasks), 'task')} of {args.of}")
    if left_out := [task.id for task in load_tasks(TasksConfig(spec=args.of)).tasks if task.id in never]:
        print(f"in neither: {', '.join(left_out)}, which share pairs with evaluation tasks (audit.exclude)")
    if twins:
        named = ", ".join(f"{first} with {second}" for first, second in twins.items())
        print(f"in neither, as they share pairs with validation tasks: {named}")
    own_pairs = "" if args.of == "arc-agi-1/training" else " validation.re_arc=false"  # the others have no generators
    print(
        f"to hold the same out of a training: validation.of={args.of} validation.tasks={args.tasks}"
        f" validation.seed={args.seed}{own_pairs} audit.overlap=exclude"
    )
    return 0


def _make(args: argparse.Namespace) -> int:
    least, usual = (1, 1000) if args.form == "pairs" else (2, 5)
    count = usual if args.pairs is None else args.pairs
    if count < least or args.processes < 1:
        raise UserError(f"--pairs is at least {least} and --processes at least 1")
    if not args.out.name.endswith((".json", ".json.gz")):
        raise UserError(f"--out {args.out}: give a name that ends in .json or .json.gz")
    if args.out.exists():
        raise UserError(f"{args.out} exists: give another --out, or remove it")
    if not args.out.parent.is_dir() and args.out.parent.exists():
        raise UserError(f"--out {args.out}: {args.out.parent} is a file, not a folder")
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with waiting(Reporter(Console(stderr=True)), "making RE-ARC") as wait:
            settings = (args.form, count, args.difficulty, args.seed, args.processes)
            made = write_re_arc(args.out, *settings, partial(_show, wait, "rules"))
    except OSError as error:
        raise MachineError(f"{args.out} cannot be written: {error.strerror or error}") from None
    print(f"{args.out}: {counted(sum(made.values()), 'pair')} of {len(made)} rules, sha256 {sha256(args.out)}")
    if few := {rule: number for rule, number in made.items() if number < count}:
        listed = ", ".join(f"{rule} {number}" for rule, number in few.items())
        print(f"fewer than {count} different ones at this difficulty: {listed}")
    print(f'to train on it: a source with kind = "{args.form}" and path = "{args.out}" (docs/training.md)')
    return 0


# ---- sets that are there -------------------------------------------------------------------------------------------


def _read(spec: str) -> TaskSet | Mapping[str, Sequence[Pair]]:
    with waiting(Reporter(Console(stderr=True)), f"reading {spec}"):
        return read_set(spec)


def _stats(args: argparse.Namespace) -> int:
    found = _read(args.spec)
    told = statistics(found)
    if args.json:
        print(json.dumps(asdict(told)))
        return 0
    is_lists = not isinstance(found, TaskSet)
    kind = ", as lists of pairs" * is_lists
    unknown = f", and {counted(told.unsolved, 'test input')} without a known output" if told.unsolved else ""
    print(f"{args.spec}: {counted(told.tasks, 'task')}{kind}; {counted(told.pairs, 'pair')}{unknown}")
    table = Table("", *("least", "median", "most"), box=SIMPLE, header_style="")
    for name, spread in told.spreads.items():
        table.add_row(name, *(f"{value:,.10g}" for value in (spread.least, spread.median, spread.most)))
    Console().print(table)
    print(f"the output has the shape of its input: {told.same_shape:.0%} of the pairs")
    print("cells by colour: " + ", ".join(f"{colour}: {share:.1%}" for colour, share in enumerate(told.colours)))
    what = "pairs of median length that fit" if is_lists else "tasks that fit, with their longest answer,"
    print(f"{what} a context of " + ", ".join(f"{context:,} tokens: {fit:,}" for context, fit in told.fits.items()))
    return 0


def _audit(args: argparse.Namespace) -> int:
    specs = (args.first, args.second)
    sets = [pairs_of(_read(spec)) for spec in specs]
    with waiting(Reporter(Console(stderr=True)), "comparing", sum(map(len, sets))) as wait:
        keys = [{task_id: pair_keys(pairs) for task_id, pairs in wait.over(lists.items())} for lists in sets]
    shared = shared_tasks(*keys)
    if args.json:
        print(json.dumps({"sets": specs, "tasks": [*map(len, sets)], "shared": [*map(asdict, shared)]}))
        return SHARED if shared else 0
    by_id = sum(each.same_id for each in shared)
    ids = [{getattr(each, side) for each in shared} for side in ("first", "second")]
    by_pairs = sum(each.pairs > 0 for each in shared)
    print(
        f"{len(ids[0])} of the {counted(len(sets[0]), 'task')} of {args.first} are in {args.second}, as {len(ids[1])}"
        f" of its {len(sets[1])}: {by_id} by id, {by_pairs} by pairs that are the same up to geometry and colours"
    )
    for each in shared[:SHOWN]:
        how = [*["the same id"] * each.same_id, *[counted(each.pairs, "shared pair")] * (each.pairs > 0)]
        print(f"  {each.first} and {each.second}: {' and '.join(how)}")
    if len(shared) > SHOWN:
        print(f"  and {len(shared) - SHOWN} more: --json has all of them")
    return SHARED if shared else 0


def _hash(args: argparse.Namespace) -> int:
    found = _read(args.spec)
    file = Path(args.spec).expanduser()
    of_file = sha256(file) if args.spec not in BUILT_IN and file.is_file() else None
    tasks = found if isinstance(found, TaskSet) else None
    told = {"set": args.spec, "tasks": len(pairs_of(found)), "digest": tasks and tasks.digest, "sha256": of_file}
    if args.json:
        print(json.dumps(told))
        return 0
    if tasks:
        of = counted(len(tasks.tasks), "task")
        print(f"digest {tasks.digest}: of {of}, grids and known solutions, as scores say it")
    if of_file:
        print(f"sha256 {of_file}: of the file, as a source of bin/train has it")
    if not tasks and not of_file:
        raise UserError(f"{args.spec} is a folder of lists of pairs: only its archive or a single file has a sha256")
    return 0
