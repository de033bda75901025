import math
import weakref
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from toys import TOY, flip_task, random_adapter

import arc_solver.models.fast_decoder
from arc_solver.config import AdaptConfig, FormatConfig
from arc_solver.models.adapters import LoraBank, attach_adapters, fresh_adapter
from arc_solver.models.model import Model, load_model, new_model
from arc_solver.puzzles.encode import IGNORE, INPUT, OUTPUT, encode_sample
from arc_solver.puzzles.tasks import Pair, Task
from arc_solver.rng import named_rng
from arc_solver.solving import adapt as adapt_module
from arc_solver.solving.adapt import Adaptation, adapt, group_by_length, held_out_samples, planned_steps
from arc_solver.training.memory import activation_bytes_per_token
from arc_solver.training.optimize import step_rate


def one_sided(count: int) -> Task:
    """Demonstration i is an i+1 by 1 grid, so that it is known again under every augmentation."""
    pairs = tuple(Pair(np.full((i + 1, 1), i, np.uint8), np.full((i + 1, 1), i, np.uint8)) for i in range(count))
    return Task("lengths", pairs, (pairs[0].input,))


def shown(sample) -> list[int]:
    """Which demonstrations of `one_sided` a sample shows, in order."""
    pieces = np.split(sample.ids_T, np.flatnonzero(sample.ids_T == INPUT))[1:]
    return [int((piece < 10).sum()) // 2 - 1 for piece in pieces]


@pytest.mark.parametrize("count", [2, 3, 5])
def test_every_demonstration_is_held_out_equally_often(count):
    """Chi-square over what is really last in the ids, and over every position before it."""
    config = AdaptConfig()
    samples = list(islice(held_out_samples(one_sided(count), config, FormatConfig(), named_rng(0, "x")), 600))
    orders = [shown(sample) for sample, _ in samples]
    assert all(sorted(order) == list(range(count)) for order in orders)
    assert all(order[-1] == held_out for order, (_, held_out) in zip(orders, samples, strict=True))
    for start in range(0, 600, count):  # exactly once in every n samples
        assert sorted(order[-1] for order in orders[start : start + count]) == list(range(count))
    for position in range(count):
        counts = Counter(order[position] for order in orders)
        assert chisquare([counts[i] for i in range(count)]).pvalue > 0.001


def test_the_held_out_output_is_learnt_and_the_first_is_not():
    for sample, held_out in islice(held_out_samples(one_sided(3), AdaptConfig(), FormatConfig(), named_rng(1)), 20):
        learnt = sample.labels_T[sample.labels_T != IGNORE]
        assert sample.labels_T[-1] != IGNORE
        first = shown(sample)[0]
        assert (learnt < 10).sum() == 6 - (first + 1)
        assert held_out != first


def test_a_single_demonstration_is_learnt_without_context():
    task = one_sided(1)
    sample, held_out = next(held_out_samples(task, AdaptConfig(), FormatConfig(), named_rng(0)))
    assert held_out == 0
    assert (sample.labels_T != IGNORE).sum() == 3  # cell, newline, end


def test_long_tasks_lose_demonstrations_but_not_the_held_out_one(rng):
    task = flip_task(rng, demonstrations=5)
    longest = max(len(encode_sample([pair], FormatConfig())) for pair in task.train)
    config = AdaptConfig(max_tokens=2 * longest)
    for sample, _ in islice(held_out_samples(task, config, FormatConfig(), named_rng(0)), 40):
        assert len(sample) <= 2 * longest
        assert sample.labels_T[-1] != IGNORE
    tiny = AdaptConfig(max_tokens=1)  # a pair that is too long by itself stays
    sample, _ = next(held_out_samples(task, tiny, FormatConfig(), named_rng(0)))
    assert (sample.ids_T == INPUT).sum() == 1


def test_what_a_sample_lost_is_reported(toy_model, rng):
    task = flip_task(rng, demonstrations=4)
    for max_tokens, dropped in ((10_000, 0), (1, 3)):
        config = AdaptConfig(steps=2, batch_size=1, rank=2, max_tokens=max_tokens)
        assert adapt([task], toy_model, config, [named_rng(0)])[0].to_json()["dropped"] == dropped


@pytest.mark.parametrize(("steps", "points"), [(3, 3), (40, 40), (45, 40)])
def test_a_loss_curve_is_kept_whole_and_short(toy_model, rng, steps, points):
    """Its ends are those of the losses, of which it has means over parts of the steps."""
    config = AdaptConfig(steps=steps, rank=2, stop="never")
    content = adapt([flip_task(rng)], toy_model, config, [named_rng(0)])[0].to_json()
    tenth = steps // 10
    assert len(content["losses"]) == points
    if tenth <= 1:
        assert content["first_loss"] == content["losses"][0]
        assert content["last_loss"] == content["losses"][-1]
    assert content["losses"][0] > content["losses"][-1] > 0


def test_the_budget_cuts_steps(rng):
    task = flip_task(rng)
    config = AdaptConfig(steps=50, batch_size=2, budget_tokens=20 * task.tokens, stop="never")
    assert planned_steps(task, config) == 10
    assert planned_steps(task, config.model_copy(update={"budget_tokens": 1})) == 1
    assert planned_steps(task, config.model_copy(update={"budget_tokens": 10**9})) == 50


def test_adapting_lowers_the_loss_and_leaves_the_base(rng):
    task = flip_task(rng)
    model = new_model(TOY, FormatConfig(), seed=1)
    with torch.no_grad():
        model.lm.lm_head.weight *= 20  # as drawn, a random head could not say anything with certainty
    before = {name: p.clone() for name, p in model.lm.state_dict().items()}
    config = AdaptConfig(rank=4, alpha=8, lr=2e-2, steps=40, stop="never")
    ((first,), (second,)) = (adapt([task], model, config, [named_rng(0, "adapt")]) for _ in range(2))
    assert first.last_loss < 0.8 * first.first_loss
    assert all(torch.equal(p, before[name]) for name, p in model.lm.state_dict().items())
    for name, (a, b) in first.adapter.weights.items():
        assert torch.equal(a, second.adapter.weights[name][0])
        assert torch.equal(b, second.adapter.weights[name][1])
        assert b.any()


# ---- several tasks at once -----------------------------------------------------------------------------------------

CONFIG = AdaptConfig(rank=4, alpha=8, lr=1e-3, steps=20, batch_size=2, stop="never")


@pytest.fixture
def tasks(rng) -> list[Task]:
    return [flip_task(rng, f"flip{n}", demonstrations=2 + n) for n in range(3)]


def adapted(tasks: list[Task], model: Model, config: AdaptConfig = CONFIG) -> dict[str, Adaptation]:
    done = adapt(tasks, model, config, [named_rng(0, task.id) for task in tasks])
    return {task.id: result for task, result in zip(tasks, done, strict=True)}


def assert_same(one: Adaptation, other: Adaptation) -> None:
    assert (one.steps, one.tokens, one.ended) == (other.steps, other.tokens, other.ended)
    for name, pair in one.adapter.weights.items():
        for mine, theirs in zip(pair, other.adapter.weights[name], strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_one_task_equals_peft(tasks, toy_model):
    """The same init and data, and 20 steps of AdamW by PEFT and PyTorch, in float32."""
    from peft import LoraConfig, get_peft_model

    config, task = CONFIG, tasks[1]
    ours = adapted([task], toy_model)[task.id]

    lm = new_model(TOY, FormatConfig(), seed=1).lm
    lm.set_attn_implementation("sdpa")
    settings = LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=list(config.targets))
    peft_model = get_peft_model(lm, settings)
    rng = named_rng(0, task.id)
    with torch.no_grad():
        for name, (a, b) in fresh_adapter(toy_model, config, rng).weights.items():
            layer = peft_model.get_submodule(f"base_model.model.{name}")
            layer.lora_A["default"].weight.copy_(a)
            layer.lora_B["default"].weight.copy_(b)
    samples = held_out_samples(task, config, FormatConfig(), rng)
    trained = [p for p in peft_model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)
    for step in range(20):
        logits, labels = [], []
        for _ in range(config.batch_size):
            sample, _ = next(samples)
            ids, positions = (torch.from_numpy(x.astype(np.int64))[None] for x in (sample.ids_T, sample.positions_T))
            out = peft_model(input_ids=ids, position_ids=positions, attention_mask=torch.ones_like(ids))
            logits.append(out.logits[0, :-1])
            labels.append(torch.from_numpy(sample.labels_T[1:].astype(np.int64)))
        torch.nn.functional.cross_entropy(torch.cat(logits), torch.cat(labels), ignore_index=IGNORE).backward()
        torch.nn.utils.clip_grad_norm_(trained, config.clip)
        optimizer.param_groups[0]["lr"] = config.lr * step_rate(step / 20, config)
        optimizer.step()
        optimizer.zero_grad()
    for name, pair in ours.adapter.weights.items():
        layer = peft_model.get_submodule(f"base_model.model.{name}")
        for mine, theirs in zip(pair, (layer.lora_A, layer.lora_B), strict=True):
            torch.testing.assert_close(mine, theirs["default"].weight.detach(), atol=1e-5, rtol=0)
    assert all(b.abs().max() > 1e-4 for _, b in ours.adapter.weights.values()), "nothing was learnt"


def test_three_tasks_at_once_equal_each_alone_in_any_order(tasks, toy_model):
    together, reversed_ = adapted(tasks, toy_model), adapted(tasks[::-1], toy_model)
    for task in tasks:
        alone = adapted([task], toy_model)[task.id]
        assert_same(together[task.id], alone)
        assert_same(reversed_[task.id], alone)


def test_tasks_that_take_fewer_steps_leave_the_others_alone(tasks, toy_model):
    config = CONFIG.model_copy(update={"budget_tokens": 15 * 2 * max(task.tokens for task in tasks)})
    together = adapted(tasks, toy_model, config)
    assert len({result.steps for result in together.values()}) > 1
    for task in tasks:
        assert_same(together[task.id], adapted([task], toy_model, config)[task.id])


def test_a_neighbour_that_diverges_is_reset_and_reported(tasks, toy_model, monkeypatch):
    expected = adapted(tasks, toy_model)
    real, calls = adapt_module._ask, []

    def poisoned(model, bank, learners, samples, recompute):
        logits_LRV, *targets = real(model, bank, learners, samples, recompute)
        calls.append(len(learners))
        if len(calls) == 6:
            logits_LRV = logits_LRV + torch.tensor([0, torch.nan, 0])[:, None, None]
        return logits_LRV, *targets

    monkeypatch.setattr(adapt_module, "_ask", poisoned)
    found = adapted(tasks, toy_model)
    assert calls == [3] * 6 + [2] * 14
    assert [found[task.id].ended for task in tasks] == ["steps", "diverged", "steps"]
    for task in (tasks[0], tasks[2]):
        assert_same(found[task.id], expected[task.id])
    start = fresh_adapter(toy_model, CONFIG, named_rng(0, tasks[1].id))
    diverged = found[tasks[1].id]
    assert (diverged.steps, np.isfinite(diverged.last_loss)) == (6, True)
    for name, (a, b) in diverged.adapter.weights.items():
        assert torch.equal(a, start.weights[name][0])
        assert not b.any()


# ---- memory --------------------------------------------------------------------------------------------------------


def test_what_has_no_room_goes_through_the_model_part_by_part(tasks, toy_model, monkeypatch):
    """All learners in a pass, two, one, and sample by sample, with and without recomputing: the same adapters."""
    real, seen = adapt_module._ask, []

    def watched(model, bank, learners, samples, recompute=False):
        seen.append((len(learners), sum(map(len, samples)), recompute))
        return real(model, bank, learners, samples, recompute)

    monkeypatch.setattr(adapt_module, "_ask", watched)
    config = CONFIG.model_copy(update={"steps": 3})
    expected = adapted(tasks, toy_model, config)
    one = config.batch_size * max(task.tokens for task in tasks)
    for room, recompute in ((2 * one, False), (one, False), (1, False), (one, True), (1, True)):
        seen.clear()
        monkeypatch.setattr(
            adapt_module.MicroBatching, "plan", lambda *_, r=room, c=recompute: adapt_module.MicroBatching(r, c)
        )
        found = adapted(tasks, toy_model, config)
        assert len(seen) > 3
        assert max(samples for _, samples, _ in seen) == (1 if room == 1 else 4 if room == 2 * one else 2)
        assert {again for _, _, again in seen} == {recompute}
        for task in tasks:
            assert_same(found[task.id], expected[task.id])


def test_recomputing_by_transformers_too(tasks, toy_model, monkeypatch):
    config = CONFIG.model_copy(update={"steps": 2})
    expected = adapted(tasks, toy_model, config)
    monkeypatch.setattr(arc_solver.models.fast_decoder, "supports", lambda lm: False)
    found = adapted(tasks, toy_model, config.model_copy(update={"recompute": "yes"}))
    for task in tasks:
        assert_same(found[task.id], expected[task.id])
    assert not toy_model.lm.training


def test_memory_that_runs_out_halves_what_goes_through_at_once(tasks, toy_model, monkeypatch, caplog):
    real, refused = adapt_module._ask, []
    most = CONFIG.batch_size * max(task.tokens for task in tasks)

    def small(model, bank, learners, samples, recompute):
        tokens = sum(len(sample) for own in samples for sample in own)
        if tokens > most / 2:
            refused.append(tokens)
            raise torch.OutOfMemoryError("no room")
        return real(model, bank, learners, samples, recompute)

    expected = adapted(tasks, toy_model)
    monkeypatch.setattr(adapt_module, "_ask", small)
    found = adapted(tasks, toy_model)
    assert 1 <= len(refused) <= 4, "a room that was found to be too large is not tried again"
    assert "out of memory" in caplog.text
    for task in tasks:
        assert_same(found[task.id], expected[task.id])

    asked = set()

    def smaller(model, bank, learners, samples, recompute):
        asked.add(recompute)
        raise torch.OutOfMemoryError("no room at all")

    monkeypatch.setattr(adapt_module, "_ask", smaller)
    for recompute, tried in (("auto", {False, True}), ("no", {False}), ("yes", {True})):
        asked.clear()
        with pytest.raises(torch.OutOfMemoryError):
            adapted(tasks, toy_model, CONFIG.model_copy(update={"recompute": recompute}))
        assert asked == tried


def test_the_plan_follows_from_free_memory():
    model = new_model(TOY.model_copy(update={"layers": 8}), FormatConfig(), seed=1)
    config = AdaptConfig(rank=4, max_tokens=1000)
    with attach_adapters(model, [random_adapter(model, 0, config)]):
        kept, recomputed = activation_bytes_per_token(model)
        assert 0 < recomputed < kept
        plenty, little = (adapt_module.MicroBatching.plan(model, config, n * kept) for n in (10_000, 1000))
    assert (plenty.room, plenty.recompute) == (pytest.approx(7000), False)
    assert (little.room, little.recompute) == (pytest.approx(700 * kept / recomputed), True)


def test_the_plan_does_not_depend_on_how_many_tasks_there_are(tasks, toy_model, monkeypatch):
    planned, real = [], adapt_module.MicroBatching.plan
    monkeypatch.setattr(adapt_module.MicroBatching, "plan", lambda *args: planned.append(real(*args)) or planned[-1])
    few = CONFIG.model_copy(update={"steps": 2})
    rngs = [named_rng(0, task.id) for task in tasks]
    assert [result.ended for result in adapt(tasks, toy_model, few, rngs, memory=4e9)] == ["steps"] * 3
    adapt(tasks[:1], toy_model, few, rngs[:1], memory=4e9)
    assert planned[0].room == pytest.approx(planned[1].room, rel=0.01)


def test_what_ran_out_of_memory_is_gone_before_it_is_tried_again(tasks, toy_model, monkeypatch):
    """The first backward pass fails; when the next forward pass begins, nothing of the first is alive."""
    real_ask, real_backward, kept = adapt_module._ask, LoraBank.backward, []

    def watched(model, bank, learners, samples, recompute=False):
        assert not kept or kept[0]() is None
        found = real_ask(model, bank, learners, samples, recompute)
        kept.append(weakref.ref(found[0]))
        return found

    def failing(bank, loss):
        if len(kept) == 1:
            raise torch.OutOfMemoryError("no room")
        real_backward(bank, loss)

    monkeypatch.setattr(adapt_module, "_ask", watched)
    monkeypatch.setattr(LoraBank, "backward", failing)
    adapted(tasks, toy_model, CONFIG.model_copy(update={"steps": 1}))
    assert len(kept) > 1


def test_groups_are_no_larger_than_their_adapters_may_be(arc):
    groups = group_by_length(arc["training"].tasks, AdaptConfig(), torch.device("cuda"), most=3)
    assert max(map(len, groups)) == 3


def test_all_can_continue_one_adapter(tasks, toy_model):
    start = random_adapter(toy_model, 5, CONFIG)
    rngs = [named_rng(0, task.id) for task in tasks]
    still = adapt(tasks, toy_model, CONFIG.model_copy(update={"lr": 1e-30}), rngs, [start] * 3)
    moved = adapt(tasks, toy_model, CONFIG, [named_rng(0, task.id) for task in tasks], [start] * 3)
    for name, (a, b) in start.weights.items():
        for k in range(3):
            assert torch.equal(still[k].adapter.weights[name][0], a)
            assert torch.equal(still[k].adapter.weights[name][1], b)
            assert 0 < (moved[k].adapter.weights[name][1] - b).abs().max() < 0.1


def test_stop_once_all_held_out_demonstrations_are_answered(rng):
    """The bundled model learns a small task well before the last step; a task without a rule it does not."""
    model = load_model("")
    easy = flip_task(rng, "easy", demonstrations=3)
    easy = Task("easy", tuple(Pair(pair.input, pair.input) for pair in easy.train), easy.test)
    noise = [Pair(pair.input, rng.integers(0, 10, (3, 3)).astype(np.uint8)) for pair in easy.train]
    config = AdaptConfig(steps=60, batch_size=2, stop="leave-one-out")
    found = adapted([easy, Task("noise", tuple(noise), easy.test)], model, config)
    assert (found["easy"].ended, found["noise"].ended) == ("leave-one-out", "steps")
    assert found["easy"].steps < found["noise"].steps == 60
    with attach_adapters(model, [found["easy"].adapter]), torch.no_grad():
        for i in range(3):
            pairs = [pair for j, pair in enumerate(easy.train) if j != i] + [easy.train[i]]
            sample = encode_sample(pairs, model.format, "last")
            ids, positions = (torch.from_numpy(x.astype(np.int64))[None] for x in (sample.ids_T, sample.positions_T))
            answered = model.logits(ids, positions)[0, :-1].argmax(-1).numpy()
            learnt = sample.labels_T[1:] != IGNORE
            assert (answered[learnt] == sample.labels_T[1:][learnt]).all()


@pytest.mark.parametrize(("batch_size", "joint"), [(1, 0.0), (2, 0.0), (1, 0.5)])
def test_leave_one_out_counts_held_out_outputs_as_they_were_answered_before_they_were_learnt(arc, batch_size, joint):
    """Nothing is learnt here, so every sample can be asked again, by itself. Four tasks at once, as in a run.

    After a joint stage the last demonstration alone counts, of three or more: it has not seen that.
    """
    model, tasks = load_model(""), sorted(arc["training"].tasks, key=lambda task: task.tokens)[1:5]
    config = AdaptConfig(steps=12, batch_size=batch_size, lr=1e-30, stop="never", joint=joint)
    found = adapt(tasks, model, config, [named_rng(0, task.id) for task in tasks])
    for task, learnt in zip(tasks, found, strict=True):
        rng = named_rng(0, task.id)
        fresh_adapter(model, config, rng)
        samples = list(islice(held_out_samples(task, config, model.format, rng), 12 * batch_size))
        unseen = range(len(task.train))[-1 if len(task.train) > 2 else 9 :] if joint else range(len(task.train))
        samples = [(sample, held_out) for sample, held_out in samples if held_out in unseen]
        right = [answers_its_held_out_output(model, sample) for sample, _ in samples]
        steps = [all(right[i : i + batch_size]) for i in range(0, len(right), batch_size)]
        asked = math.ceil(max(12, 4 * len(unseen)) / batch_size)
        assert learnt.leave_one_out == sum(steps[-asked:]) / asked
    assert len({learnt.leave_one_out for learnt in found}) > 1, "all alike would tell nothing"


@torch.no_grad()
def answers_its_held_out_output(model: Model, sample) -> bool:
    start = int(np.flatnonzero(sample.ids_T == OUTPUT)[-1])
    ids, positions = (torch.from_numpy(x.astype(np.int64))[None] for x in (sample.ids_T, sample.positions_T))
    answered = model.logits(ids, positions)[0, start:-1].argmax(-1).numpy()
    return bool((answered == sample.ids_T[start + 1 :]).all())


def test_a_task_that_stops_does_so_at_a_rate_of_zero(toy_model, rng):
    """Eleven of twelve held-out outputs right, and the rate falls in a line, to end before the last step planned."""
    config = AdaptConfig(rank=4, steps=100, stop="leave-one-out", schedule="constant", warmup=0.0)
    with attach_adapters(toy_model, [fresh_adapter(toy_model, config, rng)]) as bank:
        learner = adapt_module._Learner(0, flip_task(rng), rng, bank, config, toy_model.format)
        rates = []
        while not learner.ended:
            learner.step(0.0)
            rates.append(learner.optimizer.param_groups[0]["lr"] / config.lr)
            learner.note(learner.drawn, 0.5, learner.steps >= 20, 1.0, None)
        assert (learner.ended, learner.decays_from) == ("leave-one-out", 31)
        tail = np.ceil(adapt_module.TAIL * 31)
        assert learner.steps == 31 + tail
        assert rates == pytest.approx([1.0] * 31 + [1 - k / tail for k in range(int(tail))])


def test_groups_are_of_like_length(arc):
    tasks, config = arc["training"].tasks, AdaptConfig()
    groups = group_by_length(tasks, config, torch.device("cpu"))
    assert sorted(task.id for group in groups for task in group) == sorted(task.id for task in tasks)
    assert max(map(len, groups)) > 1
    for group in groups:
        lengths = [min(task.tokens, config.max_tokens) for task in group]
        assert len(group) == 1 or max(lengths) * len(group) * config.batch_size <= 2048
        assert min(lengths) >= 0.8 * max(lengths)
    assert group_by_length(tasks[::-1], config, torch.device("cpu")) == groups
    assert len(group_by_length(tasks[:9], config, torch.device("cpu"))) >= 8, (
        "a few tasks are shared out over the cores"
    )
    pairs = group_by_length(tasks, config.model_copy(update={"together": 2}), torch.device("cpu"))
    assert max(map(len, pairs)) == 2
