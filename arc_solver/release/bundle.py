"""What travels to Kaggle, built: wheels, weights, a notebook, and the manifest that says what they are.

    runs/submit/<name>-<content>/datasets/<name>-wheels/    our wheel, those that the image lacks, config.json,
                                                            requirements.lock, manifest.json
                                          <name>-weights/   the checkpoint, unless it is the bundled one
                                          <name>-adapter/   the LoRA adapter, if there is one
                                 kernel/                    main.ipynb, kernel-metadata.json
                                 SHA256SUMS                 of all of that
                                 state.json                 what became of it: see `submit.py`

The content of a release is the hash of its manifest, which has the hash of every file; the notebook has the content in
it, and looks at all files before it uses one. The same commit and config give the same bytes.
"""

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .. import __version__
from ..clock import duration_s
from ..command import Say
from ..config import MACHINES, PACKAGE_DIR, Config, TasksConfig
from ..errors import MachineError, UserError, first_line
from ..files import git_commit, sha256, write_json
from ..puzzles import read_json
from ..waiting import Wait, waiting
from .image import KAGGLE_DIR, download, read_image, run_pip

CHECKOUT = PACKAGE_DIR.parent
NOBODY = "your-account"  # stands for the owner until one is known
EPOCH = "315532800"  # the time of all files in our wheel, 1980-01-01: the first that a zip archive can say
PARTS = ("datasets", "kernel", "SHA256SUMS")  # of a release: what `build` makes
NOT_DATA = ("dataset-metadata.json",)  # is for Kaggle, and is not among the files of the dataset


@dataclass(frozen=True)
class Release:
    """A folder that `build` made."""

    folder: Path

    @cached_property
    def content(self) -> str:
        """What it is, as a hash."""
        return sha256(self._manifest)

    @cached_property
    def manifest(self) -> dict[str, Any]:
        return read_json(self._manifest)

    @property
    def _manifest(self) -> Path:
        found = next(self.folder.glob("datasets/*/manifest.json"), None)
        if not found:
            raise UserError(f"{self.folder} has no manifest.json any more: build it again from its config")
        return found

    @cached_property
    def notebook(self) -> dict[str, Any]:
        """The content of kernel-metadata.json."""
        return read_json(self.folder / "kernel" / "kernel-metadata.json")

    @property
    def source(self) -> str:
        """The notebook, as it is uploaded."""
        return (self.folder / "kernel" / self.notebook["code_file"]).read_text()

    @property
    def competition(self) -> str:
        return self.notebook["competition_sources"][0]

    @property
    def datasets(self) -> list[Path]:
        return sorted((self.folder / "datasets").iterdir())


def build(config: Config, releases: Path, say: Say) -> Release:
    """The release of a config; one that was built before is not built again.

    Args:
        releases: the folder that it is put into.

    Raises:
        UserError: there is no checkout to build from, or the checkpoint is no folder with weights.
        MachineError: pip failed, or the disk is full.
    """
    if not (CHECKOUT / "pyproject.toml").is_file():
        raise UserError("an installed wheel cannot build a release: clone the project, and call ./bin/submit there")
    try:
        releases.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=releases, prefix=".part-") as name:
            release = _make(config, Path(name) / "release", releases / ".wheels", say)
            folder = releases / f"{config.kaggle.name}-{release.content[:12]}"
            if not folder.exists():
                release.folder.rename(folder)
                say(f"built {folder}")
            elif _is_whole(folder, (release.folder / "SHA256SUMS").read_text()):
                say(f"{folder} is built already")
            else:
                for part in PARTS:
                    _replace(folder / part, release.folder / part)
                say(f"{folder} was changed since, and is built again")
    except OSError as error:
        raise MachineError(f"{releases} cannot be written: {first_line(error)}") from None
    return Release(folder)


def _is_whole(folder: Path, sums: str) -> bool:
    file = folder / "SHA256SUMS"
    return file.is_file() and file.read_text() == sums == _sums(folder)


def _sums(release: Path) -> str:
    """The content of SHA256SUMS: of what travels, and not of what rehearsals and runs left beside it."""
    found = ((f"{part}/{name}", digest) for part in ("datasets", "kernel") for name, digest in _hashes(release / part))
    return "".join(f"{digest}  {name}\n" for name, digest in found)


def _replace(old: Path, new: Path) -> None:
    if old.is_dir():
        shutil.rmtree(old)
    new.rename(old)


