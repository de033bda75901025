"""The baseline of `bin/bench solve`: test-time training and prediction with plain PEFT and `generate`.

    python -P -m arc_solver.bench.baseline_solving MODEL_DIR TASKS RESULT.json [section.key=value ...]

It runs in a process of its own, so its peak memory is its own. One task after another: a LoRA adapter by PEFT on a copy
of the base, samples one at a time, then merged; then greedy decoding of all views in one left-padded batch, in which
any id may come next until the last view has ended; then plain votes. The model is the stock one with PyTorch's
attention. Beside RESULT.json it leaves RESULT.submission.json.

The settings of [run], [adapt] and [predict] are those of `bin/solve`, and so are samples, their order, steps, learning
rates, views and prompts.
"""

import copy
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..answers import Candidate, Predictions, Submission, choose_attempts, write_submission
from ..command import Parser, run_main
from ..config import AdaptConfig, Config, FormatConfig, PredictConfig, TasksConfig, VoteConfig, load_config
from ..errors import UserError, install_command
from ..models import Model, fast_dtype, fresh_adapter, peak_memory, pick_device
from ..models.adapters import peft_tensors
from ..models.model import is_ours
from ..puzzles import (
    END,
    PAD,
    Cursor,
    Grid,
    Malformed,
    Prompt,
    Sample,
    Task,
    decode_reply,
    encode_prompt,
    grid_key,
    load_tasks,
    longest_reply,
)
from ..rng import named_rng
from ..solving.adapt import held_out_samples, planned_steps
from ..solving.predict import views_of
from ..training.optimize import step_rate
from .baseline_training import now_s

LIBRARIES = ("peft", "transformers", "torch")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass
class Spent:
    """What one task, or all of them, took."""

    adapt_s: float = 0.0  # copying the base and merging included
    adapt_steps: int = 0
    adapt_tokens: int = 0
    decode_s: float = 0.0
    forward_steps: int = 0  # forward passes of the batch of views
    prompt_tokens: int = 0
    reply_tokens: int = 0  # up to and with the END of each, so without what is decoded of views that have ended

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass(frozen=True)
class BaselineSolveResult:
    """What RESULT.json holds."""

    seconds: float  # of all tasks; loading the libraries and the model is not counted
    total: Spent
    per_task: dict[str, Spent]
    peak_memory_bytes: int  # of the whole process; on a GPU what PyTorch held there
    malformed: int  # replies that were no grid
    dtype: str
    versions: dict[str, str]


@dataclass(eq=False)
class Baseline:
    """The stock model and what it is asked to do."""

    lm: Any
    format: FormatConfig
    config: Config
    max_new_tokens: int
    malformed: int = field(default=0, init=False)

    def solve_task(self, task: Task) -> tuple[Predictions, Spent]:
        """Adapts to the task and asks it under all views. The base is left as it was."""
        rng = partial(named_rng, self.config.run.seed, task.id)
        start_s = now_s()
        lm, spent = self.lm, Spent()
        if self.config.adapt.enabled:
            lm = adapt_baseline(task, copy.deepcopy(self.lm), self.config.adapt, self.format, rng("adapt"), spent)
        spent.adapt_s = (adapted_s := now_s()) - start_s
        predictions = self._predict(task, lm, self.config.predict, rng("predict"), spent)
        spent.decode_s = now_s() - adapted_s
        return predictions, spent

    def _predict(
        self, task: Task, lm: Any, config: PredictConfig, rng: np.random.Generator, spent: Spent
    ) -> Predictions:
        views = views_of(task, config, rng)
        seen = [view.apply_task(task) for view in views]
        asked = [(t, v) for v in range(len(views)) for t in range(len(task.test))]
        prompts = [encode_prompt(seen[v].train, seen[v].test[t], self.format) for t, v in asked]
        replies, spent.forward_steps = generate_greedily(lm, prompts, self.format, self.max_new_tokens)
        spent.prompt_tokens = sum(map(len, prompts))
        spent.reply_tokens = sum(len(ids) for ids, _ in replies)
        grids: dict[tuple[int, bytes], Grid] = {}
        found: dict[tuple[int, bytes], dict[int, float]] = defaultdict(dict)  # log-probability by view
        for (t, v), (ids, log_probability) in zip(asked, replies, strict=True):
            answer = decode_reply(ids, self.format)
            if isinstance(answer, Malformed):
                self.malformed += 1
                continue
            grid = views[v].undo(answer)
            grids[t, grid_key(grid)] = grid
            found[t, grid_key(grid)][v] = log_probability
        candidates = tuple(
            Candidate(t, grids[t, key], tuple(by_view), (), tuple(by_view.get(v) for v in range(len(views))))
            for (t, key), by_view in found.items()
        )
        return Predictions(tuple(view.geometry for view in views), candidates)


