"""Every architecture that is let in solves a task as plain decoding by its own attention would; others say why not.

The reference is what anybody else has: transformers with its eager attention, no cache, no batch.
"""

import json
import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from checkpoints import SMALL, folder_with
from plain_decoding import Plain, same_start
from small_runs import log, small

from arc_solver.answers.vote import choose_attempts
from arc_solver.config import LINEAR_LAYERS, AdaptConfig, Config, FormatConfig, PredictConfig, VoteConfig, load_config
from arc_solver.data.stream import pack
from arc_solver.decoding.torch_engine import TorchEngine
from arc_solver.errors import UserError
from arc_solver.models import fast_decoder
from arc_solver.models.adapters import Adapter, fresh_adapter
from arc_solver.models.model import Model, load_model, packed_loss, save_model
from arc_solver.models.pretrained import load_any
from arc_solver.puzzles.encode import encode_prompt, encode_reply, encode_sample
from arc_solver.puzzles.tasks import Grid, Pair, Task, challenge, freeze, same_grid
from arc_solver.rng import named_rng
from arc_solver.solving.adapt import adapt
from arc_solver.solving.predict import predict, views_of
from arc_solver.solving.worker import load_base
from arc_solver.training.train import train

FORMAT = FormatConfig(positions="token")
LIKELY = 0.03  # what the search is to find; a toss of three coins has 1/8
COMMON = {**SMALL, "max_position_embeddings": 2048}
PLAIN = {name: value for name, value in COMMON.items() if name != "num_key_value_heads"}
WIDE = {**COMMON, "head_dim": 16}
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 32.0, "original_max_position_embeddings": 64}
GRANITE = {"embedding_multiplier": 6.0, "attention_multiplier": 0.2, "residual_multiplier": 0.3, "logits_scaling": 2.0}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "factor": 32.0,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 64,
}
FULL = {"layer_types": ["full_attention"] * 2}

PHI_3 = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
NEOX = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
ATTENTION_ONLY = ("q_proj", "k_proj", "v_proj", "o_proj")


# name -> the architecture, its settings, and the layers that its adapters are on
SERVED: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "llama": ("Llama", {**COMMON, "num_key_value_heads": 1}, LINEAR_LAYERS),
    "llama3-rope": ("Llama", {**COMMON, "rope_parameters": LLAMA_3}, LINEAR_LAYERS),
    "yarn-rope": ("Llama", {**COMMON, "rope_parameters": YARN}, LINEAR_LAYERS),
    "mistral": ("Mistral", {**COMMON, "sliding_window": None}, LINEAR_LAYERS),
    "qwen2": ("Qwen2", {**COMMON, "tie_word_embeddings": True}, LINEAR_LAYERS),
    "qwen3": ("Qwen3", WIDE, LINEAR_LAYERS),
    "phi3": ("Phi3", COMMON, PHI_3),
    "gemma": ("Gemma", WIDE, LINEAR_LAYERS),
    "gemma3-without-windows": ("Gemma3Text", {**WIDE, **FULL}, LINEAR_LAYERS),
    "granite": ("Granite", {**COMMON, **GRANITE}, LINEAR_LAYERS),
    "olmo2": ("Olmo2", COMMON, LINEAR_LAYERS),
    "smollm3": ("SmolLM3", {**COMMON, "no_rope_layers": [1, 0]}, LINEAR_LAYERS),
    "gpt-neox": ("GPTNeoX", PLAIN, NEOX),
    "starcoder2": ("Starcoder2", {**COMMON, "sliding_window": None}, (*ATTENTION_ONLY, "c_fc", "c_proj")),
    "cohere": ("Cohere", {**COMMON, "logit_scale": 0.5}, LINEAR_LAYERS),
    "qwen3-moe": ("Qwen3Moe", {**WIDE, **EXPERTS}, ATTENTION_ONLY),
    "phi": ("Phi", COMMON, ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2")),
}

BY_HAND = ("llama", "mistral", "qwen2", "qwen3")  # transformers runs the others

