"""Pages that follow from the code are those of this code, and what docs point to is there."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "kaggle" / "README.md"]
PAGES += sorted((ROOT / "docs").rglob("*.md"))


@pytest.fixture(scope="module")
def make():
    spec = importlib.util.spec_from_file_location("make_docs", ROOT / "docs" / "make.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_written_pages_are_those_of_this_code(make):
    assert make.SETTINGS.read_text() == make.settings_page(), "run: python docs/make.py"
    assert make.MAP.read_text() == make.with_picture(make.MAP.read_text()), "run: python docs/make.py"
    assert make.README.read_text() == make.with_studies(make.README.read_text()), "run: python docs/make.py"


def test_every_setting_is_on_its_page(make):
    from arc_solver.config import Config

    page = make.settings_page()
    for section, field in Config.model_fields.items():
        heading = page.partition("`[[stages]]`" if section == "stages" else f"`[{section}]`")[2].partition("\n## ")[0]
        (values,) = field.annotation.__args__[:1] if section == "stages" else (field.annotation,)
        assert all(f"| `{name}` |" in heading for name in values.model_fields), section


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_points_to_is_there(page):
    """Links, and paths of this repository in backticks."""
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), target
    for path in re.findall(r"`((?:arc_solver|bin|configs|docs|kaggle|tests)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path
    for path in re.findall(
        r"`((?:puzzles|answers|data|report|models|decoding|training|solving|studies|release|bench)/\w+\.py)`", text
    ):
        assert (ROOT / "arc_solver" / path).exists(), path
