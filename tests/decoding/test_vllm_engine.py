"""What is vLLM's own: what it cannot serve, adapters as files, and the deadline."""

import subprocess
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint
from plain_decoding import ADAPT, CONTEXT, FORMAT, Plain, Served, kept, opinionated_model, prompts_of, serve
from plain_decoding import some_adapters as adapters_for
from pydantic import BaseModel, ValidationError, model_validator
from small_runs import small, write_config

from arc_solver.config import AdaptConfig, Config, EngineConfig, load_config
from arc_solver.decoding import vllm_engine
from arc_solver.decoding.engine_choice import check_engine, engine_kind, make_engine
from arc_solver.decoding.torch_engine import TorchEngine
from arc_solver.decoding.vllm_engine import VLLMEngine, refusal
from arc_solver.errors import MachineError, UserError
from arc_solver.models.adapters import Adapter, fresh_adapter, load_adapter, save_adapter
from arc_solver.models.model import Model, load_model, save_model
from arc_solver.puzzles.encode import END, encode_reply
from arc_solver.rng import named_rng

real = pytest.mark.vllm
TRAINS = Path(__file__).parents[2] / ".venv/bin/python"  # what training needs is not where vLLM is
TINY = EngineConfig(kind="vllm", kv_cache_gib=1 / 16, max_loras=1, max_sequences=4, step_tokens=128)


@pytest.fixture
def served(tmp_path: Path) -> Served:
    return serve("vllm", "Llama", tmp_path)