# name -> the architecture, its settings, and what is said
WINDOWS = "has layers of .*sliding_attention.*, and only full attention can be trained on packed"
UNLIKE = "cannot be trained on packed sequences"
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "mistral-with-a-window": ("Mistral", {**COMMON, "sliding_window": 64}, WINDOWS),
    "gemma2": ("Gemma2", WIDE, WINDOWS),
    "gemma3": ("Gemma3Text", WIDE, WINDOWS),
    "olmo3": ("Olmo3", COMMON, WINDOWS),
    "cohere2": ("Cohere2", COMMON, WINDOWS),
    "gpt-oss": ("GptOss", {**WIDE, "num_local_experts": 2}, WINDOWS),
    "gemma2-without-windows": ("Gemma2", {**WIDE, **FULL}, "caps its attention scores"),
    "longrope": ("Phi3", {**COMMON, "rope_parameters": LONG}, "rotary embedding .*longrope"),
    "mamba": ("Mamba", {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2}, f"only full attention|{UNLIKE}"),
    "falcon": (
        "Falcon",
        {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
        "computes attention in a way of its own: give another model",
    ),
}


def config_of(architecture: str, settings: dict[str, Any]) -> Any:
    return getattr(transformers, f"{architecture}Config")(**settings)


@pytest.fixture(autouse=True)
def one_thread():
    """As workers have it: on models so small, threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---- a task, and a model that has seen its like ----------------------------------------------------------------------


def coins(rng: np.random.Generator) -> Grid:
    return freeze(rng.integers(1, 3, (1, 3), dtype=np.uint8))


def coin_task(rng: np.random.Generator, demonstrations: int = 3) -> Task:
    """Its outputs follow no rule: three coins, so that some replies are likely and none is certain."""
    pairs = tuple(Pair(freeze(rng.integers(3, 10, (2, 1), dtype=np.uint8)), coins(rng)) for _ in range(demonstrations))
    return Task("coins", pairs, (pairs[0].input[::-1],))


def teach(model: Model, steps: int = 30) -> None:
    """Trains all weights on packed coin tasks, as bin/train does."""
    rng = named_rng(0, "coins")
    optimizer = torch.optim.AdamW(model.lm.parameters(), lr=5e-3)
    for _ in range(steps):
        samples = [encode_sample(coin_task(rng).train, model.format) for _ in range(4)]
        loss = packed_loss(model, pack(samples, sum(map(len, samples)) + 5))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 2, loss  # of log(64) = 4.2


@dataclass(frozen=True, eq=False)
class Eager:
    """A causal LM as anybody would call it."""

    lm: Any

    def logits(self, ids_BT: torch.Tensor, positions_BT: torch.Tensor) -> torch.Tensor:
        return self.lm(input_ids=ids_BT, use_cache=False).logits.float()


@torch.no_grad()
def eager(folder: Path, adapter: Adapter) -> Eager:
    """The checkpoint with its own attention, the adapter added to its weights."""
    lm = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    for name, (a, b) in adapter.weights.items():
        lm.get_submodule(name).weight += adapter.alpha / adapter.rank * b @ a
    return Eager(lm)


# ---- solving -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SERVED)
def test_a_task_is_solved_as_plain_decoding_would(name, tmp_path):
    """Cut, trained, saved, loaded, adapted, decoded with drafts, searched, scored, voted on."""
    architecture, settings, targets = SERVED[name]
    cut, _ = load_any(folder_with(tmp_path / "pretrained", config_of(architecture, settings)), "org/name", FORMAT)
    teach(cut)
    save_model(cut, tmp_path / "model")
    model = load_model(tmp_path / "model")
    with torch.no_grad():
        assert fast_decoder.supports(model.lm) == (name in BY_HAND)
    task = coin_task(named_rng(1, "coins"))
    config = AdaptConfig(steps=4, lr=1e-2, rank=4, alpha=8, targets=targets)
    (learnt,) = adapt([task], model, config, [named_rng(0)])
    assert learnt.ended == "steps" and all(bool(b.any()) for _, b in learnt.adapter.weights.values())

    under = eager(tmp_path / "model", learnt.adapter)
    engine = TorchEngine(model, 300)
    answers_agree(engine, learnt.adapter, under, task)
    asked = PredictConfig(views=2, leaders=1, threshold=LIKELY)
    found = predict(task, engine, learnt.adapter, asked, named_rng(0))
    assert found.candidates
    for i, view in enumerate(views_of(task, asked, named_rng(0))):
        seen = view.apply_task(task)
        plain = Plain(under, encode_prompt(seen.train, seen.test[0], FORMAT))
        for candidate in found.candidates:
            expected = plain.log_probability(encode_reply(view.apply(candidate.grid), FORMAT).tolist())
            assert candidate.log_probabilities[i] == pytest.approx(expected, abs=2e-3)
    (attempts,) = choose_attempts(found, task, VoteConfig())
    assert any(same_grid(attempts[0], candidate.grid) for candidate in found.candidates)


def answers_agree(engine: TorchEngine, adapter: Adapter, reference: Eager, task: Task) -> None:
    """Greedy replies, with and without drafts, all probable replies, and scores: those of the reference."""
    prompts = [encode_prompt(task.train[:shown], task.test[0], FORMAT) for shown in (3, 2)]
    plain = [Plain(reference, prompt) for prompt in prompts]
    greedy = [p.greedy(most=engine.context_length - len(p.prompt)) for p in plain]
    guesses = [encode_reply(coins(named_rng(i)), FORMAT).tolist() for i in range(4)]
    with engine.open_session(prompts, [adapter] * 2) as session:
        found = session.search(LIKELY, max_nodes=500)
        drafted = session.generate([0, 1], {0: [greedy[0]], 1: [guesses[0], greedy[1][:2]]})
        scores = session.score([guesses, guesses])
    with engine.open_session(prompts, [adapter] * 2) as session:
        undrafted = session.generate([0, 1])
    for p, reply, again, best, of_row, mine in zip(plain, drafted, undrafted, greedy, scores, found, strict=True):
        assert reply.ids == again.ids == best
        assert reply.log_probability == pytest.approx(p.log_probability(best), abs=2e-3)
        for guess, score in zip(guesses, of_row, strict=True):
            assert score.log_probability == pytest.approx(p.log_probability(guess), abs=2e-3)
            assert score.agreed == same_start(guess, best)
        expected = p.probable(LIKELY)
        assert mine.complete
        near = {ids for ids, total in expected.items() if abs(total - math.log(LIKELY)) < 0.01}
        assert {r.ids for r in mine.replies} - near == set(expected) - near
    assert any(mine.replies for mine in found)


@pytest.mark.parametrize(("name", "option"), [("starcoder2", "residual_dropout"), ("phi", "resid_pdrop")])
def test_nothing_is_dropped(name, option, tmp_path):
    """Nor where layers are computed again, which transformers does in training only."""
    architecture, settings, targets = SERVED[name]
    folder = folder_with(tmp_path / "pretrained", config_of(architecture, {**settings, option: 0.5}))
    cut, _ = load_any(folder, "org/name", FORMAT)
    save_model(cut, tmp_path / "model")
    model = load_model(tmp_path / "model")
    assert getattr(model.lm.config, option) == 0.5, "others that read it may want it"
    task = coin_task(named_rng(1, "coins"))
    batch = pack([encode_sample(task.train, FORMAT)], 200)
    expected = packed_loss(model, batch).item()
    for trained in (cut, model):
        trained.lm.train()
        assert packed_loss(trained, batch).item() == expected
    config = AdaptConfig(steps=2, rank=4, targets=targets)
    kept, again = (
        adapt([task], load_model(tmp_path / "model"), config.model_copy(update={"recompute": r}), [named_rng(0)])[0]
        for r in ("no", "yes")
    )
    assert again.last_loss == pytest.approx(kept.last_loss, rel=1e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_served_is_refused_with_the_cause(name, tmp_path):
    architecture, settings, said = REFUSED[name]
    folder = folder_with(tmp_path / "pretrained", config_of(architecture, settings))
    with pytest.raises(UserError, match=said):
        load_any(folder, "org/name", FORMAT)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("phi3", "named gate_proj, k_proj, q_proj, up_proj, v_proj; it has down_proj, gate_up_proj, o_proj, qkv_proj"),
        ("gpt-neox", "it has dense, dense_4h_to_h, dense_h_to_4h, query_key_value"),
    ],
)
def test_targets_that_a_model_lacks_are_refused_with_those_that_it_has(name, said, tmp_path):
    architecture, settings, _ = SERVED[name]
    model, _ = load_any(folder_with(tmp_path, config_of(architecture, settings)), "org/name", FORMAT)
    with pytest.raises(UserError, match=rf"^adapt\.targets: the model has no linear layer .*{said}$"):
        fresh_adapter(model, AdaptConfig(), named_rng(0))


def test_a_model_without_linear_layers_is_refused(tmp_path):
    """GPT-2's are of a class of its own. In transformers 5.0 it is not told where sequences end."""
    settings = {"vocab_size": 400, "n_embd": 32, "n_layer": 2, "n_head": 2}
    with pytest.raises(UserError, match=rf"^adapt\.targets: .*; it has none; set adapt\.enabled=false|{UNLIKE}"):
        model, _ = load_any(folder_with(tmp_path, config_of("GPT2", settings)), "org/name", FORMAT)
        fresh_adapter(model, AdaptConfig(), named_rng(0))


