"""Whether a release may travel to Kaggle: every rule that is known, looked up before anything is sent.

Kaggle accepts much that it then ignores, renames or fails on an hour later: a notebook with another title gets another
address, an archive arrives unpacked, a wheel for another Python is "not found". So each rule of the metadata, of the
files and of the wheels is a complaint here. What the wheels change in the image is no complaint, but is reported.

Last, and for safety: no file that travels may hold a credential, be it by its name or by its text. The wheels of others
are left out of that search, as they are public and their hashes are locked; ours is searched inside.
"""

import json
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import IO, Any

from packaging.utils import canonicalize_name

from ..config import MACHINES, Config
from ..errors import UserError, counted, first_line
from ..files import sha256
from .image import IMAGE_FILE, Changes, Wheel, read_image, read_lock, read_wheel, simulate

Digest = Callable[[Path], str]  # of a file: its SHA-256

MAX_SOURCE = 1_000_000  # bytes of a notebook
MAX_DATASETS = 100 * 2**30  # bytes: what an account has for all its private datasets
RETIRED = {  # beginnings of names -> what Kaggle gives instead
    "NvidiaTeslaP100": "NvidiaTeslaT4",
    "TpuV38": "TpuV5E8",
    "Tpu1VmV38": "TpuV5E8",
    "TpuV2": "a machine without a TPU",
}
KERNEL_FIELDS = {
    *("id", "title", "code_file", "language", "kernel_type", "is_private", "keywords"),
    *("enable_gpu", "enable_tpu", "enable_internet", "machine_shape", "docker_image", "docker_image_pinning_type"),
    *("dataset_sources", "competition_sources", "kernel_sources", "model_sources"),
}
DATASET_FIELDS = {"id", "title", "subtitle", "description", "licenses", "keywords", "resources"}
LICENCES = {
    *("CC0-1.0", "CC-BY-4.0", "CC-BY-SA-4.0", "CC-BY-NC-4.0", "CC-BY-NC-SA-4.0", "ODbL-1.0", "DbCL-1.0", "PDDL"),
    *("apache-2.0", "MIT", "GPL-2.0", "GPL-3.0", "AGPL-3.0", "LGPL-3.0", "other", "unknown"),
}
ARCHIVE = re.compile(r"\.(zip|tar|tgz|tbz2?|txz|gz|bz2|xz|zst|7z|rar)$", re.IGNORECASE)
SLUG = "[a-z0-9]+(?:-[a-z0-9]+)*"
REFERENCE = f"[A-Za-z0-9_-]+/{SLUG}"
IMAGE = re.compile(r"gcr\.io/kaggle-[a-z-]+/python(:[\w.-]+)?@sha256:[0-9a-f]{64}")

# ---- credentials ----------------------------------------------------------------------------------------------------

