"""docs/data.md says of every file that a shipped config reads which one it is and where it comes from."""

import re
from pathlib import Path

import pytest

from arc_solver.config import load_config

ROOT = Path(__file__).parents[2]
FILES = {  # name -> licence, sha256
    name: (licence, digest)
    for name, licence, digest in re.findall(
        r"^\| `([\w.-]+)` \|.*\| ([\w.-]+) \| ([0-9a-f]{64}) \|$", (ROOT / "docs/data.md").read_text(), re.M
    )
}


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("bundled*.toml")), ids=lambda file: file.stem)
def test_every_file_of_a_source_is_described(config):
    loaded = load_config(config)
    for source in (source for stage in loaded.stages for source in stage.corpus.sources):
        if source.path.startswith("data/"):
            assert FILES[source.path.removeprefix("data/")] == (source.licence, source.sha256), source.label
    for spec in loaded.audit.scored_on:
        assert not spec.startswith("data/") or spec.removeprefix("data/") in FILES, spec


def test_the_page_describes_files():
    assert len(FILES) == 9