def _make(config: Config, folder: Path, cache: Path, say: Say) -> Release:
    _require_usable(config)
    kaggle = config.kaggle
    owner, slugs = kaggle.owner or NOBODY, {"wheels": f"{kaggle.name}-wheels"}
    wheels = folder / "datasets" / slugs["wheels"]
    wheels.mkdir(parents=True)
    _collect_wheels(KAGGLE_DIR / f"requirements{'-vllm' * kaggle.vllm}.txt", wheels, cache, say)
    for part, key, names in (("weights", "path", _WEIGHTS), ("adapter", "adapter", _ADAPTER)):
        if path := getattr(config.model, key):
            slugs[part] = f"{kaggle.name}-{part}"
            with waiting(say, f"copying model.{key}={path}"):
                _copy_weights(Path(path), folder / "datasets" / slugs[part], names, f"model.{key}")
    there = config.model_copy(update={"tasks": TasksConfig(), "model": config.model.model_copy(update=_NOWHERE)})
    write_json(wheels / "config.json", there.model_dump(mode="json", exclude={"kaggle"}))
    source = (KAGGLE_DIR / "notebook.py").read_text()
    with waiting(say, "hashing what travels"):
        files = dict(_hashes(folder / "datasets"))
    manifest = {
        "commit": git_commit(),
        "versions": {"arc_solver": __version__, **dict(sorted(map(_name_and_version, wheels.glob("*.whl"))))},
        "config": config.model_dump(mode="json"),
        "torch": read_image()["torch"].base_version if kaggle.vllm else "",  # the only one that vLLM's wheels go with
        "gpus": MACHINES[kaggle.machine],
        "time_budget_s": duration_s(kaggle.time_budget),
        "smoke_budget_s": duration_s(kaggle.smoke_budget),
        "smoke_tasks": kaggle.smoke_tasks,
        "weights": slugs.get("weights", ""),
        "adapter": slugs.get("adapter", ""),
        "notebook": hashlib.sha256(source.encode()).hexdigest(),
        "files": files,
    }
    write_json(wheels / "manifest.json", manifest)
    for slug in slugs.values():
        about = {"title": _title(slug), "id": f"{owner}/{slug}", "licenses": [{"name": kaggle.licence}]}
        write_json(folder / "datasets" / slug / "dataset-metadata.json", about)
    facts = {
        "content": sha256(wheels / "manifest.json"),
        "datasets": list(slugs.values()),
        "competition": kaggle.competition,
    }
    (folder / "kernel").mkdir()
    write_json(folder / "kernel" / "main.ipynb", _notebook(source, facts))
    about = _notebook_metadata(config, [f"{owner}/{slug}" for slug in slugs.values()])
    write_json(folder / "kernel" / "kernel-metadata.json", about)
    (folder / "SHA256SUMS").write_text(_sums(folder))
    return Release(folder)


# What a checkpoint and an adapter are made of, and no training state beside them.
_WEIGHTS = r".*\.(safetensors|json|jinja|model|txt)"
_ADAPTER = r"adapter_config\.json|adapter_model\.safetensors|training_data\.json"
_NOWHERE = {"path": "", "adapter": ""}  # where they are there, the notebook finds out


def _require_usable(config: Config) -> None:
    """Refuses a model or an adapter that bin/solve would refuse there, before anything is fetched for it."""
    from ..models import check_adapter, require_ours  # here, as they import PyTorch

    if config.model.path:
        require_ours(Path(config.model.path))
    if config.model.adapter:
        check_adapter(Path(config.model.adapter))


def _copy_weights(source: Path, folder: Path, names: str, setting: str) -> None:
    if not any(source.glob("*.safetensors")):
        raise UserError(
            f"there are no weights in {setting}={source}: make them with bin/train CONFIG --out DIR, or set {setting}"
            " to what bin/train made"
        )
    folder.mkdir()
    for file in sorted(source.iterdir()):
        if file.is_file() and re.fullmatch(names, file.name):
            shutil.copyfile(file, folder / file.name)


