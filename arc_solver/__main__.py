"""`arc-solver COMMAND ...`, or `python -m arc_solver COMMAND ...`: what `bin/COMMAND` is in a checkout."""

from importlib import import_module

from .command import run_main
from .errors import UserError

COMMANDS = {  # what it does, and the module whose `main` it is
    "solve": ("solve tasks and write submission.json", "solving.command"),
    "score": ("score a submission, or compare two", "answers.submission"),
    "train": ("train a model offline", "training.command"),
    "submit": ("from a config to a score on Kaggle", "release.submit"),
    "report": ("write a run's page", "report.command"),
    "show": ("show tasks and answers as coloured grids", "solving.show"),
    "data": ("get, make, compare and describe task sets", "data.command"),
    "study": ("answer a question by repeated runs", "studies.command"),
    "bench": ("measure how fast it is here", "bench.bench"),
}


def run(words: list[str]) -> int:
    """The command's exit code."""
    if words[:1] in (["-h"], ["--help"]):
        print(_usage())
        return 0
    if not words or words[0] not in COMMANDS:
        said = f"there is no command {words[0]!r}" if words else "give a command"
        raise UserError(f"{said}: {', '.join(COMMANDS)}; see arc-solver --help")
    main = import_module(f".{COMMANDS[words[0]][1]}", __package__).main
    code: int = main(words[1:])
    return code


def _usage() -> str:
    lines = [f"  {name:<8}{what}" for name, (what, _) in COMMANDS.items()]
    return "\n".join(["usage: arc-solver COMMAND ...", "", *lines, "", "arc-solver COMMAND --help says more."])


def main() -> None:
    run_main(run, "arc-solver ")


if __name__ == "__main__":
    main()
