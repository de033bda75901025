"""`bin/bench train`: our offline trainer against the baseline's, on the same model and the same samples.

The model is a Qwen2 of 4 layers with a vocabulary of 150,000 ids and random weights; the samples are ARC-AGI-1 training
tasks. Both sides train the same LoRA adapter once over the same samples, so on the same supervised tokens, each in a
process of its own. The baseline is TRL's SFTTrainer with PEFT: padded batches, and a head with the whole vocabulary,
which it is let off for positions without a label. Ours are packed batches and a cut vocabulary.

    python -P -m arc_solver.bench.training MODEL_DIR SAMPLES.npz RESULT.json   # ours; see baseline_training.py
"""

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..command import Parser, run_main
from ..config import (
    AdaptConfig,
    Config,
    CorpusConfig,
    FormatConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
)
from ..data.sources import read_source
from ..data.stream import FILLED, Batch, BatchStream, DrawnSample, SampleStream, pack, share_out
from ..models import Model, attach_lora, fast_dtype, new_model, packed_loss, peak_memory
from ..models.model import prepare_transformers, read_weights
from ..models.pretrained import cut_vocabulary
from ..puzzles import END, IGNORE, PAD, VOCABULARY, Sample
from ..training.optimize import fit, make_optimizers
from ..training.parallel import ParallelContext, compiled, decide_compile
from .baseline_training import BATCH_SIZE, now_s, read_samples

