import itertools
import math

import numpy as np
import pytest
import torch
from toys import TOY

from arc_solver.config import Config, FormatConfig, OptimConfig, SourceConfig, StageConfig, TrainConfig, load_config
from arc_solver.errors import MachineError, UserError
from arc_solver.models.model import new_model
from arc_solver.training.command import main
from arc_solver.training.muon import Float32Muon, orthogonalized
from arc_solver.training.optimize import RECENT, Pace, Step, fit, make_optimizers, rate_at, step_rate
from arc_solver.training.report import plot_rates


@pytest.mark.parametrize(
    ("schedule", "points"),
    [
        ("linear", {0: 0, 0.1: 0.5, 0.2: 1, 0.6: 0.5, 1: 0}),
        ("cosine", {0: 0, 0.1: 0.5, 0.2: 1, 0.6: 0.5, 0.4: 0.5 + math.sqrt(0.5) / 2, 1: 0}),
        ("constant", {0: 0, 0.1: 0.5, 0.2: 1, 0.6: 1, 1: 1}),
        ("wsd", {0: 0, 0.1: 0.5, 0.2: 1, 0.6: 1, 0.75: 1, 0.875: 0.5, 1: 0}),
        (
            "cyclic",
            {0: 0, 0.125: 1, 0.1875: 0.5, 0.25: 0, 0.375: 0.6, 0.5: 0, 0.625: 0.36, 0.75: 0, 0.875: 0.216, 1: 0},
        ),
    ],
)
def test_schedules_point_by_point(schedule, points):
    config = OptimConfig(schedule=schedule, warmup=0.2, decay=0.25, cycles=4, cycle_decay=0.6)
    for progress, rate in points.items():
        assert rate_at(progress, config) == pytest.approx(rate, abs=1e-12)


def test_no_step_has_a_rate_of_zero():
    for schedule in ("linear", "cosine", "cyclic", "wsd"):
        config = OptimConfig(schedule=schedule, steps=8, cycles=4)
        assert all(0 < step_rate(k / 8, config) <= 1 for k in range(8)), schedule