# ---- what a trained model is solved with -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def coin_tasks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    for i in range(4):
        task, answer = coin_task(named_rng(i)), coins(named_rng(i))
        about = {**challenge(task), "test": [{"input": task.test[0].tolist(), "output": answer.tolist()}]}
        (folder / f"coins{i}.json").write_text(json.dumps(about))
    return folder


def coin_run(folder: Path, tasks: Path, lora: dict[str, Any], **more: dict[str, Any]) -> Config:
    """One step of training on coin tasks, from the pretrained model in a folder. `more`: settings by section."""
    return small(
        model={"path": str(folder)},
        format={"positions": "token"},
        lora={"rank": 4, "alpha": 8.0, **lora},
        corpus={"max_tokens": 100, "sources": [{"kind": "tasks", "path": str(tasks)}], "pairs": [2, 3]},
        validation={"of": str(tasks), "re_arc": False, "tasks": 2, "tokens": 200, **more.get("validation", {})},
        audit={"overlap": "allow"},
        train={"optimizer": "adamw", "lr": 1e-3, "steps": 1, **more.get("train", {})},
    )


@pytest.mark.parametrize(
    ("name", "lora", "targets"),
    [
        ("qwen2", {}, LINEAR_LAYERS),
        ("qwen2", {"enabled": True, "save": "adapter"}, LINEAR_LAYERS),
        ("phi3", {"enabled": True, "targets": PHI_3[:2]}, PHI_3[:2]),
        ("phi3", {}, tuple(sorted(PHI_3))),
    ],
    ids=str,
)
def test_a_run_ends_with_the_words_that_solve_takes(name, lora, targets, coin_tasks, tmp_path, capfd):
    architecture, settings, _ = SERVED[name]
    folder = folder_with(tmp_path / "pretrained", config_of(architecture, settings))
    train(coin_run(folder, coin_tasks, lora), tmp_path / "run")
    config = said_config(capfd.readouterr().err)
    assert config.adapt.targets == targets
    assert bool(config.model.adapter) == (lora.get("save") == "adapter")
    model, _ = load_base(config, torch.device("cpu"))
    assert fresh_adapter(model, config.adapt, named_rng(0)).weights


