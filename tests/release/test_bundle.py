"""What travels to Kaggle: the same bytes for the same inputs, and all of it in the manifest."""

import ast
import hashlib
import json
import os
import re
import shutil
import zipfile
from pathlib import Path

import pytest
from toys import TOY

from arc_solver.config import PACKAGE_DIR, FormatConfig, load_config
from arc_solver.data.leaks import NOTHING
from arc_solver.errors import UserError
from arc_solver.models.model import new_model, save_model
from arc_solver.release.bundle import CHECKOUT, Release, build, dataset_content

CPU = CHECKOUT / "configs" / "kaggle-cpu.toml"


def ignore(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def releases(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("releases")


@pytest.fixture(scope="module")
def release(releases) -> Release:
    return build(load_config(CPU), releases, ignore)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    save_model(new_model(TOY, FormatConfig(), seed=1, trained_on=NOTHING), folder)
    (folder / "optimizers.pt").write_text("not for Kaggle")
    return folder


def files(folder: Path) -> dict[str, bytes]:
    found = (file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in found}


def test_the_same_inputs_give_the_same_bytes(release, tmp_path):
    """Elsewhere, at another time, by somebody with other habits."""
    mask = os.umask(0o077)
    try:
        again = build(load_config(CPU), tmp_path, ignore)
    finally:
        os.umask(mask)
    assert again.folder.name == release.folder.name
    assert files(again.folder) == files(release.folder)


def test_what_is_built_is_not_built_again(release, releases):
    said: list[str] = []
    assert build(load_config(CPU), releases, said.append).folder == release.folder
    assert any("built already" in line for line in said)
    assert [path.name for path in releases.iterdir() if path.name.startswith(".part")] == []


def test_another_config_is_another_content(release, releases):
    other = build(load_config(CPU, ["kaggle.time_budget=9h"]), releases, ignore)
    assert other.content != release.content
    assert other.manifest["time_budget_s"] == 9 * 3600


def test_every_file_is_in_the_manifest_and_in_the_sums(release):
    data = files(release.folder / "datasets")
    travelling = {n: text for n, text in data.items() if not n.endswith(("/manifest.json", "/dataset-metadata.json"))}
    assert release.manifest["files"] == {n: hashlib.sha256(text).hexdigest() for n, text in travelling.items()}
    lines = (release.folder / "SHA256SUMS").read_text().splitlines()
    sums = {name: digest for digest, name in (line.split("  ") for line in lines)}
    everything = files(release.folder)
    del everything["SHA256SUMS"]
    assert sums == {name: hashlib.sha256(text).hexdigest() for name, text in everything.items()}


def test_our_wheel_has_the_package_and_nothing_else(release):
    (wheel,) = release.folder.glob("datasets/*/arc_solver-*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    here = {
        f"arc_solver/{path.relative_to(PACKAGE_DIR).as_posix()}" for path in PACKAGE_DIR.rglob("*") if path.is_file()
    }
    assert names == {name for name in here if "__pycache__" not in name}


def test_pip_is_told_the_hash_of_every_wheel(release):
    (lock,) = release.folder.glob("datasets/*/requirements.lock")
    hashes = set(re.findall(r"--hash=sha256:(\w+)", lock.read_text()))
    assert hashes == {hashlib.sha256(wheel.read_bytes()).hexdigest() for wheel in lock.parent.glob("*.whl")}
    assert "arc_solver" in lock.read_text()


def test_the_notebook_is_five_cells_without_functions(release):
    cells = [cell for cell in json.loads(release.source)["cells"] if cell["cell_type"] == "code"]
    assert len(cells) == 5
    for cell in cells:
        kinds = {type(node) for node in ast.walk(ast.parse(cell["source"]))}
        assert not kinds & {ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef}
        assert "!" not in {line[:1] for line in cell["source"].splitlines()}  # a failing !command goes unnoticed
    assert release.content in release.source


def test_it_is_private_and_without_internet_unless_asked(release, releases):
    assert (release.notebook["is_private"], release.notebook["enable_internet"]) == (True, False)
    open_one = build(load_config(CPU, ["kaggle.public=true", "kaggle.internet=true"]), releases, ignore)
    assert (open_one.notebook["is_private"], open_one.notebook["enable_internet"]) == (False, True)


def test_weights_travel_apart_and_without_training_state(checkpoint, release, releases):
    """So a change of the code does not send them again."""
    one, two = (
        build(load_config(CPU, [f"model.path={checkpoint}", f"run.seed={seed}"]), releases, ignore) for seed in (0, 1)
    )
    weights = [each.folder / "datasets" / "arc-solver-cpu-weights" for each in (one, two)]
    assert one.content != two.content
    assert dataset_content(weights[0]) == dataset_content(weights[1])
    names = {file.name for file in weights[0].iterdir()}
    assert {"config.json", "model.safetensors", "dataset-metadata.json"} <= names
    assert "optimizers.pt" not in names
    assert one.manifest["weights"] == "arc-solver-cpu-weights"
    assert release.manifest["weights"] == ""
    settings = one.folder / "datasets" / "arc-solver-cpu-wheels" / "config.json"
    assert json.loads(settings.read_text())["model"]["path"] == ""


def test_a_model_that_is_no_folder_is_one_sentence(releases):
    with pytest.raises(UserError, match=r"names on the Hugging Face hub are for bin/train alone"):
        build(load_config(CPU, ["model.path=Qwen/Qwen2.5-0.5B"]), releases, ignore)
    assert not list(releases.glob(".part-*"))


def test_what_bin_solve_would_refuse_is_not_built(releases, tmp_path, checkpoint):
    foreign = tmp_path / "foreign"
    shutil.copytree(checkpoint, foreign)
    about = json.loads((foreign / "config.json").read_text())
    (foreign / "config.json").write_text(json.dumps({k: v for k, v in about.items() if k != "arc_format"}))
    with pytest.raises(UserError, match="a vocabulary of its own"):
        build(load_config(CPU, [f"model.path={foreign}"]), releases, ignore)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    with pytest.raises(UserError, match="adapter"):
        build(load_config(CPU, [f"model.path={checkpoint}", f"model.adapter={tmp_path / 'adapter'}"]), releases, ignore)


@pytest.mark.parametrize("name", ["kaggle-cpu", "kaggle-t4", "kaggle-2026"])
def test_the_configs_are_as_they_should(name):
    config = load_config(CHECKOUT / "configs" / f"{name}.toml")
    assert not config.kaggle.internet
    assert not config.kaggle.public
    if config.kaggle.machine == "NvidiaTeslaT4":
        assert config.engine.kind == "torch"
    if config.kaggle.machine:
        assert config.run.executor == "ray"
