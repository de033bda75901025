"""`bin/train`: its words, and what they ask for. They are understood before PyTorch is imported."""

import math
import os
import signal
import sys
import time

from rich.console import Console

from ..clock import command_age_s
from ..command import Parser, user_path
from ..config import load_config
from ..errors import UserError
from ..waiting import IMPORTING_S, Reporter, waiting


def main(arguments: list[str]) -> int:
    began = time.monotonic() - command_age_s()
    parser = Parser(prog="bin/train", description="Train a model offline on ARC tasks, RE-ARC and other sources.")
    parser.add_argument("config", nargs="?", help="TOML file, e.g. configs/bundled.toml; with --resume that of the run")
    parser.add_argument("--out", type=user_path, help="folder for the log, the checkpoint and the model")
    parser.add_argument(
        "--max-minutes",
        type=float,
        default=math.inf,
        help="from start to end, all counted; the schedule is shaped to it",
    )
    parser.add_argument("--resume", action="store_true", help="continue the run in --out from its last checkpoint")
    parser.add_argument("--plot-lr", type=user_path, metavar="FILE", help="draw the learning rates, and train nothing")
    parser.add_argument("--seed", type=int, help="run.seed")
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value")
    args = parser.parse_intermixed_args(arguments)
    if not args.max_minutes > 0:
        raise UserError(f"--max-minutes must be above 0, got {args.max_minutes:g}")
    seed = [] if args.seed is None else [f"run.seed={args.seed}"]
    if args.resume and args.config and "=" in args.config:
        args.overrides, args.config = [args.config, *args.overrides], None
    if not args.config and args.resume and args.out and (args.out / "config.json").is_file():
        args.config = args.out / "config.json"
    if not args.config:
        raise UserError(
            "give a config, such as configs/bundled.toml, or --resume with the --out of a run; see bin/train --help"
        )
    config = load_config(args.config, [*args.overrides, *seed])
    if not args.out and not args.plot_lr:
        raise UserError("--out is missing: give a folder for the log, the checkpoints and the model")
    say = Reporter(Console(stderr=True, quiet=os.environ.get("RANK", "0") != "0"))
    with waiting(say, "starting", quiet_s=IMPORTING_S):
        from .checkpoints import latest_checkpoint
        from .report import plot_rates
        from .train import train

    if args.plot_lr:
        plot_rates(config, args.plot_lr)
        return 0
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, also before the first step
    try:
        train(config, args.out, args.max_minutes * 60, args.resume, began)
    except KeyboardInterrupt:
        last = latest_checkpoint(args.out)
        where = f"--resume continues from {last}" if last else "no step was saved"
        print(f"interrupted; {where}", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0