def test_a_run_says_at_once_that_tasks_cannot_be_adapted(coin_tasks, tmp_path, capfd):
    """A GPT-2. In transformers 5.0 it is refused."""
    settings = {"vocab_size": 400, "n_embd": 32, "n_layer": 2, "n_head": 2}
    folder = folder_with(tmp_path / "pretrained", config_of("GPT2", settings))
    try:
        train(coin_run(folder, coin_tasks, {}), tmp_path / "run")
    except UserError as error:
        assert UNLIKE in str(error)
        return
    shown = capfd.readouterr().err
    assert "has no linear layers that tasks could be adapted by" in shown.partition("stage train")[0]
    assert not said_config(shown).adapt.enabled


def said_config(shown: str) -> Config:
    """What `bin/solve` would make of the command that a run ends with."""
    _, command, *words = shlex.split(shown.splitlines()[-1].partition("to solve tasks")[2])
    assert command == "bin/solve"
    return load_config(None, words)


# ---- validation by answers while training ----------------------------------------------------------------------------

TRAINED = {
    "qwen2": ("Qwen2", {**COMMON, "tie_word_embeddings": True}),
    "llama3-rope": ("Llama", {**COMMON, "rope_parameters": LLAMA_3}),
    "qwen3": ("Qwen3", WIDE),  # whose norms widen keys under autocast
}
SHORT = {"max_position_embeddings": 128}  # an untaught model does not end, so its replies are cut there
WAYS = [(True, "fp32"), (True, "bf16"), (False, "bf16")]  # whether LoRA, and the precision
CASES = [(name, *way) for name in TRAINED for way in WAYS] + [("qwen3", lora, "fp16") for lora in (True, False)]


@pytest.mark.parametrize(("name", "lora", "precision"), CASES)
def test_answers_are_validated_in_every_precision(name, lora, precision, coin_tasks, tmp_path):
    """Through PEFT's layers and under autocast, where transformers runs the layers."""
    architecture, settings = TRAINED[name]
    folder = folder_with(tmp_path / "pretrained", config_of(architecture, {**settings, **SHORT}))
    measured = {"every": 1, "accuracy_every": 1, "accuracy_prompts": 2}
    config = coin_run(folder, coin_tasks, {"enabled": lora}, validation=measured, train={"precision": precision})
    train(config, tmp_path / "run")
    (step,) = [record for record in log(tmp_path / "run") if "loss" in record]
    assert 0 <= step["accuracy"] <= 1
    assert math.isfinite(step["validation_loss"])
