"""The config of a run: kept in its folder, read from there, and compared when the run is continued."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ..config import Config, load_config
from ..errors import UserError
from ..puzzles import read_json

# Settings that may differ when a run is continued: they change what is selected, who works and for how long, and what
# is shown, but no candidate.
FREE = (
    "vote",
    "kaggle",
    "run.workers",
    "run.executor",
    "run.address",
    "run.time_budget",
    "run.watchdog_minutes",
    "run.submission",
    "run.show",
)

T = TypeVar("T")


def _whole(run_dir: Path, name: str, read: Callable[[], T]) -> T:
    """What a file of a run says that is needed to continue it."""
    try:
        return read()
    except UserError as error:
        raise UserError(
            f"{error}: {name} is damaged, and the run cannot be continued without it; submission.json and the results"
            f" beside it are whole, so keep {run_dir} and give another --out"
        ) from None


def saved_config(run_dir: Path) -> Config:
    """The config of a run.

    Raises:
        UserError: it is no run's folder, or of another version.
    """
    if not (run_dir / "run.json").is_file() or not (run_dir / "config.json").is_file():
        raise UserError(f"{run_dir} is no run of bin/solve: give what its --out was")
    file = run_dir / "config.json"
    _whole(run_dir, file.name, lambda: _require_config(read_json(file), file))
    try:
        return load_config(file)
    except UserError as error:
        said = str(error).replace(f" (config {file})", "")
        raise UserError(
            f"{run_dir} was made by another version of arc_solver ({said}): use that one for it, or begin again with"
            " another --out"
        ) from None


def _require_config(content: Any, file: Path) -> None:
    if not isinstance(content, dict) or not any(section in content for section in Config.model_fields):
        raise UserError(f"{file} holds no settings")


def config_text(config: Config) -> str:
    return json.dumps(config.model_dump(mode="json"), indent=1) + "\n"


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def refuse_another_run(run_dir: Path, config: Config, facts: Mapping[str, str]) -> None:
    """Refuses to continue a run whose results would mix with those of another config, other tasks or other weights.

    Args:
        facts: digests of the tasks and of the checkpoint, as run.json has them.

    Raises:
        UserError: it is another run, or a file of it is damaged.
    """
    old = _flat(saved_config(run_dir).model_dump(mode="json"))
    new = _flat(config.model_dump(mode="json"))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key) and not key.startswith(FREE):
            raise UserError(
                f"{run_dir} was begun with {key}={json.dumps(old.get(key))}, and now it is {json.dumps(new.get(key))}:"
                " results would mix; give that again, or another --out"
            )
    saved = _whole(run_dir, "run.json", lambda: read_json(run_dir / "run.json"))
    for what in ("tasks", "checkpoint"):
        if not isinstance(saved, dict) or saved.get(what) != facts[what]:
            where = {"tasks": config.tasks.spec, "checkpoint": config.model.path or "the bundled model"}[what]
            raise UserError(
                f"{run_dir} was begun with another content of the {what} ({where}): put that back, or give another"
                " --out"
            )