def test_plot_lr_writes_a_picture_and_trains_nothing(tmp_path):
    picture = tmp_path / "lr.png"
    assert main(["configs/bundled.toml", "--plot-lr", str(picture), "train.schedule=cyclic", "train.steps=40"]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [picture]
    with pytest.raises(UserError, match="--out is missing"):
        main(["configs/bundled.toml"])


def test_the_picture_has_every_step_of_every_stage(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "arc_solver.training.report.rate_curve", lambda rates, stages, file: drawn.append((rates, stages))
    )
    stages = ({"name": "a", "train": {"steps": 2, "lr": 1.0}}, {"name": "b", "train": {"steps": 3, "lr": 0.1}})
    plot_rates(Config(train=TrainConfig(schedule="constant", warmup=0), stages=stages), tmp_path / "lr.png")
    assert drawn == [([1.0, 1.0, 0.1, 0.1, 0.1], [("a", 2), ("b", 5)])]


def test_fit_finds_a_minimum():
    x = torch.nn.Parameter(torch.tensor([5.0]))
    config = OptimConfig(lr=0.5, steps=100)
    optimizers = make_optimizers([("x", x)], config)
    seen = []
    fit([x], optimizers, config, lambda _: backward((x - 2).square().sum()), after_step=seen.append)
    assert x.item() == pytest.approx(2, abs=0.05)
    assert [s.step for s in seen] == list(range(1, 101))
    assert all(0 < s.rate <= 1 for s in seen)
    assert optimizers[0].param_groups[0]["peak_lr"] == 0.5


def backward(loss):
    loss.backward()
    return loss


def test_a_step_that_overflows_in_fp16_changes_nothing_and_lowers_the_scale():
    x = torch.nn.Parameter(torch.tensor([5.0]))
    config = OptimConfig(lr=0.5, steps=3, schedule="constant", warmup=0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    seen = []

    def loss_at(k):
        factor = torch.inf if k == 1 else 1.0
        loss = (x * factor).sum()
        scaler.scale(loss).backward()
        return loss.detach()

    fit(
        [x],
        make_optimizers([("x", x)], config),
        config,
        loss_at,
        scaler=scaler,
        after_step=lambda step: seen.append((x.item(), scaler.get_scale())),
    )
    (first, scale), (second, lower), (third, _) = seen
    assert first < 5
    assert (second, lower) == (first, scale / 2)
    assert third < second


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_an_overflow_anywhere_stops_all_optimizers(bad):
    """Of the weights that one optimizer has, and of those of the other."""
    model = new_model(TOY, FormatConfig(), seed=0)
    config = TrainConfig(steps=1)
    before = {name: p.detach().clone() for name, p in model.lm.named_parameters()}
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def backward_at(_):
        loss = sum(p.sum() for p in model.lm.parameters())
        scaler.scale(loss).backward()
        model.lm.model.layers[0].mlp.up_proj.weight.grad[0, 0] = bad
        return loss.detach()

    parameters = list(model.lm.parameters())
    fit(parameters, make_optimizers(list(model.lm.named_parameters()), config), config, backward_at, scaler=scaler)
    assert all(torch.equal(p, before[name]) for name, p in model.lm.named_parameters())
    assert scaler.get_scale() == 2.0


def test_divergence_is_an_error_and_not_a_checkpoint():
    x = torch.nn.Parameter(torch.tensor([5.0]))
    config = OptimConfig(steps=3)
    with pytest.raises(MachineError, match="step 1 are not finite"):
        fit([x], make_optimizers([("x", x)], config), config, lambda _: backward(x.log().sum() * torch.inf))
    assert x.item() == 5.0


def test_overflows_without_end_are_not_the_scale_of_the_loss():
    """In fp16 the forward pass itself may overflow: then no scale helps, and nothing would ever be learnt."""
    x, scaler = torch.nn.Parameter(torch.tensor([5.0])), torch.amp.GradScaler("cpu")
    seen: list[Step] = []

    def backward_at(_):
        loss = (x * torch.inf).sum()
        scaler.scale(loss).backward()
        return loss.detach()

    config = OptimConfig(steps=100)
    with pytest.raises(MachineError, match="step 21 are not finite"):
        fit([x], make_optimizers([("x", x)], config), config, backward_at, scaler=scaler, after_step=seen.append)
    assert (len(seen), x.item()) == (20, 5.0)


# ---- time ------------------------------------------------------------------------------------------------------------


class FakeTime:
    """A clock that only steps move on."""

    def __init__(self):
        self.now_s = 0.0

    def pace(self, until_s, **settings):
        return Pace(lambda: self.now_s, until_s if callable(until_s) else lambda: until_s, **settings)

    def fit(self, lengths_s, pace, config):
        """The steps that are taken, of these lengths in turn, and how far in time each of them is."""
        x = torch.nn.Parameter(torch.tensor([5.0]))
        seen, behind = [], []

        def backward_at(_):
            behind.append(pace.behind)
            self.now_s += next(lengths_s)
            return backward(x.square().sum())

        fit([x], make_optimizers([("x", x)], config), config, backward_at, pace=pace, after_step=seen.append)
        return seen, behind


def lengths(first_s, longest_s=4.0):
    """Of the first step, of the longest of the others, and of any number of shorter ones."""
    yield first_s
    rng = np.random.default_rng(0)
    for k in itertools.count():
        yield longest_s * (rng.uniform(0.2, 1.0) if k % RECENT else 1.0)


def endless(schedule="linear", warmup=0.05):
    return OptimConfig(steps=1_000_000, schedule=schedule, warmup=warmup)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
@pytest.mark.parametrize("first_s", [0.0, 1.0, 200.0, 600.0])
def test_all_of_the_schedule_is_seen_however_long_the_first_step_takes(first_s, schedule):
    time = FakeTime()
    seen, behind = time.fit(lengths(first_s), time.pace(900.0), endless(schedule))
    rates = [step.rate for step in seen]
    assert rates[0] < 0.01 and rates[1] < 0.2
    assert max(rates) >= 0.95 and rates[-1] < 0.05
    assert behind == sorted(behind) and behind[-1] <= 1


@pytest.mark.parametrize("first_s", [0.0, 37.0, 600.0])
def test_no_step_ends_late_that_is_as_long_as_those_before(first_s):
    for until_s in np.linspace(610.0, 640.0, 8):
        time = FakeTime()
        seen, _ = time.fit(lengths(first_s, 10.0), time.pace(until_s, step_s=10.0), endless())
        assert time.now_s == seen[-1].elapsed_s <= until_s
        assert until_s - time.now_s < 10.0  # there was no room for another


def test_a_step_that_cannot_end_in_time_is_not_begun():
    for settings, steps in (({"first_s": 51.0}, 0), ({"first_s": 49.0, "step_s": 39.0}, 1), ({"first_s": 50.0}, 4)):
        time = FakeTime()
        seen, _ = time.fit(itertools.repeat(12.0), time.pace(50.0, **settings), endless())
        assert [step.step for step in seen] == list(range(1, steps + 1)), settings
        assert [(step.began_s, step.elapsed_s) for step in seen] == [(12.0 * k, 12.0 * (k + 1)) for k in range(steps)]


def test_one_long_step_is_forgotten():
    """The machine slept for a while: that says little about the steps after the next `RECENT`."""
    time = FakeTime()
    slow = itertools.chain([1.0] * 10, [300.0], itertools.repeat(1.0))
    time.fit(slow, time.pace(700.0), endless())
    assert time.now_s == 700.0


def test_the_schedule_never_goes_back_when_the_end_turns_out_shorter_or_longer():
    for later_s in (600.0, 1000.0):
        time = FakeTime()
        until_s = lambda: 800.0 if time.now_s < 400 else later_s  # noqa: E731, B023
        seen, behind = time.fit(lengths(100.0), time.pace(until_s), endless())
        assert behind == sorted(behind)
        assert later_s - 4.0 < time.now_s <= later_s
        assert seen[-1].rate < 0.05


@pytest.mark.parametrize("first_s", [0.0, 60.0])
def test_a_continued_run_goes_on_in_the_schedule(first_s):
    """Whatever its first step takes, which compiles once more."""
    time, config = FakeTime(), endless("linear", warmup=0.0)
    pace = time.pace(900.0)
    before, far = time.fit(itertools.islice(lengths(100.0), 200), pace, config.model_copy(update={"steps": 200}))
    counted_s = time.now_s - pace.counted_from_s
    after, further = time.fit(lengths(first_s), time.pace(900.0, counted_s=counted_s), config)
    behind = far + further
    assert behind == sorted(behind)
    lost = first_s / (900.0 - before[-1].elapsed_s)  # of what was left
    assert further[1] - far[-1] <= lost * (1 - far[-1]) + 0.01
    assert after[-1].rate < 0.01


def test_a_run_that_ended_by_the_clock_goes_on_with_more_time():
    """The schedule is then that of the longer run, where that would stand."""
    time, config = FakeTime(), endless("linear", warmup=0.0)
    pace = time.pace(500.0)
    before, _ = time.fit(lengths(0.0), pace, config)
    assert before[-1].rate < 0.01
    counted_s = time.now_s - pace.counted_from_s
    after, _ = time.fit(lengths(0.0), time.pace(1000.0, counted_s=counted_s), config)
    assert after[0].rate == pytest.approx(0.5, abs=0.01) and after[-1].rate < 0.01


def test_steps_bound_a_run_that_has_more_time_than_they_take():
    time, config = FakeTime(), OptimConfig(steps=100, schedule="linear", warmup=0.0)
    seen, _ = time.fit(itertools.repeat(1.0), time.pace(1e6), config)
    assert [step.rate for step in seen] == pytest.approx([step_rate(k / 100, config) for k in range(100)])


def test_a_stage_without_time_takes_no_step():
    for until_s in (0.0, -1.0):
        time = FakeTime()
        assert time.fit(itertools.repeat(1.0), time.pace(until_s), endless()) == ([], [])


# ---- optimizers and stages -------------------------------------------------------------------------------------------


def test_muon_is_for_hidden_matrices():
    model = new_model(TOY, FormatConfig(), seed=0)
    muon, adamw = make_optimizers(list(model.lm.named_parameters()), TrainConfig())
    hidden = sum(len(g["params"]) for g in muon.param_groups)
    assert hidden == TOY.layers * 7
    assert hidden + sum(len(g["params"]) for g in adamw.param_groups) == len(list(model.lm.parameters()))
    assert all(g["weight_decay"] == 0 for g in adamw.param_groups if g["params"][0].ndim < 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_muon_multiplies_what_the_hardware_does(dtype, monkeypatch):
    monkeypatch.setattr("arc_solver.training.optimize.fast_dtype", lambda device: dtype)
    muon, _ = make_optimizers(list(new_model(TOY, FormatConfig(), seed=0).lm.named_parameters()), TrainConfig())
    assert isinstance(muon, torch.optim.Muon) and isinstance(muon, Float32Muon) == (dtype == torch.float32)


@pytest.mark.parametrize("shape", [(24, 24), (24, 56), (56, 24)])
def test_muon_moves_singular_values_and_keeps_their_vectors(shape):
    """Where the polynomial takes a singular value is known, and whether it is that of a tall matrix does not matter."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, values, v = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    values /= np.sqrt(np.sum(values**2))
    for _ in range(5):
        values = 3.4 * values - 4.8 * values**3 + 2.1 * values**5
    found = orthogonalized(matrix, (3.4, -4.8, 2.1), 5, 1e-7)
    assert np.allclose(found.numpy(), u * values @ v, atol=1e-5)
    assert found.dtype == torch.float32 and not orthogonalized(torch.zeros(shape), (3.4, -4.8, 2.1), 5, 1e-7).any()


@pytest.mark.parametrize("shape", [(24, 56), (56, 24)])
def test_muon_in_float32_does_what_that_of_pytorch_does(shape):
    """They differ by the rounding of bfloat16, a 256th of what a step does; and go on from each other's state."""
    rng = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=rng)
    grads = [torch.randn(shape, generator=rng) for _ in range(4)]
    ends = []
    for kinds in ((torch.optim.Muon,) * 2, (Float32Muon,) * 2, (torch.optim.Muon, Float32Muon)):
        weight, state = torch.nn.Parameter(start.clone()), None
        for kind, part in zip(kinds, (grads[:2], grads[2:]), strict=True):
            muon = kind([weight], lr=0.1, weight_decay=0.5)
            if state:
                muon.load_state_dict(state)
            for grad in part:
                weight.grad = grad.clone()
                muon.step()
            state = muon.state_dict()
        ends.append(weight.detach())
    moved = (ends[0] - start).norm()
    assert all((end - ends[0]).norm() < 0.02 * moved for end in ends[1:])


def test_a_stage_is_what_its_sections_say_with_its_own_settings_on_top(tmp_path):
    file = tmp_path / "stages.toml"
    file.write_text(
        "[train]\nsteps = 7\nlr = 0.5\nkeep_before_decay = true\n[corpus]\nmax_tokens = 99\n"
        '[[stages]]\nname = "a"\ntrain.steps = 3\n'
        '[[stages]]\nname = "b"\nstart = "weights+optimizer"\ncorpus.pairs = [2, 2]\n'
        '[[stages.corpus.sources]]\nkind = "counting"\n'
    )
    a, b = load_config(file).stages
    assert isinstance(a, StageConfig)
    assert (a.train.steps, a.train.lr, a.start) == (3, 0.5, "weights")
    assert (b.train.steps, b.corpus.max_tokens, b.corpus.pairs, b.start) == (7, 99, (2, 2), "weights+optimizer")
    assert [s.kind for s in b.corpus.sources] == ["counting"]
    assert load_config(file, ["stages.1.start=weights"]).stages[1].start == "weights"  # one line answers the question
    assert load_config(file, ["train.lr=0.25"]).stages[0].train.lr == 0.25
    for override, message in (
        ("stages.2.start=weights", "there is no stages.2 in the config file, which has stages.0 and stages.1"),
        ("stages.name=x", "say which one"),
        ('stages.1.name="a"', "same name"),
        ("stages.1.train.optimizer=adamw", "starts from the optimizer of 'a', which is muon"),
        ("stages.1.train.precision=fp16", r"train\.precision is one for all stages"),
        ("stages.1.start=moments", r"stages\.1\.start"),
        ("train.schedule=cosine", r"train\.keep_before_decay is for"),
        ("stages.1.train.step=3", r"did you mean stages\.1\.train\.steps\?"),
    ):
        with pytest.raises(UserError, match=message):
            load_config(file, [override])


def test_sources_of_two_stages_that_have_one_name_are_one_source():
    """What became of their samples is counted together, and a model card has one licence and one digest for them."""
    sources = [SourceConfig(kind=kind, name="mine").model_dump() for kind in ("counting", "re-arc")]
    stages = [{"name": source["kind"], "corpus": {"sources": [source]}} for source in sources]
    with pytest.raises(ValueError, match="sources of two stages have the name 'mine' and are not the same"):
        Config.model_validate({"stages": stages})
    stages[1]["corpus"] = stages[0]["corpus"]
    assert Config.model_validate({"stages": stages})


@pytest.mark.parametrize("text", ["stages = 3", "train = 3", '[[stages]]\nname = "a"\ntrain = 3'])
def test_what_is_no_section_is_one_sentence(text, tmp_path):
    file = tmp_path / "odd.toml"
    file.write_text(text)
    with pytest.raises(UserError, match=r"(stages|train) \(config .*odd\.toml\)"):
        load_config(file)
