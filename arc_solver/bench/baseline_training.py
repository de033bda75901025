"""The baseline of `bin/bench train`: LoRA with TRL's SFTTrainer and PEFT, as people use them.

    python -P -m arc_solver.bench.baseline_training MODEL_DIR SAMPLES.npz RESULT.json --steps 12

It runs in a process of its own, so its peak memory is its own. Batches are padded to their longest sample and the head
has the whole vocabulary. Otherwise TRL's defaults are kept, the loss included: it scores tiles of the vocabulary and
never holds all logits. On a GPU it does so at labelled positions only, on a CPU at every position, padding too;
`--labelled-only` gives the baseline on a CPU what it has on a GPU.

What is set against the defaults: `max_length=None`, as TRL cuts samples at 1024 tokens and says nothing;
`gradient_checkpointing=False`, as it costs time to save memory; and order, schedule and learning rate, so that both
sides do the same work.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..command import Parser, run_main
from ..config import AdaptConfig
from ..errors import UserError, install_command
from ..models import peak_memory
from ..puzzles import IGNORE

LIBRARIES = ("trl", "transformers", "peft", "datasets", "accelerate", "torch")
BATCH_SIZE = 4  # samples a step

Columns = dict[str, list[np.ndarray]]


@dataclass(frozen=True)
class BaselineTrainResult:
    """What RESULT.json holds. Speeds and tokens are those of the steps after the warm-up."""

    tokens_per_s: float  # useful tokens
    useful_tokens: int  # padding not counted
    padded_tokens: int  # padding counted
    supervised_tokens: int
    peak_memory_bytes: int  # of the whole process; on a GPU what PyTorch held there
    step_s: tuple[float, ...]  # every step, the warm-up included; loading a batch is not counted
    losses: tuple[float, ...]  # every step, mean cross entropy in nats
    versions: dict[str, str]


def read_samples(file: Path) -> Columns:
    """The columns `input_ids` and `labels` of the samples that `ids`, `labels` and `lengths` of an .npz file spell."""
    with np.load(file) as arrays:
        ends = np.cumsum(arrays["lengths"])
        assert ends[-1] == len(arrays["ids"]) == len(arrays["labels"]), (ends[-1], arrays["ids"].shape)
        return {"input_ids": np.split(arrays["ids"], ends[:-1]), "labels": np.split(arrays["labels"], ends[:-1])}


def train_baseline(args: argparse.Namespace, samples: Columns) -> BaselineTrainResult:
    """Trains on the first `steps` x `batch_size` samples, in order."""
    used = {name: column[: args.steps * args.batch_size] for name, column in samples.items()}
    lengths = [len(ids) for ids in used["input_ids"]]
    step_s: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(args, used, folder)
        trainer.add_callback(_clock(step_s))
        trainer.train()
    steps = [record for record in trainer.state.log_history if "loss" in record]
    assert len(steps) == len(step_s) == args.steps, (len(steps), len(step_s))
    assert steps[-1]["num_tokens"] == sum(lengths), "the trainer saw other tokens than it was given"
    measured = slice(args.warm * args.batch_size, None)
    useful_tokens = sum(lengths[measured])
    return BaselineTrainResult(
        tokens_per_s=useful_tokens / sum(step_s[args.warm :]),
        useful_tokens=useful_tokens,
        padded_tokens=_padded_tokens(lengths[measured], args.batch_size),
        supervised_tokens=sum(int((labels[1:] != IGNORE).sum()) for labels in used["labels"][measured]),
        peak_memory_bytes=peak_memory(torch.device(args.device)),
        step_s=tuple(step_s),
        losses=tuple(record["loss"] for record in steps),
        versions={name: version(name) for name in LIBRARIES},
    )


def _trainer(args: argparse.Namespace, samples: Columns, folder: str) -> Any:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PrinterCallback
    from transformers.utils import logging
    from trl import SFTConfig, SFTTrainer

    logging.disable_progress_bar()
    if args.labelled_only:
        _score_labelled_positions_only()
    config = SFTConfig(
        output_dir=folder,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.lr,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        max_length=None,
        gradient_checkpointing=args.gradient_checkpointing,
        bf16=args.precision == "bf16",
        use_cpu=args.device == "cpu",
        dataloader_pin_memory=args.device != "cpu",
        model_init_kwargs={"dtype": args.weights},
        logging_steps=1,  # happens after the clock has stopped, and is how the losses are read
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
    )
    trainer = SFTTrainer(
        model=str(args.model_dir),
        args=config,
        train_dataset=Dataset.from_dict(samples),
        peft_config=LoraConfig(
            task_type="CAUSAL_LM", r=args.rank, lora_alpha=args.alpha, target_modules=args.targets.split(",")
        ),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _score_labelled_positions_only() -> None:
    """TRL leaves out positions without a label where it has Triton kernels; this module's copy decides just that."""
    from trl.trainer import utils

    assert hasattr(utils, "_use_triton"), f"TRL {version('trl')} chooses the positions in another way"
    utils._use_triton = lambda device: True


def _clock(step_s: list[float]) -> Any:
    """A callback that appends the seconds of every optimizer step."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        start_s: float

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start_s = now_s()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            step_s.append(now_s() - self.start_s)

    return Clock()


def now_s() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def _padded_tokens(lengths: Sequence[int], batch_size: int) -> int:
    return sum(batch_size * max(lengths[i : i + batch_size]) for i in range(0, len(lengths), batch_size))


def _parser() -> Parser:
    same = AdaptConfig()
    parser = Parser(
        prog="arc_solver.bench.baseline_training", description="Measure TRL's SFTTrainer with PEFT on given samples."
    )
    parser.add_argument("model_dir", type=Path, help="Hugging Face checkpoint with a tokenizer")
    parser.add_argument("samples", type=Path, help=".npz file: ids, labels and lengths, int32")
    parser.add_argument("result", type=Path, help="JSON file to write")
    parser.add_argument("--steps", type=int, required=True, help="optimizer steps, the warm-up included")
    parser.add_argument("--warm", type=int, default=2, help="first steps, which are not measured")
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE, help="samples a step")
    parser.add_argument("--rank", type=int, default=same.rank)
    parser.add_argument("--alpha", type=float, default=same.alpha)
    parser.add_argument("--targets", default=",".join(same.targets), help="adapted layers, separated by commas")
    parser.add_argument("--lr", type=float, default=same.lr)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="bf16 is autocast")
    parser.add_argument(
        "--weights", choices=("float32", "bfloat16"), default="float32", help="frozen weights; float32 is TRL's default"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads of PyTorch, if not its own choice")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="TRL's default")
    parser.add_argument("--labelled-only", action="store_true", help="score labelled positions only, as on a GPU")
    return parser


def main(arguments: list[str]) -> int:
    args = _parser().parse_args(arguments)
    if any(find_spec(name) is None for name in LIBRARIES):
        raise UserError(f"bin/bench train compares with TRL and PEFT: run {install_command('arc_solver[bench]')}")
    samples = read_samples(args.samples)
    found, needed = len(samples["labels"]), args.steps * args.batch_size
    if found < needed or not 0 <= args.warm < args.steps:
        raise UserError(f"{args.steps} steps, {args.warm} of them warm-up, need {needed} samples; there are {found}")
    if args.threads:
        torch.set_num_threads(args.threads)
    args.result.write_text(json.dumps(asdict(train_baseline(args, samples)), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    run_main(main)