def _collect_wheels(lock: Path, folder: Path, cache: Path, say: Say) -> None:
    """The locked wheels and our own, and the list by which pip installs exactly those."""
    for make, source in ((partial(download, lock), lock.read_bytes()), (_own_wheel, _own_source())):
        kept = cache / hashlib.sha256(source).hexdigest()[:16]
        if not kept.exists():
            what = f"getting the wheels of {lock.name}" if make is not _own_wheel else "building our wheel"
            say(what)
            kept.parent.mkdir(exist_ok=True)
            with TemporaryDirectory(dir=cache) as name, waiting(say, what) as wait:
                make(Path(name) / "wheels", wait)
                (Path(name) / "wheels").rename(kept)
        for file in sorted(kept.iterdir()):
            shutil.copyfile(file, folder / file.name)
    (own,) = folder.glob("arc_solver-*.whl")
    line = f"arc_solver=={__version__} --hash=sha256:{sha256(own)}\n"
    (folder / "requirements.lock").write_text(lock.read_text().rstrip("\n") + "\n" + line)


_OURS = ("pyproject.toml", "README.md", "LICENSE")  # what a wheel is built of, besides the package


def _own_source() -> bytes:
    """What tells our wheel from another one."""
    package = (line for line in _hashes(PACKAGE_DIR) if "__pycache__" not in line[0])
    return json.dumps([*package, *((name, sha256(CHECKOUT / name)) for name in _OURS)]).encode()


def _own_wheel(folder: Path, wait: Wait) -> None:
    """The package as a wheel, of nothing but what the checkout has, with the same bytes for the same code."""
    with TemporaryDirectory() as name:
        source = Path(name)
        shutil.copytree(PACKAGE_DIR, source / PACKAGE_DIR.name, ignore=shutil.ignore_patterns("__pycache__"))
        for file in _OURS:
            shutil.copyfile(CHECKOUT / file, source / file)
        for path in source.rglob("*"):  # a wheel keeps modes, which depend on who cloned
            path.chmod(0o755 if path.is_dir() else 0o644)
        pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--disable-pip-version-check"]
        env = {**os.environ, "SOURCE_DATE_EPOCH": EPOCH}
        done = run_pip([*pip, "-w", str(folder), name], wait, env=env, umask=0o022)
        if done.returncode:
            raise MachineError(f"our wheel could not be built; pip said: {done.stderr.strip()[-1000:]}")


def _notebook(source: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """A notebook of what stands between the `# %%` lines; what the release is, is put where its source has {}."""
    empty = 'json.loads("{}")'
    assert source.count(empty) == 1, "the notebook's source has one place for what the release is"
    source = source.replace(empty, f"json.loads({json.dumps(json.dumps(facts))})")
    cells: list[dict[str, Any]] = []
    for i, part in enumerate(re.split(r"^# %%", source, flags=re.MULTILINE)[1:]):
        head, _, text = part.partition("\n")
        about = {"id": f"cell-{i}", "metadata": {}}
        if "[markdown]" in head:
            prose = re.sub(r"^# ?", "", text.strip(), flags=re.MULTILINE)
            cells.append({**about, "cell_type": "markdown", "source": prose})
        else:
            code: dict[str, Any] = {"execution_count": None, "outputs": [], "source": text.strip()}
            cells.append({**about, "cell_type": "code", **code})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def _notebook_metadata(config: Config, datasets: list[str]) -> dict[str, Any]:
    kaggle = config.kaggle
    image = {"docker_image": kaggle.image, "docker_image_pinning_type": "original"} if kaggle.image else {}
    machine = {"machine_shape": kaggle.machine} if kaggle.machine else {}
    return {
        "id": f"{kaggle.owner or NOBODY}/{kaggle.name}",
        "title": _title(kaggle.name),
        "code_file": "main.ipynb",
        "language": "python",
        "kernel_type": "notebook",
        "is_private": not kaggle.public,
        "enable_gpu": bool(kaggle.machine),
        "enable_tpu": False,
        "enable_internet": kaggle.internet,
        "dataset_sources": datasets,
        "competition_sources": [kaggle.competition],
        "kernel_sources": [],
        "model_sources": [],
        "keywords": [],
        **machine,
        **image,
    }


def dataset_content(folder: Path) -> str:
    """What a dataset is, as a hash; its metadata apart."""
    lines = "".join(f"{digest}  {name}\n" for name, digest in _hashes(folder) if name not in NOT_DATA)
    return hashlib.sha256(lines.encode()).hexdigest()


def _hashes(folder: Path) -> Iterator[tuple[str, str]]:
    """Name, relative to the folder, and SHA-256 of all files in it."""
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            yield file.relative_to(folder).as_posix(), sha256(file)


def _name_and_version(wheel: Path) -> tuple[str, str]:
    name, version, *_ = wheel.name.split("-")
    return name, version


def _title(slug: str) -> str:
    """A title of which Kaggle makes this slug."""
    return slug.replace("-", " ")
