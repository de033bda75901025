"""A training run small enough for tests, in this process and in others."""

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

from forked import Forked, output_of

from arc_solver.config import Config, load_config
from arc_solver.models.model import load_model

SMALL = {
    "run": {"device": "cpu"},
    "model": {"layers": 2, "width": 32, "heads": 2, "kv_heads": 2, "head_dim": 16, "mlp_width": 64},
    "corpus": {
        "max_tokens": 200,
        "sources": [{"kind": "counting"}, {"kind": "tasks", "path": "arc-agi-1/training", "max_tasks": 40}],
    },
    "validation": {"tokens": 1000, "every": 3},
    "audit": {"scored_on": []},
    "train": {
        "steps": 6,
        "batch_tokens": 512,
        "compile": "no",
        "precision": "fp32",
        "loader_workers": 0,
        "checkpoint_every": 1,
        "schedule": "linear",
    },
}


def small_tree(**sections: dict[str, Any]) -> dict[str, Any]:
    """SMALL with the given settings on top, section by section."""
    return {**SMALL, **{key: {**SMALL.get(key, {}), **value} for key, value in sections.items()}}


def small(stages: list[dict[str, Any]] | None = None, **sections: dict[str, Any]) -> Config:
    return Config.model_validate({**small_tree(**sections), "stages": stages or []})


def write_config(config: Config, folder: Path) -> Path:
    """The config as a file that `load_config` reads."""
    file = folder / "small.toml"
    tree = config.model_dump(mode="json", exclude_none=True)  # which TOML has no word for
    if len(config.stages) == 1:  # it only says again what the sections say
        del tree["stages"]
    file.write_text("\n".join(_lines(tree)))
    assert load_config(file) == config
    return file


def _lines(tree: dict[str, Any]) -> list[str]:
    """TOML, each section a line of inline tables."""
    return [f"{key} = {_toml(value)}" for key, value in tree.items()]


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(v)}" for key, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value)


def start_training(file: Path, out_dir: Path, *words: str) -> Forked:
    """bin/train in a process of its own."""
    return Forked("arc_solver.train", [file, "--out", out_dir, *words])


def start_ranks(count: int, file: Path, out_dir: Path, *words: str) -> list[Forked]:
    """bin/train in several processes, to each of which is said what torchrun would say."""
    common = {**os.environ, "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        Forked(
            "arc_solver.train",
            [file, "--out", out_dir, *words],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(count)
    ]


def launched(launcher: str, file: Path, out_dir: Path, *words: str) -> list[str]:
    """The command line of two processes under torchrun or accelerate."""
    module = ["-m", "arc_solver.train", str(file), "--out", str(out_dir), *words]
    bin_dir = Path(sys.executable).parent
    if launcher == "torchrun":
        return [str(bin_dir / "torchrun"), "--standalone", "--nproc-per-node", "2", *module]
    options = ["--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    options += ["--dynamo_backend", "no", "--main_process_port", str(free_port())]
    return [str(bin_dir / "accelerate"), "launch", *options, *module]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def finish(*processes: Forked, expect: int = 0) -> str:
    """Waits for them; what they said on stderr."""
    return "".join(output_of(process, expect)[1] for process in processes)


def weights(folder: Path) -> dict[str, Any]:
    return load_model(folder).lm.state_dict()


def log(out_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]