def load_baseline(folder: Path, device: torch.device, dtype: torch.dtype) -> tuple[Any, FormatConfig]:
    """The stock model of a checkpoint of ours, and its format."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    if not (folder / "config.json").is_file() or not is_ours(folder):
        raise UserError(f"{folder} is no checkpoint that bin/train wrote, and only those have our format")
    lm: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", dtype=dtype)
    return lm.to(device).eval(), FormatConfig.model_validate(lm.config.arc_format)


def adapt_baseline(
    task: Task, lm: Any, config: AdaptConfig, format: FormatConfig, rng: np.random.Generator, spent: Spent
) -> Any:
    """Trains an adapter on the task's own pairs and merges it into `lm`, which is changed and returned.

    The adapter starts as ours does. It is float32 whatever the base is, which is PEFT's default.
    """
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    steps = planned_steps(task, config)
    settings = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type] # PEFT says int and takes any number
        target_modules=list(config.targets),
        task_type="CAUSAL_LM",
    )
    start = fresh_adapter(Model(lm, format, None), config, rng)
    lora: Any = get_peft_model(lm, settings, autocast_adapter_dtype=True)
    set_peft_model_state_dict(lora, peft_tensors(start))
    samples = held_out_samples(task, config, format, rng)
    trained = [p for p in lora.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
    )
    own = config.model_copy(update={"steps": steps})
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: step_rate(k / steps, own))
    lora.train()
    for _ in range(steps):
        chosen = [next(samples)[0] for _ in range(config.batch_size)]
        learnt = sum(int((sample.labels_T >= 0).sum()) for sample in chosen)
        for sample in chosen:  # gradients accumulate
            lora(**_one_row(sample, lm.device), num_items_in_batch=learnt).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, config.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        spent.adapt_tokens += sum(map(len, chosen))
    spent.adapt_steps = steps
    return lora.eval().merge_and_unload()


def _one_row(sample: Sample, device: torch.device) -> dict[str, Tensor]:
    """A batch of one. It has a mask: without one transformers takes the jumps of grid positions for packing."""
    ids_T, labels_T, positions_T = (
        torch.from_numpy(column.astype(np.int64)).to(device)
        for column in (sample.ids_T, sample.labels_T, sample.positions_T)
    )
    row = {"input_ids": ids_T, "labels": labels_T, "position_ids": positions_T}
    return {name: column[None] for name, column in row.items()} | {"attention_mask": torch.ones_like(ids_T)[None]}


@torch.inference_mode()
def generate_greedily(
    lm: Any, prompts: Sequence[Prompt], format: FormatConfig, max_new_tokens: int
) -> tuple[list[tuple[list[int], float]], int]:
    """All prompts in one left-padded batch through `generate`, which knows no grammar.

    Returns each reply (ids up to and with END, where there is one; their log-probability), and how many forward passes
    it took.
    """
    count, longest = len(prompts), max(map(len, prompts))
    ids_BT = torch.full((count, longest), PAD)
    positions_BT, mask_BT = torch.zeros_like(ids_BT), torch.zeros_like(ids_BT)
    for b, prompt in enumerate(prompts):
        ids_BT[b, -len(prompt) :] = torch.from_numpy(prompt.ids_T.astype(np.int64))
        positions_BT[b, -len(prompt) :] = torch.from_numpy(prompt.positions_T.astype(np.int64))
        mask_BT[b, -len(prompt) :] = 1
    forward_steps = 0

    def count_step(*_: Any) -> None:
        nonlocal forward_steps
        forward_steps += 1

    hook = lm.register_forward_pre_hook(count_step)
    stock = lm.prepare_inputs_for_generation
    if format.positions == "grid":
        lm.prepare_inputs_for_generation = _with_grid_positions(stock, prompts, format, longest)
    try:
        done = lm.generate(
            ids_BT.to(lm.device),
            attention_mask=mask_BT.to(lm.device),
            position_ids=positions_BT.to(lm.device),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=END,
            pad_token_id=PAD,
            output_scores=True,
            return_dict_in_generate=True,
        )
    finally:
        hook.remove()
        lm.__dict__.pop("prepare_inputs_for_generation", None)
    chosen_BN = lm.compute_transition_scores(done.sequences, done.scores, normalize_logits=True)
    replies = []
    for ids, chosen in zip(done.sequences[:, longest:].tolist(), chosen_BN.tolist(), strict=True):
        reply = list(takewhile(lambda i: i != END, ids))
        reply += [END] if len(reply) < len(ids) else []
        replies.append((reply, float(np.sum(chosen[: len(reply)]))))
    return replies, forward_steps


def _with_grid_positions(stock: Any, prompts: Sequence[Prompt], format: FormatConfig, longest: int) -> Any:
    """`generate` continues positions by counting; this gives the newest ids their places in the grid instead."""
    cursors = [Cursor(prompt, format) for prompt in prompts]

    def prepare(input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        inputs = stock(input_ids, **kwargs)
        if input_ids.shape[1] > longest:
            newest = input_ids[:, -1].tolist()
            positions = [0 if c.done else c.take(i) for c, i in zip(cursors, newest, strict=True)]
            inputs["position_ids"] = torch.tensor(positions, device=input_ids.device)[:, None]
        return inputs

    return prepare


def solve_baseline(tasks: Sequence[Task], baseline: Baseline) -> tuple[Submission, BaselineSolveResult]:
    """All tasks, one after another."""
    start_s = time.perf_counter()
    submission: Submission = {}
    per_task: dict[str, Spent] = {}
    for task in tasks:
        predictions, per_task[task.id] = baseline.solve_task(task)
        submission[task.id] = choose_attempts(predictions, task, VoteConfig(rule="votes"))
    return submission, BaselineSolveResult(
        seconds=time.perf_counter() - start_s,
        total=sum(per_task.values(), Spent()),
        per_task=per_task,
        peak_memory_bytes=peak_memory(baseline.lm.device),
        malformed=baseline.malformed,
        dtype=str(baseline.lm.dtype).removeprefix("torch."),
        versions={name: version(name) for name in LIBRARIES},
    )


def submission_file(result: Path) -> Path:
    return result.with_suffix(".submission.json")


def main(arguments: list[str]) -> int:
    parser = Parser(prog="arc_solver.bench.baseline_solving", description="Measure PEFT and generate on given tasks.")
    parser.add_argument("model_dir", type=Path, help="a checkpoint that bin/train wrote")
    parser.add_argument("tasks", help="as --tasks of bin/solve; test outputs are not read")
    parser.add_argument("result", type=Path, help="JSON file to write")
    parser.add_argument("--dtype", choices=DTYPES, help="of the base; bfloat16 where the hardware multiplies it")
    parser.add_argument("--threads", type=int, help="CPU threads of PyTorch, if not its own choice")
    parser.add_argument("--max-new-tokens", type=int, help="where a reply is cut off; the longest legal one")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of run, adapt and predict")
    args = parser.parse_intermixed_args(arguments)
    if any(find_spec(name) is None for name in LIBRARIES):
        raise UserError(f"bin/bench solve compares with PEFT: run {install_command('arc_solver[train]')}")
    config = load_config(None, args.overrides)
    tasks = load_tasks(TasksConfig(spec=args.tasks), outputs=False).tasks
    if args.threads:
        torch.set_num_threads(args.threads)
    device = pick_device(config.run.device)
    lm, format = load_baseline(args.model_dir, device, DTYPES[args.dtype] if args.dtype else fast_dtype(device))
    baseline = Baseline(lm, format, config, args.max_new_tokens or longest_reply(format))
    submission, measured = solve_baseline(tasks, baseline)
    write_submission(submission, submission_file(args.result))
    args.result.write_text(json.dumps(asdict(measured), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    run_main(main)