SHAPE: dict[str, Any] = {
    "vocab_size": 150_000,
    "num_hidden_layers": 4,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
SAMPLES, MAX_TOKENS = 40, 2048
BATCH_TOKENS = 4096  # a step of ours
WARM = 2  # first steps, which are not measured
BF16 = TrainConfig(optimizer="adamw", precision="bf16", batch_tokens=32_768)
KEPT = [(1000 + 7 * i,) for i in range(VOCABULARY)]  # which of the big vocabulary's ids stand for ours
QWEN_05B = ModelConfig(
    layers=24, width=896, heads=14, kv_heads=2, head_dim=64, mlp_width=4864, rope_theta=1_000_000
)  # Qwen2.5-0.5B's shape
FORMAT = FormatConfig(positions="token")


@dataclass(frozen=True)
class TrainFigures:
    """What one side measured; the speed over the steps after the warm-up."""

    tokens_per_s: float  # useful tokens
    peak_memory_bytes: int  # of the whole process; on a GPU what PyTorch held there


def compare() -> dict[str, TrainFigures]:
    """Runs both sides on one device, in one precision."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = "bf16" if fast_dtype(torch.device(device)) == torch.bfloat16 else "fp32"
    with tempfile.TemporaryDirectory() as folder:
        model_dir, samples, result = Path(folder, "model"), Path(folder, "samples.npz"), Path(folder, "result.json")
        make_model(model_dir)
        make_samples(samples)
        common = [str(model_dir), str(samples), str(result)]
        steps = ["--steps", str(SAMPLES // BATCH_SIZE), "--warm", str(WARM)]
        same = ["--device", device, "--precision", precision]
        head = ["--labelled-only"] if device == "cpu" else []  # what it does on a GPU by itself
        commands = {
            "ours": ["training", *common, *same],
            "baseline": ["baseline_training", *common, *same, *steps, *head],
        }
        sides = {}
        for name, (module, *words) in commands.items():
            command = [sys.executable, "-P", "-m", f"arc_solver.bench.{module}", *words]
            done = subprocess.run(command, capture_output=True, text=True)  # the libraries' warnings are not ours
            if done.returncode:
                raise RuntimeError(f"{name} failed:\n{done.stderr}")
            found = json.loads(result.read_text())
            sides[name] = TrainFigures(**{key: found[key] for key in TrainFigures.__annotations__})
    return sides


def make_model(folder: Path) -> None:
    """A pretrained-like checkpoint of random weights. Its tokenizer has the two tokens that a trainer asks for."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    prepare_transformers()
    ends = {"<end>": KEPT[END][0], "<pad>": KEPT[PAD][0]}
    tokenizer = Tokenizer(models.WordLevel(ends))  # type: ignore[call-arg]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")
    fast.save_pretrained(folder)
    settings: Any = Qwen2Config(
        tie_word_embeddings=True,
        eos_token_id=KEPT[END][0],
        pad_token_id=KEPT[PAD][0],
        **SHAPE,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Qwen2ForCausalLM(settings).save_pretrained(folder)


def make_samples(file: Path) -> None:
    """ARC-AGI-1 training tasks as samples in the model's own vocabulary."""
    kept = np.array(KEPT)[:, 0]
    source = read_source(SourceConfig(kind="tasks", path="arc-agi-1/training"))
    stream = SampleStream([source], CorpusConfig(max_tokens=MAX_TOKENS), FORMAT, 0, "bench")
    samples = [stream[i].sample for i in range(SAMPLES)]
    labels = [np.where(s.labels_T == IGNORE, IGNORE, kept[s.ids_T]) for s in samples]
    np.savez(
        file,
        ids=np.concatenate([kept[s.ids_T] for s in samples]).astype(np.int32),
        labels=np.concatenate(labels).astype(np.int32),
        lengths=np.array([len(s) for s in samples], dtype=np.int32),
    )


def train_ours(model_dir: Path, file: Path, device: str, precision: str) -> TrainFigures:
    """Cut vocabulary, packed batches, an adapter by PEFT, compiled where `bin/train` compiles."""
    same = AdaptConfig()
    settings = {"run": {"device": device}, "train": {"precision": precision}}
    parallel = ParallelContext(Config.model_validate(settings))
    lm = read_weights(model_dir, parallel.dtype)
    cut_vocabulary(lm, KEPT)
    model = Model(lm.to(parallel.device).train(), FORMAT, None)
    attach_lora(model, LoraConfig(rank=same.rank, alpha=same.alpha, rslora=False, targets=same.targets), seed=0)
    pays = decide_compile(model.lm, TrainConfig(), parallel).pays
    logits_of = compiled(model.logits) if pays else model.logits
    batches = _packed(file)
    config = same.model_copy(update={"schedule": "constant", "warmup": 0.0})
    spent_s = _timed_fit(parallel, model, logits_of, config, batches)
    return TrainFigures(sum(batch.useful_tokens for batch in batches[WARM:]) / spent_s, peak_memory(parallel.device))


def _timed_fit(
    parallel: ParallelContext,
    model: Model,
    logits_of: Callable[..., Tensor],
    config: OptimConfig,
    batches: Sequence[Batch],
) -> float:
    """Trains what is not frozen, a step a batch; the seconds of the steps after the warm-up."""
    named = [(name, p) for name, p in model.lm.named_parameters() if p.requires_grad]
    optimizers = make_optimizers(named, config)
    begins_s: list[float] = []

    def loss_of(batch: Batch) -> Tensor:
        return packed_loss(model, batch, logits_of, reduction="sum")

    def backward_at(k: int) -> Tensor:
        begins_s.append(now_s())
        return parallel.backward(loss_of, model.lm, [batches[k]], batches[k].target_tokens)

    planned = config.model_copy(update={"steps": len(batches)})
    fit([p for _, p in named], optimizers, planned, backward_at, scaler=parallel.scaler)
    return now_s() - begins_s[WARM]


def _packed(file: Path) -> list[Batch]:
    """All samples, in our ids, shared out over as few batches as hold them."""
    ours = np.zeros(SHAPE["vocab_size"], dtype=np.int64)
    ours[np.array(KEPT)[:, 0]] = np.arange(VOCABULARY)
    columns = read_samples(file)
    draws = [
        DrawnSample(
            Sample(
                ours[ids].astype(np.uint8),
                np.where(labels == IGNORE, IGNORE, ours[ids]).astype(np.int16),
                np.arange(len(ids), dtype=np.int32),
            )
        )
        for ids, labels in zip(columns["input_ids"], columns["labels"], strict=True)
    ]
    tokens = sum(len(draw.sample) for draw in draws)
    shared, left_out = share_out(draws, BATCH_TOKENS, math.ceil(tokens / FILLED / BATCH_TOKENS))
    assert not left_out, len(left_out)
    return [pack([draw.sample for draw in batch], BATCH_TOKENS) for batch in shared]


@dataclass(frozen=True)
class Utilisation:
    """What training all weights of a shape makes of a device."""

    parameters: int
    tokens_per_s: float  # of whole batches, padding included
    share: float  # of the device's peak


def flop_utilisation(shape: ModelConfig, train: TrainConfig, steps: int, device: str) -> Utilisation:
    """Trains all weights, on packed batches of ARC-AGI-1 tasks, and compares with the device's own peak.

    A token costs 6 operations a parameter, and in attention 12 a layer, unit of width and token that it sees (Chowdhery
    et al. 2022, arXiv 2204.02311, appendix B), of which half are masked. The peak is measured, by a large product in
    the same number type.
    """
    parallel = ParallelContext(Config(run=RunConfig(device=device), train=train))
    model = new_model(shape, FORMAT, seed=0)
    model.lm.to(parallel.device).train()
    source = read_source(SourceConfig(kind="tasks", path="arc-agi-1/training"))
    samples = SampleStream([source], CorpusConfig(max_tokens=MAX_TOKENS), FORMAT, 0, "bench")
    batches = BatchStream(samples, train.batch_tokens)[(0, 0)][: steps + WARM]
    logits_of = compiled(model.logits) if decide_compile(model.lm, train, parallel).pays else model.logits
    spent_s = _timed_fit(parallel, model, logits_of, train, batches)
    lengths = [batch.ends_S.diff(prepend=torch.zeros(1, dtype=torch.int64)) for batch in batches[WARM:]]
    seen = sum(int((length**2).sum()) for length in lengths)
    attention = 6 * shape.layers * shape.heads * shape.head_dim * seen
    tokens = train.batch_tokens * (len(batches) - WARM)
    flops = 6 * model.parameters_count * tokens + attention
    return Utilisation(
        model.parameters_count, tokens / spent_s, flops / spent_s / peak_flops(parallel.device, parallel.dtype)
    )


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product of random numbers."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times_s = []
    for _ in range(12):
        begin_s = now_s()
        a @ b
        times_s.append(now_s() - begin_s)
    return 2 * size**3 / min(times_s)


def main(arguments: list[str]) -> int:
    parser = Parser(prog="arc_solver.bench.training", description="Measure our trainer on given samples.")
    for name in ("model_dir", "samples", "result"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="bf16")
    args = parser.parse_args(arguments)
    measured = train_ours(args.model_dir, args.samples, args.device, args.precision)
    args.result.write_text(json.dumps(asdict(measured), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    run_main(main)