@pytest.fixture
def folders(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Where adapters have been written."""
    written: list[Path] = []

    def save(adapter: Adapter, folder: Path) -> None:
        written.append(folder)
        save_adapter(adapter, folder)

    monkeypatch.setattr(vllm_engine, "save_adapter", save)
    return written


# ---- what it refuses -----------------------------------------------------------------------------------------------


def test_grid_positions_are_refused(toy_model, tmp_path):
    with pytest.raises(UserError, match=r"grid positions: use engine\.kind=torch"):
        VLLMEngine(toy_model, tmp_path, TINY)


def test_without_vllm_the_error_names_the_extra(tmp_path):
    if find_spec("vllm"):
        pytest.skip("vLLM is here")
    with pytest.raises(UserError, match=r"No module named 'vllm'.*run .* -m pip install 'arc_solver\[vllm\]'"):
        VLLMEngine(opinionated_model("Llama"), tmp_path, TINY)


@real
def test_a_vllm_for_another_pytorch_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.12.1+cpu")
    with pytest.raises(UserError, match=r"for PyTorch 2\.12\.1.*is for PyTorch 2\.13\.\d.*arc_solver\[vllm\]"):
        VLLMEngine(opinionated_model("Llama"), tmp_path, TINY)


def test_too_little_room_for_keys_and_values_is_the_users_to_change(tmp_path):
    with pytest.raises(UserError, match=r"may take 0\.000488 GiB .* engine\.kv_cache_gib is 0\.0001: make that larger"):
        VLLMEngine(opinionated_model("Llama"), tmp_path, TINY.model_copy(update={"kv_cache_gib": 1e-4}))


def test_ranks_beyond_what_vllm_serves_are_refused(tmp_path):
    model = opinionated_model("Llama")
    like = fresh_adapter(model, AdaptConfig(rank=513), named_rng(0))
    with pytest.raises(UserError, match=r"512 at most, and the adapters' is 513: lower adapt\.rank"):
        VLLMEngine(model, tmp_path, TINY, like)
    config = load_config(None, ["engine.kind=vllm", "adapt.rank=513"])
    with pytest.raises(UserError, match="512 at most"):  # before there is a run
        check_engine(model, config, torch.device("cpu"))


def test_a_refusal_names_its_cause_the_setting_and_the_users_model(tmp_path):
    """Pydantic's errors, which vLLM's are, have a headline first, and values and an address last."""

    class Settings(BaseModel):
        @model_validator(mode="after")
        def _check(self) -> "Settings":
            raise ValueError(f"{tmp_path}: max_num_batched_tokens (16) must be no less than max_num_seqs (128).\nMore.")

    with pytest.raises(ValidationError) as refused:
        Settings()
    said = refusal(refused.value, tmp_path, "mine with my/adapter")
    assert said == (
        "vLLM cannot serve mine with my/adapter (mine with my/adapter: max_num_batched_tokens (16) must be no less than"
        " max_num_seqs (128)): change engine.step_tokens or engine.max_sequences, or use engine.kind=torch"
    )
    assert refusal(ValueError("no such layer"), tmp_path, "a").endswith("(no such layer): use engine.kind=torch")


@real
def test_what_vllm_itself_refuses_is_the_users_to_change(tmp_path):
    model = opinionated_model("Llama")
    save_model(model, tmp_path)
    few = TINY.model_copy(update={"step_tokens": 1, "max_sequences": 2})
    with pytest.raises(
        UserError, match=r"serve mine \(max_num_.* or engine\.max_sequences, or use engine\.kind=torch$"
    ):
        VLLMEngine(model, tmp_path, few, called="mine")


@real
def test_adapters_for_another_model_are_refused(served):
    (fits,) = adapters_for(served.model, 1)
    name, (a, b) = next(iter(fits.weights.items()))
    misfits = {
        f"64 x {a.shape[1]} layer {name}": {name: (a, torch.zeros(64, 3))},
        "layer model.layers.7.mlp.up_proj": {"model.layers.7.mlp.up_proj": (a, b)},
        "rank 9, and": None,
        "changes lm_head": {"lm_head": (torch.zeros(3, 96), torch.zeros(64, 3))},
    }
    for message, weights in misfits.items():
        adapter = Adapter(3, 6, weights) if weights else Adapter(9, 6, fits.weights)
        with pytest.raises(UserError, match=message), served.engine.open_session(prompts_of(1), [adapter]):
            pass


@real
def test_an_adapter_that_vllm_ignores_is_noticed(served, monkeypatch):
    """vLLM says nothing about names that it does not know."""
    (adapter,) = adapters_for(served.model, 1)

    def save_elsewhere(adapter: Adapter, folder: Path) -> None:
        renamed = {name.replace("model.layers", "model.blocks"): ab for name, ab in adapter.weights.items()}
        save_adapter(Adapter(adapter.rank, adapter.alpha, renamed), folder)

    with served.engine.open_session(prompts_of(1), [adapter]):
        pass
    monkeypatch.setattr(vllm_engine, "save_adapter", save_elsewhere)
    with (
        pytest.raises(MachineError, match="vLLM ignores the adapter"),
        served.engine.open_session(prompts_of(1), [adapter]),
    ):
        pass


@real
def test_a_vllm_that_reports_on_all_ids_gives_the_same(served, monkeypatch):
    """As 0.19 does, which knows nothing of the ids that a request is for."""
    model, prompts = served.model, prompts_of(3)
    adapters = adapters_for(model, 1) * 3
    with served.engine.open_session(prompts, adapters) as session:
        replies = session.generate([0, 1, 2])
        scores = [one.log_probability for (one,) in session.score([[reply.ids] for reply in replies])]
    monkeypatch.setattr(served.engine, "_selective", False)
    params = served.engine.continuing(5)
    assert (params.logprobs, params.logprob_token_ids, params.stream_interval) == (-1, None, None)
    with served.engine.open_session(prompts, adapters) as session:
        again = session.generate([0, 1, 2])
    with served.engine.open_session(prompts, adapters) as session:  # what is known would not be asked for
        scores_again = [one.log_probability for (one,) in session.score([[reply.ids] for reply in again])]
    assert [reply.ids for reply in again] == [reply.ids for reply in replies]
    decoded, wanted = ([reply.log_probability for reply in both] for both in (again, replies))
    assert decoded + scores_again == pytest.approx(wanted + scores, abs=1e-4)


# ---- adapters as files ---------------------------------------------------------------------------------------------


@real
def test_a_fresh_adapter_changes_nothing(served):
    prompts = prompts_of(2)
    with served.engine.open_session(prompts, [fresh_adapter(served.model, ADAPT, named_rng(0))] * 2) as session:
        replies = session.generate([0, 1])
    assert [reply.ids for reply in replies] == [Plain(served.model, prompt).greedy() for prompt in prompts]


@real
def test_adapters_are_never_called_the_same_and_never_stay(served, folders, monkeypatch):
    adapters, export, requests = adapters_for(served.model, 2), served.engine._export, []
    monkeypatch.setattr(served.engine, "_export", lambda *given: requests.append(export(*given)) or requests[-1])
    for _ in range(2):
        with served.engine.open_session(prompts_of(3), [*adapters, adapters[0]]) as session:
            session.generate([0])
            assert all(folder.is_dir() for folder in folders[-2:])
            assert len(served.engine._llm.llm_engine.list_loras()) > 0
        assert not served.engine._llm.llm_engine.list_loras()
    with pytest.raises(KeyError), served.engine.open_session(prompts_of(1), adapters[:1]):
        raise KeyError
    assert len(folders) == 5
    for called in ("lora_name", "lora_int_id", "lora_path"):
        assert len({getattr(request, called) for request in requests}) == 5
    assert not any(folder.parent.exists() for folder in folders)


@real
def test_adapters_that_change_between_sessions_are_told_apart(served):
    """Else vLLM would take keys and values of the one before from its cache."""
    (prompt,) = prompts_of(1)
    for adapter in adapters_for(served.model, 3):
        with served.engine.open_session([prompt], [adapter]) as session:
            (reply,) = session.generate([0])
        plain = Plain(served.model, prompt, adapter)
        assert reply.log_probability == pytest.approx(plain.log_probability(plain.greedy()), abs=1e-3)


# ---- the deadline --------------------------------------------------------------------------------------------------


@real
def test_at_the_deadline_replies_come_back_as_they_are(served, monkeypatch):
    prompts = prompts_of(6)
    with served.engine.open_session(prompts, [None] * 6) as session:
        whole = session.generate(range(6))
    step, steps = served.engine.step, iter(range(100))

    def last_step():
        if next(steps) == 4:
            monkeypatch.setattr(served.engine, "deadline", time.monotonic())
        return step()

    monkeypatch.setattr(served.engine, "step", last_step)
    replies = [[encode_reply(np.zeros((2, 2), np.uint8), FORMAT).tolist()]] * 6
    with served.engine.open_session(prompts, [None] * 6) as session:
        part = session.generate(range(6))
        searched = session.search(1e-3, 100)
        scored = session.score(replies)
        assert session.cost.forward_steps == 5
        monkeypatch.setattr(served.engine, "deadline", np.inf)
        assert [reply.ids for reply in session.generate(range(6))] == [reply.ids for reply in whole]
    assert any(END not in reply.ids for reply in part)
    assert all(reply.ids == other.ids[: len(reply.ids)] for reply, other in zip(part, whole, strict=True))
    assert not any(found.complete for found in searched)
    assert all(np.isnan(score.log_probability) for (score,) in scored)


@real
def test_a_session_that_is_left_in_the_middle_leaves_nothing_behind(served, monkeypatch):
    prompts = prompts_of(3)

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(served.engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt), served.engine.open_session(prompts, [None] * 3) as session:
        session.generate(range(3))
    assert not served.engine._llm.llm_engine.has_unfinished_requests()


# ---- the prefix cache ----------------------------------------------------------------------------------------------


@real
def test_scores_do_not_come_from_memory_that_the_cache_left_out(served):
    """Replies whose beginnings another session computed: vLLM has them in its cache, and the session knows nothing."""
    prompts, reply = prompts_of(1), encode_reply(np.arange(80, dtype=np.uint8).reshape(8, 10) % 10, FORMAT).tolist()
    expected = Plain(served.model, prompts[0]).log_probability(reply)
    for _ in range(3):
        with served.engine.open_session(prompts, [None]) as session:
            ((score,),) = session.score([[reply]])
        assert score.log_probability == pytest.approx(expected, abs=1e-3)


# ---- checkpoints ---------------------------------------------------------------------------------------------------


@real
@pytest.mark.parametrize("tied", [False, True])
def test_an_offline_run_is_served(tmp_path, tied):
    """A pretrained model, cut to our vocabulary, its rsLoRA adapter, and the two merged."""
    pretrained = make_checkpoint(tmp_path / "llama", "llama", digits="triples", tied=tied)
    config = small(
        model={"path": str(pretrained)},
        format={"positions": "token"},
        lora={"enabled": True, "rank": 4, "alpha": 16.0},
        train={"optimizer": "adamw", "lr": 1e-2},
    )
    words = [str(write_config(config, tmp_path)), "--out", str(tmp_path / "run")]
    done = subprocess.run([str(TRAINS), "-P", "-m", "arc_solver.train", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    base_dir, adapter_dir, merged_dir = (tmp_path / "run" / name for name in ("base", "adapter", "model"))
    base, merged, adapter = load_model(base_dir), load_model(merged_dir), load_adapter(adapter_dir)
    prompts, reply = prompts_of(2), encode_reply(np.eye(5, dtype=np.uint8), FORMAT).tolist()
    cases: list[tuple[Model, Path, Adapter | None]] = [(base, base_dir, adapter), (merged, merged_dir, None)]
    for model, folder, on_top in cases:
        engine = kept(VLLMEngine(model, folder, TINY, on_top, CONTEXT))
        with engine.open_session(prompts, [on_top] * 2) as session:
            scores = session.score([[reply]] * 2)
        for prompt, (score,) in zip(prompts, scores, strict=True):
            plain = Plain(model, prompt, on_top)
            assert score.log_probability == pytest.approx(plain.log_probability(reply), abs=1e-3)


@real
def test_the_engine_of_a_run_has_the_merged_adapter(tmp_path):
    """The model in memory is asked, not the folder that it once came from."""
    model = opinionated_model("Llama")
    save_model(model, tmp_path)
    with torch.no_grad():
        model.lm.model.layers[0].mlp.up_proj.weight *= -1
    config = Config.model_validate(
        {
            "model": {"path": str(tmp_path), "adapter": "merged"},
            "engine": TINY.model_dump(),
            "adapt": {"rank": 3},
            "predict": {"max_tokens": 400},
        }
    )
    engine = kept(make_engine(model, None, config))
    assert engine.context_length == CONTEXT
    prompts, reply = prompts_of(1), encode_reply(np.eye(3, dtype=np.uint8), FORMAT).tolist()
    with engine.open_session(prompts, [None]) as session:
        ((score,),) = session.score([[reply]])
    assert score.log_probability == pytest.approx(Plain(model, prompts[0]).log_probability(reply), abs=1e-3)


def test_auto_is_torch_where_vllm_does_not_serve_or_pay(toy_model, tmp_path):
    cpu = torch.device("cpu")
    assert engine_kind(toy_model, Config(), cpu)[0] == "torch"
    assert "grid positions" in engine_kind(toy_model, Config(), cpu)[1]
    tokens = opinionated_model("Llama")
    assert engine_kind(tokens, Config(), cpu) == ("torch", "on cpu")
    assert engine_kind(tokens, Config(engine=TINY), cpu)[0] == "vllm"
    assert isinstance(make_engine(tokens, None, Config()), TorchEngine)
