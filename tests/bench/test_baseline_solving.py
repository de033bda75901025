"""The baseline's side of `bin/bench solve` does the same work as ours: same samples, same answers, same adapters."""

import copy
import json

import pytest
import torch
from toys import flip_task

from arc_solver.answers.submission import read_submission
from arc_solver.answers.vote import choose_attempts
from arc_solver.bench.baseline_solving import (
    Baseline,
    Spent,
    _with_grid_positions,
    adapt_baseline,
    generate_greedily,
    load_baseline,
    main,
    solve_baseline,
    submission_file,
)
from arc_solver.config import AdaptConfig, Config, FormatConfig, PredictConfig, TasksConfig, VoteConfig
from arc_solver.decoding.torch_engine import TorchEngine
from arc_solver.errors import UserError
from arc_solver.models.adapters import merge
from arc_solver.models.model import BUNDLED_DIR, load_model
from arc_solver.puzzles.encode import END, encode_prompt, encode_reply, encode_sample, longest_reply
from arc_solver.puzzles.task_files import load_tasks
from arc_solver.puzzles.tasks import Pair, same_grid
from arc_solver.rng import named_rng
from arc_solver.solving.adapt import adapt
from arc_solver.solving.predict import predict

FEW = PredictConfig(views=6, drafts=False)
# PEFT 0.21 asks transformers 5.23 for something by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def stock():
    """The bundled model with the stock attention: it was trained, so what it likes best is legal."""
    lm, format = load_baseline(BUNDLED_DIR, torch.device("cpu"), torch.float32)
    assert lm.config._attn_implementation == "sdpa"
    return lm, format


@pytest.fixture(scope="module")
def ours():
    return load_model("")


def prompts_of(rng, same_length):
    tasks = [flip_task(rng, demonstrations=3) for _ in range(4)]
    if same_length:
        tasks = tasks[:1] * 4
    return [encode_prompt(task.train, task.test[0], FormatConfig()) for task in tasks]


@pytest.mark.parametrize("same_length", [False, True])  # without padding generate drops the mask
def test_greedy_replies_are_ours(stock, ours, rng, same_length):
    prompts = prompts_of(rng, same_length)
    assert (len({len(prompt) for prompt in prompts}) == 1) == same_length
    found, forward_steps = generate_greedily(stock[0], prompts, stock[1], longest_reply(stock[1]))
    with TorchEngine(ours, 10_000).open_session(prompts, [None] * 4) as session:
        expected = session.generate(range(4))
    assert [tuple(ids) for ids, _ in found] == [reply.ids for reply in expected]
    for (_, log_probability), reply in zip(found, expected, strict=True):
        assert log_probability == pytest.approx(reply.log_probability, abs=1e-3)
    assert forward_steps == max(len(ids) for ids, _ in found)


def test_counted_positions_would_give_other_probabilities(stock, rng):
    """What the grid positions are for: else the test above could not fail on them."""
    prompts = prompts_of(rng, False)
    token_wise = FormatConfig(positions="token")
    right, _ = generate_greedily(stock[0], prompts, stock[1], 40)
    wrong, _ = generate_greedily(stock[0], prompts, token_wise, 40)
    assert all(abs(a[1] - b[1]) > 0.01 for a, b in zip(right, wrong, strict=True))


def test_every_format_gets_its_positions(any_format, rng):
    """The positions of a reply, one id at a time, are those of the whole sample."""
    task = flip_task(rng)
    output = task.test[0][:, ::-1]
    prompt = encode_prompt(task.train, task.test[0], any_format)
    reply = encode_reply(output, any_format)
    whole = encode_sample([*task.train, Pair(task.test[0], output)], any_format).positions_T[-len(reply) :]
    if any_format.positions == "token":
        return
    prepare = _with_grid_positions(lambda ids, **_: {"position_ids": None}, [prompt] * 2, any_format, len(prompt))
    ids = torch.tensor([prompt.ids_T.tolist()] * 2)
    assert prepare(ids)["position_ids"] is None  # the prompt's are given
    for token, expected in zip(reply.tolist(), whole, strict=True):
        ids = torch.cat((ids, torch.full((2, 1), token)), 1)
        assert prepare(ids)["position_ids"].tolist() == [[expected]] * 2