_VALUE = rb"""\\?["']?\s*[:=]\s*\\?["']"""  # between a name and what it is set to, in code, JSON and JSON within JSON
CREDENTIALS = {
    "a Kaggle token": rb"KGAT_[A-Za-z0-9_-]{16,}",
    "a Kaggle key": rb"""(?i)(?:\bkey|kaggle_key)\\?["']?\s*[:=]\s*\\?["']?[0-9a-f]{32}\b""",
    "a Hugging Face token": rb"\bhf_[A-Za-z0-9]{30,}",
    "an AWS key": rb"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "an AWS secret": rb"""(?i)aws_secret_access_key\\?["']?\s*[:=]\s*\\?["']?[A-Za-z0-9/+]{40}""",
    "a GitHub token": rb"\bgh[pousr]_[A-Za-z0-9]{36,}|\bgithub_pat_[A-Za-z0-9_]{22,}",
    "an API key": rb"\bsk-(?=[A-Za-z_-]{0,40}\d)[A-Za-z0-9_-]{24,}|\bAIza[0-9A-Za-z_-]{35}",
    "a Slack token": rb"\bxox[abprs]-[A-Za-z0-9-]{10,}",
    "a private key": rb"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a signed token": rb"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}",
    "a password in an address": rb"\bhttps?://[^/\s:@\"'{}<>]+:[^/\s:@\"'{}<>]+@",
    "a secret": rb"(?i)\b(?:access_token|refresh_token|api_key|client_secret|password)"
    + _VALUE
    + rb"[^\s\"'\\{}<>]{12,}",
}
_PATTERNS = {kind: re.compile(pattern) for kind, pattern in CREDENTIALS.items()}
CREDENTIAL_FILES = re.compile(
    r"kaggle\.json|access_token(\.txt)?|credentials(\.json)?|\.?netrc|\.env|\.pypirc|\.git-credentials"
    r"|id_(rsa|dsa|ecdsa|ed25519)|.*\.(pem|key|p12|pfx)",
    re.IGNORECASE,
)
BINARY_START = 2**20  # bytes of a binary file that are searched: where formats keep what is text


@dataclass(frozen=True)
class Report:
    """What is wrong with a release, and what it would do."""

    complaints: tuple[str, ...]
    added: Mapping[str, str] = field(default_factory=dict)  # to the image: name -> version
    replaced: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # name -> version there, version that comes
    sizes: Mapping[str, int] = field(default_factory=dict)  # dataset -> bytes

    @property
    def total_bytes(self) -> int:
        return sum(self.sizes.values())

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "total_bytes": self.total_bytes}

    def __str__(self) -> str:
        lines = [f"{counted(len(self.added), 'package')} added to the image: {_list(self.added)}"] if self.added else []
        replaced = {name: f"{old} -> {new}" for name, (old, new) in self.replaced.items()}
        lines += [f"{len(replaced)} replaced: {_list(replaced)}"] if replaced else []
        sizes = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in self.sizes.items())
        lines += [f"{self.total_bytes / 1e6:.1f} MB travel: {sizes}"] if sizes else []
        lines += [f"wrong: {complaint}" for complaint in self.complaints] or ["nothing is wrong"]
        return "\n".join(lines)


