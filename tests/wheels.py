"""Small wheels and a small image, for the tests of what travels to Kaggle."""

import hashlib
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path

IMAGE = "# of the tests\nnumpy==2.0.2\ntorch==2.10.0+cu128\ntransformers==5.0.0\nprotobuf==5.29.5\n"


def make_wheel(
    folder: Path,
    name: str,
    version: str = "1.0",
    requires: Sequence[str] = (),
    tag: str = "py3-none-any",
    python: str = "",
    says: str = "",
    files: dict[str, str] | None = None,
) -> Path:
    """A wheel with metadata, the files given, and nothing else. `says`: the name in its metadata, if it is another."""
    file = folder / f"{name}-{version}-{tag}.whl"
    lines = ["Metadata-Version: 2.1", f"Name: {says or name}", f"Version: {version}"]
    lines += [f"Requires-Python: {python}"] * bool(python) + [f"Requires-Dist: {one}" for one in requires]
    lines += [f"Provides-Extra: {extra}" for one in requires for extra in re.findall(r'extra == "(\w+)"', one)]
    about = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"{about}/METADATA", "\n".join(lines) + "\n\nA description.\n")
        archive.writestr(f"{about}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        archive.writestr(f"{about}/RECORD", "")
        for inside, text in (files or {}).items():
            archive.writestr(inside, text)
    return file


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def lock_of(folder: Path) -> str:
    """The lock of a folder's wheels."""
    parts = [(file.name.split("-"), sha256(file)) for file in sorted(folder.glob("*.whl"))]
    return "".join(f"{name}=={version} --hash=sha256:{digest}\n" for (name, version, *_), digest in parts)