def test_a_reply_that_never_ends_is_cut_and_is_no_grid(stock, rng):
    prompts = prompts_of(rng, False)
    replies, steps = generate_greedily(stock[0], prompts, stock[1], 2)
    assert steps == 2
    assert all(len(ids) == 2 and END not in ids for ids, _ in replies)
    baseline = Baseline(*stock, Config.model_validate({"adapt": {"enabled": False}, "predict": {"views": 3}}), 2)
    submission, measured = solve_baseline([flip_task(rng)], baseline)
    assert measured.malformed == 3
    assert submission["flip"][0][0].tolist() == [[0]]


def test_the_adapter_learns_what_ours_learns(stock, ours, rng):
    """In float32, step by step: the same start, samples, gradients, clipping and schedule."""
    task = flip_task(rng, demonstrations=3)
    config = AdaptConfig(steps=6, rank=4, batch_size=2, clip=0.3)
    spent = Spent()
    before = {name: weight.clone() for name, weight in stock[0].state_dict().items()}
    baseline = adapt_baseline(task, copy.deepcopy(stock[0]), config, stock[1], named_rng(5), spent)
    (done,) = adapt([task], ours, config, [named_rng(5)])
    assert (spent.adapt_steps, spent.adapt_tokens) == (done.steps, done.tokens)
    merged = load_model("")
    merge(merged, done.adapter)
    expected = dict(merged.lm.named_parameters())
    moved = 0.0
    for name, weight in baseline.named_parameters():
        change, ours_change = weight.detach() - before[name], expected[name].detach() - before[name]
        assert (change - ours_change).norm() <= 0.01 * ours_change.norm(), name
        moved += float(ours_change.norm())
    assert moved > 1
    assert all(torch.equal(weight, before[name]) for name, weight in stock[0].state_dict().items())


def test_answers_are_ours(stock, ours, rng):
    """Unadapted, where all replies are legal anyway: the same candidates of the same views, and the same attempts."""
    tasks = [flip_task(rng, f"task{i}", tests=2) for i in range(2)]
    config = Config(adapt=AdaptConfig(enabled=False), predict=FEW)
    baseline = Baseline(*stock, config, longest_reply(stock[1]))
    submission, measured = solve_baseline(tasks, baseline)
    assert measured.malformed == 0
    for task in tasks:
        expected = predict(task, TorchEngine(ours, 10_000), None, FEW, named_rng(config.run.seed, task.id, "predict"))
        found, _ = baseline.solve_task(task)
        assert found.geometries == expected.geometries
        for test in range(2):
            mine = {c.grid.tobytes(): c.views for c in expected.for_test(test) if c.views}
            assert {c.grid.tobytes(): c.views for c in found.for_test(test)} == mine
        for a, b in zip(submission[task.id], choose_attempts(expected, task, VoteConfig(rule="votes")), strict=True):
            assert all(same_grid(x, y) for x, y in zip(a, b, strict=True))


def test_the_command_leaves_what_the_bench_reads(rng, tmp_path):
    tasks = [flip_task(rng, f"task{i}", tests=1 + i) for i in range(2)]
    challenges = {
        t.id: {
            "train": [{"input": p.input.tolist(), "output": p.output.tolist()} for p in t.train],
            "test": [{"input": g.tolist()} for g in t.test],
        }
        for t in tasks
    }
    file, result = tmp_path / "challenges.json", tmp_path / "result.json"
    file.write_text(json.dumps(challenges))
    words = ["adapt.steps=2", "adapt.rank=4", "adapt.batch_size=1", "predict.views=2", "run.device=cpu"]
    assert main([str(BUNDLED_DIR), str(file), str(result), "--dtype", "bfloat16", *words]) == 0
    found = load_tasks(TasksConfig(spec=str(file)))
    assert set(read_submission(submission_file(result), found.tasks)) == {"task0", "task1"}
    content = json.loads(result.read_text())
    total, per_task = content["total"], content["per_task"]
    for key in total:
        assert total[key] == pytest.approx(sum(spent[key] for spent in per_task.values()))
        assert total[key] > 0, key
    assert total["adapt_steps"] == 4
    assert total["forward_steps"] <= total["reply_tokens"]
    assert total["adapt_s"] + total["decode_s"] <= content["seconds"]
    assert content["dtype"] == "bfloat16"
    assert content["peak_memory_bytes"] > 10 * 2**20


def test_what_is_no_checkpoint_of_ours(tmp_path):
    with pytest.raises(UserError, match="is no checkpoint that bin/train wrote"):
        load_baseline(tmp_path, torch.device("cpu"), torch.float32)
