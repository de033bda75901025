"""A study's file: what is read, and what is refused before anything runs."""

from pathlib import Path

import pytest

from arc_solver.errors import UserError
from arc_solver.studies.study import METRICS, read_study

HEAD = 'question = "q?"\nhypothesis = "h"\nmetrics = ["validation_loss", "pass@2"]\n'
ARMS = '[[arms]]\nname = "a"\n[[arms]]\nname = "b"\nset = ["train.steps=7"]\n'


def written(tmp_path, text: str):
    file = tmp_path / "mine.toml"
    file.write_text(text)
    return file


def test_settings_come_from_the_base_the_study_the_arm_and_the_command_line(tmp_path):
    (tmp_path / "base.toml").write_text("[train]\nsteps = 1\nlr = 0.5\n[adapt]\nsteps = 3\n")
    text = f'{HEAD}config = "base.toml"\nset = ["train.lr=0.25"]\n{ARMS}'
    found = read_study(written(tmp_path, text), ["adapt.steps=9"])
    first, second = (found.config(arm, 5) for arm in found.study.arms)
    assert found.name == "mine" and (first.train.steps, second.train.steps) == (1, 7)
    assert first.train.lr == second.train.lr == 0.25 and first.adapt.steps == 9
    assert first.run.seed == 5 and found.study.decides == "validation_loss" and found.study.solves


def test_seeds_may_be_of_a_part_of_the_randomness(tmp_path):
    text = f'{HEAD}kind = "spread"\n[[arms]]\nname = "weights"\nvary = ["model.seed"]\n'
    found = read_study(written(tmp_path, text), seeds=4)
    config = found.config(found.study.arms[0], 3)
    assert found.study.seeds == 4 and (config.run.seed, config.model.seed) == (0, 3)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (HEAD, "arms: is missing: give it"),
        (HEAD + '[[arms]]\nname = "a"\n', "give at least two arms"),
        (HEAD + ARMS.replace('"b"', '"a"'), "two arms are named 'a'"),
        (HEAD + ARMS.replace("steps=7", "stepz=7"), "arm 'b': unknown setting train.stepz"),
        (HEAD + ARMS + "sets = 1\n", r"arm 2, sets: there is no such key; did you mean set\?"),
        ("sedes = 3\n" + HEAD + ARMS, r"sedes: there is no such key; did you mean seeds\?"),
        (HEAD + ARMS.replace('name = "b"\n', ""), "arm 2, name: is missing: give it"),
        ("train = false\n" + HEAD + ARMS, "validation_loss is measured in training, and train is false"),
        ('kind = "scaling"\n' + HEAD + ARMS, "needs x in each arm, and 'a' has none"),
        (HEAD.replace("pass@2", "pass@9") + ARMS, "metrics, entry 2: should be 'validation_loss'.*, got 'pass@9'"),
        (HEAD.replace("pass@2", "validation_loss") + ARMS, "metrics has validation_loss twice: leave one out"),
        (
            HEAD.replace("pass@2", "accuracy") + ARMS,
            "accuracy is measured where validation.accuracy_every says: set it",
        ),
        (HEAD.replace("hypothesis", "hypotesis") + ARMS, r"hypotesis: there is no such key; did you mean hypothesis\?"),
        (HEAD.replace("q?", r"q?\nr?") + ARMS, "question: give one line"),
        (HEAD + ARMS.replace('"b"', '"b/c"'), "arm 2, name: .* without / "),
        (HEAD + ARMS.replace('"b"', r'"b\u0000"'), "arm 2, name: .* without / "),
        (HEAD + ARMS.replace('"b"', f'"{"b" * 81}"'), "arm 2, name: give a shorter one"),
        (HEAD + ARMS.replace('["train.steps=7"]', '"train.steps=7"'), "arm 2, set: give a list, such as"),
        (HEAD + ARMS.replace('=7"', '=7", "train.steps=8"'), "arm 'b': set has train.steps twice: leave one out"),
        (
            HEAD + ARMS.replace("train.steps=7", "run.seed=7"),
            "the seeds of arm 'b' are of run.seed: leave it out of set",
        ),
        (HEAD + 'set = ["run.seed=7"]\n' + ARMS, "the seeds of arm 'a' are of run.seed: leave it out of set"),
        (HEAD + 'set = ["run.smoke=5"]\n' + ARMS, "run.smoke is not for a study"),
        (
            HEAD + ARMS.replace("=7", '=7", "train.optimizer=adamw", "lora.enabled=true", "lora.save=adapter'),
            "arm 'b': .* set lora.save to both",
        ),
        (HEAD + 'set = ["adapt.start=pretrained"]\n' + ARMS, "arm 'a': adapt.start=pretrained continues the adapter"),
        (HEAD + ARMS + "x = 3\n", "arm 'b' has x, which is for a study of scaling: leave it out"),
        (HEAD + ARMS.replace("train.steps=7", "tasks.limit=7"), "arm 'b' has other tasks.* settings than 'a'"),
        (HEAD + ARMS.replace("train.steps=7", "validation.seed=7"), "arm 'b' has other validation.* settings than 'a'"),
        (
            HEAD + ARMS.replace("train.steps=7", "format.row_numbers=true"),
            "arm 'b' has other format.* settings than 'a'",
        ),
        (HEAD + 'config = "none.toml"\n' + ARMS, "does not exist"),
        ("question =", "is no TOML"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(tmp_path, text, said):
    with pytest.raises(UserError, match=said):
        read_study(written(tmp_path, text))


def test_a_study_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"cannot be read .* see configs/studies/"):
        read_study(tmp_path / "none.toml")


def test_shares_are_better_when_more_and_losses_when_less():
    assert {name: metric.sign for name, metric in METRICS.items() if metric.sign < 0} == {"validation_loss": -1}
    share, loss = METRICS["pass@2"], METRICS["validation_loss"]
    assert (share.says(0.125), share.says(0.125, signed=True), loss.says(1.0)) == ("12.5%", "+12.5", "1.0000")


@pytest.mark.parametrize("file", sorted(Path("configs/studies").glob("*.toml")), ids=lambda file: file.stem)
def test_the_studies_that_ship_are_read(file):
    if file.stem != "small":  # which they share
        assert read_study(file).study.hypothesis


def test_what_is_measured_is_audited_before_anything_is_trained(tmp_path):
    text = HEAD + 'set = ["tasks.spec=demo"]\n' + ARMS
    found = read_study(written(tmp_path, text))
    assert found.config(found.study.arms[0], 0).audit.scored_on == ("arc-agi-1/evaluation", "demo")
    found = read_study(written(tmp_path, f"seen = true\n{text}"))
    assert found.config(found.study.arms[0], 0).audit.scored_on == ("arc-agi-1/evaluation",)


def test_an_arm_and_the_command_line_do_not_both_set_a_thing(tmp_path):
    with pytest.raises(UserError, match=r"arm 'b' sets train\.steps itself: leave train\.steps=9 out"):
        read_study(written(tmp_path, HEAD + ARMS), ["train.steps=9"])


def test_a_seed_on_the_command_line_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"the seeds of arm 'a' are of run\.seed: leave run\.seed=3 out; --seeds says"):
        read_study(written(tmp_path, HEAD + ARMS), ["run.seed=3"])


def test_formats_may_be_compared_by_what_is_solved(tmp_path):
    text = HEAD.replace('"validation_loss", ', "") + ARMS.replace("train.steps=7", "format.row_numbers=true")
    assert read_study(written(tmp_path, text)).study.decides == "pass@2"
