import subprocess
import sys
from pathlib import Path

import pytest

from arc_solver.config import Config, load_config
from arc_solver.errors import UserError
from arc_solver.rng import named_rng

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.toml"))
assert CONFIGS


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_every_config_parses(file):
    assert load_config(file) != Config()


def test_overrides():
    config = load_config(None, ["adapt.lr=0.5", "model.path=runs/mine", 'tasks.ids=["a","b"]', "adapt.enabled=false"])
    assert (config.adapt.lr, config.model.path, config.tasks.ids) == (0.5, "runs/mine", ("a", "b"))
    assert not config.adapt.enabled
    assert load_config(None) == Config()
    assert load_config(None, ["model.path=2026"]).model.path == "2026"  # a folder may be called so


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("adapt.typo=1", "unknown setting adapt.typo"),
        ("typo.lr=1", "unknown setting typo"),
        ("adapt.lr=-1", "adapt.lr"),
        ("adapt.lr=inf", "adapt.lr"),
        ("adapt.betas=[2.0, 0.5]", "adapt.betas"),
        ("adapt.optimizer=muon", "adapt.optimizer"),
        ("model.kv_heads=3", "no multiple of model.kv_heads=3"),
        ("adapt.steps=many", "adapt.steps: should be a whole number, got 'many'"),
        ("adapt.steps=1.5", r"adapt.steps: should be a whole number, got 1\.5"),
        ("adapt.enabled=perhaps", "adapt.enabled: should be true or false, got 'perhaps'"),
        ("adapt.stepz=9", "unknown setting adapt.stepz; did you mean adapt.steps"),
        ("adpt.steps=9", "unknown setting adpt; did you mean adapt"),
        ("kaggle.name=My_Solver", "lower-case letters and digits, with single hyphens between.*got 'My_Solver'"),
        ("adapt.targets=q_proj", r"""give a list, such as 'adapt.targets=\["q_proj"\]'"""),
        ("run.time_budget=60", "'60' is no duration: write it as"),
        ("corpus.difficulty=[0.5, 0.1]", "corpus"),
        ("seed=1", "did you mean run.seed=1 or model.seed=1 or validation.seed=1?"),
        ("sede=1", "section.key=value"),
        ("run.seed", "section.key=value"),
    ],
)
def test_bad_settings_are_named(word, said):
    with pytest.raises(UserError, match=said):
        load_config(None, [word])


def test_the_smallest_and_a_sample_contradict_each_other():
    with pytest.raises(UserError, match=r"--limit 5\) takes.*--sample 3\) draws.*leave one of them out"):
        load_config(None, ["tasks.limit=5", "tasks.sample=3"])


def test_bad_files_are_named(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_config(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("[adapt\n")
    with pytest.raises(UserError, match="TOML"):
        load_config(tmp_path / "bad.toml")


def test_a_config_file_is_not_blamed_for_a_word_on_the_command_line(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('[adapt]\nsteps = 5\n[vote]\nrule = "votes"\n')
    for word in ("adapt.steps=many", "vote.rule=kgmon", "adapt.lr=-1", "adapt.nothing=1", "model.heads=3"):
        with pytest.raises(UserError) as caught:
            load_config(file, [word])
        assert "c.toml" not in str(caught.value)
    file.write_text("[adapt]\nsteps = -5\n")
    for words in ([], ["vote.rule=votes"]):
        with pytest.raises(UserError, match=r"adapt.steps \(config .*c.toml\): should be greater than 0"):
            load_config(file, words)


def test_named_rng_is_the_same_in_every_process():
    here = named_rng(3, "task", "adapt").integers(2**60)
    code = "from arc_solver.rng import named_rng; print(named_rng(3, 'task', 'adapt').integers(2**60))"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(there) == here
    others = {int(named_rng(*key).integers(2**60)) for key in ((4, "task", "adapt"), (3, "task"), (3, "taskadapt"))}
    assert len(others | {int(here)}) == 4


def test_a_setting_in_the_place_of_the_config_is_no_file_that_is_missing():
    with pytest.raises(UserError, match=r"'train\.steps=3' is a setting, and a config file comes first"):
        load_config("train.steps=3")


def test_all_stages_can_be_given_as_one_word():
    word = 'stages=[{name="a", train={steps=3}}, {name="b", start="weights+optimizer"}]'
    config = load_config(None, ["train.steps=7", word, "stages.1.train.lr=0.5"])
    assert [(stage.name, stage.train.steps) for stage in config.stages] == [("a", 3), ("b", 7)]
    assert config.stages[1].train.lr == 0.5
    with pytest.raises(UserError, match="train=3"):
        load_config(None, ["train=3"])