def _list(named: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {what}" for name, what in named.items())


def check(release: Path, config: Config, image_file: Path = IMAGE_FILE) -> Report:
    """Looks at everything that travels, and at how it stands to the image.

    Args:
        release: the folder that was built.
        config: what it was built of.
        image_file: the packages of the image, see `image.read_image`.

    Raises:
        UserError: there is no release, or no list of the image's packages.
    """
    if not (release / "kernel").is_dir() or not (release / "datasets").is_dir():
        raise UserError(f"{release} is no release: make one with bin/submit CONFIG.toml build")
    datasets = sorted(folder for folder in (release / "datasets").iterdir() if folder.is_dir())
    digest = cache(sha256)  # some files are looked up in three lists, and may have gigabytes
    changes, of_wheels = _wheels(datasets, image_file, digest)
    wrong = [
        *_kernel(release, config, [folder.name for folder in datasets]),
        *(complaint for folder in datasets for complaint in _dataset(folder, config)),
        *_strays(release / "datasets"),
        *of_wheels,
        *_sums(release, digest),
        *_manifest(release, datasets, digest),
        *_credentials(release),
    ]
    sizes = {folder.name: sum(file.stat().st_size for file in _files(folder)) for folder in datasets}
    if sum(sizes.values()) > MAX_DATASETS:
        wrong.append(f"the datasets have {sum(sizes.values()):,} bytes, and Kaggle gives an account {MAX_DATASETS:,}")
    return Report(tuple(wrong), changes.added, changes.replaced, sizes)


def slugify(title: str) -> str:
    """The address that Kaggle makes of an English title."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _travelling(release: Path) -> list[Path]:
    return [*_files(release / "datasets"), *_files(release / "kernel")]


def _name(file: Path, release: Path) -> str:
    return file.relative_to(release).as_posix()


def _read_object(file: Path) -> tuple[dict[str, Any], list[str]]:
    """A JSON object, and what is wrong with the file."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        return {}, [f"{file.name} of {file.parent.name} cannot be read as JSON: {first_line(error)}"]
    return (found, []) if isinstance(found, dict) else ({}, [f"{file.name} of {file.parent.name} is no JSON object"])


# ---- the notebook ---------------------------------------------------------------------------------------------------


def _kernel(release: Path, config: Config, datasets: list[str]) -> Iterator[str]:
    folder = release / "kernel"
    about, unread = _read_object(folder / "kernel-metadata.json")
    yield from unread
    if unread:
        return
    where = "kernel-metadata.json"
    for key in sorted(about.keys() - KERNEL_FIELDS):
        yield (
            f"{where}: Kaggle's client knows no '{key}'"
            if key != "id_no"
            else f"{where}: leave id_no out, id is enough"
        )
    yield from _address(where, about, config, shortest=5, shortest_title=5)
    yield from _code_file(folder, about)
    for key, only in (("language", "python"), ("kernel_type", "notebook")):
        if about.get(key) != only:
            yield f'{where}: {key} is {about.get(key)!r}, and must be "{only}"'
    if about.get("is_private") is not True and not config.kaggle.public:
        yield f"{where}: is_private must be true, unless kaggle.public is set"
    if about.get("enable_internet") is not False and not config.kaggle.internet:
        yield f"{where}: enable_internet must be false, unless kaggle.internet is set; Kaggle's client would set it"
    yield from _machine(where, about, config)
    yield from _sources(where, about, config, datasets)


def _address(where: str, about: dict[str, Any], config: Config, shortest: int, shortest_title: int) -> Iterator[str]:
    """The rules of id and title, which a notebook and a dataset share."""
    owner, _, slug = str(about.get("id", "")).partition("/")
    if not re.fullmatch(REFERENCE, f"{owner}/{slug}"):
        yield f"{where}: id is {about.get('id')!r}, and must be owner/slug of a-z, 0-9 and -"
        return
    if not shortest <= len(slug) <= 50:
        yield f"{where}: the slug {slug} has {counted(len(slug), 'character')}, and Kaggle takes {shortest} to 50"
    if config.kaggle.owner and owner != config.kaggle.owner:  # unset, it is filled in when it is known who pushes
        yield f"{where}: the owner is {owner}, and kaggle.owner says {config.kaggle.owner}"
    title = about.get("title")
    if not isinstance(title, str) or not shortest_title <= len(title) <= 50:
        yield f"{where}: title is {title!r}, and must have {shortest_title} to 50 characters"
    elif slugify(title) != slug:
        yield f"{where}: Kaggle would make {slugify(title)} of the title, and id says {slug}"


def _code_file(folder: Path, about: dict[str, Any]) -> Iterator[str]:
    name = about.get("code_file")
    for other in sorted(path.name for path in folder.iterdir()):
        if other not in (name, "kernel-metadata.json"):
            yield f"kernel/{other} would not travel: Kaggle takes the file that code_file names, and no other"
    if not isinstance(name, str) or "/" in name or not (folder / name).is_file():
        yield f"kernel-metadata.json: code_file is {name!r}, and there is no such file beside it"
        return
    if (size := (folder / name).stat().st_size) >= MAX_SOURCE:
        yield f"kernel/{name} has {size:,} bytes, and Kaggle takes less than {MAX_SOURCE:,}"
    notebook, unread = _read_object(folder / name)
    yield from unread
    if not unread and not isinstance(notebook.get("cells"), list):
        yield f"kernel/{name} is no notebook: it has no cells"


def _machine(where: str, about: dict[str, Any], config: Config) -> Iterator[str]:
    shape, wanted = about.get("machine_shape") or "", config.kaggle.machine
    if instead := [RETIRED[name] for name in RETIRED if str(shape).startswith(name)]:
        yield f"{where}: {shape} is retired, Kaggle would give {instead[0]}"
    elif shape not in MACHINES:
        yield f"{where}: machine_shape is {shape!r}, and Kaggle silently gives something else for what it does not know"
    elif shape != wanted:
        yield f"{where}: machine_shape is {shape!r}, and kaggle.machine says {wanted!r}"
    image = about.get("docker_image") or ""
    if image and not (isinstance(image, str) and IMAGE.fullmatch(image)):
        yield f"{where}: docker_image is {image!r}, and must be one of Kaggle's, with its digest"
    elif image != config.kaggle.image:
        yield f"{where}: docker_image is {image!r}, and kaggle.image says {config.kaggle.image!r}"
    if about.get("docker_image_pinning_type", "latest") not in ("original", "latest"):
        yield f"{where}: docker_image_pinning_type must be original or latest"


_FORMS = {
    "dataset_sources": (REFERENCE, "owner/slug"),
    "kernel_sources": (REFERENCE, "owner/slug, without a version, which Kaggle would drop"),
    "competition_sources": (SLUG, "a competition's slug"),
    "model_sources": (rf"{REFERENCE}/[A-Za-z0-9_.-]+/{SLUG}/[1-9]\d*", "owner/model/framework/variation/version"),
}


def _sources(where: str, about: dict[str, Any], config: Config, datasets: list[str]) -> Iterator[str]:
    listed: dict[str, list[Any]] = {}
    for key, (pattern, form) in _FORMS.items():
        value = about.get(key, [])
        listed[key] = value if isinstance(value, list) else []
        if not isinstance(value, list):
            yield f"{where}: {key} must be a list"
        for source in listed[key]:
            if not isinstance(source, str) or not re.fullmatch(pattern, source):
                yield f"{where}: {source!r} in {key} must be {form}"
    owner = str(about.get("id")).partition("/")[0]
    for slug in datasets:
        if f"{owner}/{slug}" not in listed["dataset_sources"]:
            yield f"{where}: dataset_sources lacks {owner}/{slug}, so the notebook would run without it"
    if config.kaggle.competition not in listed["competition_sources"]:
        yield f"{where}: competition_sources lacks {config.kaggle.competition}"


# ---- datasets -------------------------------------------------------------------------------------------------------


def _dataset(folder: Path, config: Config) -> Iterator[str]:
    where = f"dataset-metadata.json of {folder.name}"
    about, unread = _read_object(folder / "dataset-metadata.json")
    yield from unread
    if not unread:
        yield from _dataset_metadata(where, about, folder, config)
    for path in sorted(folder.iterdir()):
        name = f"{folder.name}/{path.name}"
        if path.is_symlink() or not path.is_file():
            yield f"{name} is no plain file: Kaggle's client sends the files of one folder, and nothing below it"
        elif ARCHIVE.search(path.name):
            yield f"{name} is an archive, which Kaggle unpacks: ship what is in it, and wheels instead of sources"
        elif path.name.endswith("-metadata.json") and path.name != "dataset-metadata.json":
            yield f"{name} would not travel: Kaggle's client keeps *-metadata.json back"


def _dataset_metadata(where: str, about: dict[str, Any], folder: Path, config: Config) -> Iterator[str]:
    for key in sorted(about.keys() - DATASET_FIELDS):
        yield f"{where}: Kaggle's client knows no '{key}' in a new dataset"
    yield from _address(where, about, config, shortest=6, shortest_title=6)
    if str(about.get("id")).rpartition("/")[2] != folder.name:
        yield f"{where}: id is {about.get('id')!r}, and the folder is named {folder.name}"
    licences = about.get("licenses")
    names = [one.get("name") for one in licences if isinstance(one, dict)] if isinstance(licences, list) else []
    if len(names) != 1 or names[0] not in LICENCES:
        yield f"{where}: licenses is {licences!r}, and must be one that Kaggle knows, such as [{{'name': 'CC0-1.0'}}]"
    subtitle = about.get("subtitle")
    if subtitle is not None and not (isinstance(subtitle, str) and 20 <= len(subtitle) <= 80):
        yield f"{where}: subtitle must have 20 to 80 characters, or be left out"
    for resource in about.get("resources") or []:
        if not isinstance(resource, dict) or not (folder / str(resource.get("path", ""))).is_file():
            yield f"{where}: resources names {resource!r}, and there is no such file"


def _strays(datasets: Path) -> Iterator[str]:
    for path in sorted(datasets.iterdir()):
        if not path.is_dir():
            yield f"datasets/{path.name} is in no dataset, and would not travel"


# ---- wheels ---------------------------------------------------------------------------------------------------------


def _wheels(datasets: list[Path], image_file: Path, digest: Digest) -> tuple[Changes, list[str]]:
    """What the wheels change in the image, and what is wrong with them."""
    files = [file for folder in datasets for file in sorted(folder.glob("*.whl"))]
    wheels, wrong = [], []
    for file in files:
        try:
            wheels.append(read_wheel(file))
        except UserError as error:
            wrong.append(str(error))
    changes = simulate(read_image(image_file), wheels)
    wrong += [*changes.unfit, *changes.unmet]
    if not any(wheel.name == "arc-solver" for wheel in wheels):
        wrong.append("no dataset has our own wheel, arc_solver-*.whl")
    for folder in sorted({file.parent for file in files}):
        wrong += _locked(folder, [wheel for wheel in wheels if (folder / wheel.file).is_file()], digest)
    return changes, wrong


def _locked(folder: Path, wheels: list[Wheel], digest: Digest) -> Iterator[str]:
    """Whether the wheels of a folder are exactly those that its requirements.lock lets pip install."""
    try:
        lock = read_lock(folder / "requirements.lock")
    except UserError as error:
        yield str(error)
        return
    for wheel in wheels:
        version, hashes = lock.pop(wheel.name, (None, frozenset()))
        if version is None:
            yield f"{folder.name}/{wheel.file} is not in requirements.lock, so it would not be installed"
        elif version != wheel.version or digest(folder / wheel.file) not in hashes:
            yield f"{folder.name}/{wheel.file} is not the {wheel.name} {version} whose hash requirements.lock has"
    for name, (version, _) in lock.items():
        yield f"{folder.name}: requirements.lock asks for {name} {version}, and there is no wheel of it"


# ---- sums -----------------------------------------------------------------------------------------------------------


def _sums(release: Path, digest: Digest) -> Iterator[str]:
    """SHA256SUMS has all that travels, and agrees with it."""
    travels = {_name(file, release): file for file in _travelling(release)}
    try:
        lines = (release / "SHA256SUMS").read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        yield f"SHA256SUMS cannot be read: {first_line(error)}"
        return
    sums = {name: said for said, _, name in (line.partition("  ") for line in lines)}
    yield from _disagreements("SHA256SUMS", sums, travels, digest)


def _manifest(release: Path, datasets: list[Path], digest: Digest) -> Iterator[str]:
    """The manifest, which travels in one of the datasets, has their files, and the notebook knows which manifest."""
    found = [file for folder in datasets if (file := folder / "manifest.json").is_file()]
    if len(found) != 1:
        yield f"{len(found)} datasets have a manifest.json, and one must"
        return
    manifest, unread = _read_object(found[0])
    yield from unread
    sums = manifest.get("files", {})
    if not isinstance(sums, dict):
        yield "manifest.json: files is no object of names and hashes"
        return
    besides = {found[0], *(folder / "dataset-metadata.json" for folder in datasets)}
    travels = {f"{f.parent.name}/{f.name}": f for folder in datasets for f in sorted(folder.iterdir()) if f.is_file()}
    yield from _disagreements(
        "manifest.json", sums, {n: file for n, file in travels.items() if file not in besides}, digest
    )
    notebooks = [file.read_text(errors="replace") for file in _files(release / "kernel") if file.suffix == ".ipynb"]
    if not any(digest(found[0]) in text for text in notebooks):
        yield "the notebook does not have the hash of manifest.json: it is of another build"


def _disagreements(where: str, sums: Mapping[str, str], files: Mapping[str, Path], digest: Digest) -> Iterator[str]:
    for name in sorted(sums.keys() - files.keys()):
        yield f"{where} has {name}, which is not there"
    for name, file in files.items():
        if name not in sums:
            yield f"{where} lacks {name}"
        elif sums[name] != digest(file):
            yield f"{name} is not what {where} says: it was changed, so build once more"


# ---- credentials ----------------------------------------------------------------------------------------------------


def _credentials(release: Path) -> Iterator[str]:
    for file in _travelling(release):
        name = _name(file, release)
        if file.suffix != ".whl":
            with file.open("rb") as stream:
                yield from _in_file(name, _searched(stream))
        elif canonicalize_name(file.name.partition("-")[0]) == "arc-solver" and zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                for inside in archive.namelist():
                    with archive.open(inside) as stream:
                        yield from _in_file(f"{name}/{inside}", _searched(stream))


def _searched(stream: IO[bytes]) -> bytes:
    """A text whole, and the start of anything else."""
    start = stream.read(BINARY_START)
    return start if b"\0" in start else start + stream.read()


def _in_file(name: str, text: bytes) -> Iterator[str]:
    """Names the place, and never what is there."""
    if CREDENTIAL_FILES.fullmatch(name.rpartition("/")[2]):
        yield f"{name} is where credentials are kept: take it out"
    for kind, pattern in _PATTERNS.items():
        if found := pattern.search(text):
            line = text.count(b"\n", 0, found.start()) + 1
            yield f"{name} has what looks like {kind} in line {line}: take it out"
