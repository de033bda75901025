"""Writes what in docs/ and CONTRIBUTING.md follows from the code: `python docs/make.py`. A test says when that is due.

- docs/settings.md: every setting with its default and meaning, from `arc_solver/config.py` and its comments.
- the picture in CONTRIBUTING.md: which folder of the package imports from which.
- the table of studies in README.md: the question and the answer of each page in docs/studies/.
"""

import ast
import io
import json
import re
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "arc_solver"
SETTINGS = ROOT / "docs" / "settings.md"
MAP = ROOT / "CONTRIBUTING.md"
README = ROOT / "README.md"
STUDIES = ROOT / "docs" / "studies"
HEAD = """# Settings

Every setting, as `arc_solver/config.py` declares it; this page is written by `python docs/make.py`. A config file holds
what differs from the defaults, section by section, and any setting can be given on the command line:

    bin/solve predict.views=64 adapt.steps=240

Where a unit is not named, a length is in tokens, a time in seconds, and a share goes from 0 to 1.
"""
LISTS = {"stages": "`[[stages]]`", "sources": "`[[corpus.sources]]`"}  # sections of which there may be several


def settings_page() -> str:
    """docs/settings.md, as the code has it."""
    tree = ast.parse((PACKAGE / "config.py").read_text())
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    comments = _comments((PACKAGE / "config.py").read_text())
    lines = [HEAD]
    for section, name in _sections(classes).items():
        node = classes[name]
        inherited = classes.get(ast.unparse(node.bases[0]))
        title = LISTS.get(section, f"`[{section}]`")
        lines += [
            f"\n## {title}\n",
            *filter(None, [_paragraph(node)]),
            "| setting | default | meaning |",
            "|---|---|---|",
        ]
        rows: dict[str, str] = {}
        for of in filter(None, (inherited, node)):
            for field in (line for line in of.body if isinstance(line, ast.AnnAssign)):
                rows[field.target.id] = _row(field, comments, rows, tree)
        lines += rows.values()
    return "\n".join(lines) + "\n"


def _sections(classes: dict[str, ast.ClassDef]) -> dict[str, str]:
    """Of each section the class that declares it, in the order of `Config`; the lists come after what they refine."""
    found: dict[str, str] = {}
    for field in (line for line in classes["Config"].body if isinstance(line, ast.AnnAssign)):
        (name,) = re.findall(r"\w+Config", ast.unparse(field.annotation))
        found[field.target.id] = name
        if name == "CorpusConfig":
            found["sources"] = "SourceConfig"
    return found


def _paragraph(node: ast.ClassDef) -> str:
    said = ast.get_docstring(node)
    return f"{said}\n" if said else ""


def _row(field: ast.AnnAssign, comments: dict[int, str], known: dict[str, str], tree: ast.Module) -> str:
    name, said = ast.unparse(field.target), _meaning(field, comments)
    if not said and name in known:  # another default of the same setting
        said = known[name].rpartition(" | ")[2].removesuffix(" |")
    elif not said:
        raise SystemExit(
            f"error: {name}, line {field.lineno} of config.py, has no comment: say what it is, in which unit"
        )
    elif choices := re.search(r"Literal\[(.*?)\]", _annotation(field.annotation, tree)):
        names = ast.literal_eval(f"[{choices[1]}]")
        if not all(f"{choice}:" in said for choice in names):  # else the comment takes one after the other
            said = f"{', '.join(f'`{json.dumps(choice)}`' for choice in names)}: {said}"
    return f"| `{name}` | {_default(field.value, tree)} | {said} |"


def _default(node: ast.expr | None, tree: ast.Module) -> str:
    """As it is written in TOML; "" where the comment says it."""
    if node is None:
        return "required"
    try:
        return f"`{json.dumps(ast.literal_eval(node))}`"
    except ValueError:
        named = {ast.unparse(line.targets[0]): line.value for line in tree.body if isinstance(line, ast.Assign)}
        return _default(named[ast.unparse(node)], tree) if ast.unparse(node) in named else ""


def _annotation(node: ast.expr, tree: ast.Module) -> str:
    """The type of a setting, with the names that config.py gives to choices written out."""
    text = ast.unparse(node)
    for line in tree.body:
        if isinstance(line, ast.Assign | ast.AnnAssign) and ast.unparse(line).find("Literal[") > 0:
            target = line.targets[0] if isinstance(line, ast.Assign) else line.target
            if ast.unparse(target) == text:
                return ast.unparse(line.value) if line.value else text
    return text


def _meaning(field: ast.AnnAssign, comments: dict[int, str]) -> str:
    """The comment on a setting's last line, and those on lines of their own above it."""
    above, line = [], field.lineno - 1
    while comments.get(line, "").startswith("^"):
        above.insert(0, comments[line][1:])
        line -= 1
    beside = comments.get(field.end_lineno or field.lineno, "")
    said = " ".join([*above, *([beside] if beside and not beside.startswith("^") else [])])
    return re.sub(r"\s+", " ", said).replace("|", "\\|").replace("<", "\\<")


def _comments(source: str) -> dict[int, str]:
    """Of each line its comment; that of a line without code begins with ^."""
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith("# type:"):
            alone = not token.line[: token.start[1]].strip()
            found[token.start[0]] = ("^" if alone else "") + token.string.lstrip("# ")
    return found


def picture() -> str:
    """Which folder imports from which, as a Mermaid graph; arrows that follow from others are left out."""
    folders = re.findall(r"^\| `arc_solver/(\w+)/` \| (.+?) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    below = {folder: set() for folder, _ in folders}
    for folder in below:
        for file in (PACKAGE / folder).glob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.ImportFrom) and node.level == 2:
                    below[folder] |= {(node.module or "").partition(".")[0]} & below.keys()
    indirect = {folder: set().union(*(_all_below(direct, below) for direct in of)) for folder, of in below.items()}
    lines = ["```mermaid", "flowchart BT"]
    lines += [f'    {folder}["<b>{folder}</b><br>{job}"]' for folder, job in folders]
    lines += [
        f"    {folder} --> {lower}"
        for folder, _ in folders
        for lower in below
        if lower in below[folder] - indirect[folder]
    ]
    return "\n".join([*lines, "```"])


def _all_below(folder: str, below: dict[str, set[str]]) -> set[str]:
    return below[folder].union(*(_all_below(lower, below) for lower in below[folder]))


def with_picture(page: str) -> str:
    return re.sub(r"```mermaid\n.*?```", lambda _: picture(), page, count=1, flags=re.DOTALL)


def with_studies(page: str) -> str:
    """README, with a row for each study that has a page: its question and the line that answers it."""
    rows = ["| question | answer |", "|---|---|"]
    for file in sorted(STUDIES.glob("*.md")):
        question, _, answer = file.read_text().splitlines()[:3]
        link = f"[{question.removeprefix('# ')}]({file.relative_to(ROOT).as_posix()})"
        rows.append(f"| {link} | {answer.strip('*')} |")
    return re.sub(r"\| question \| answer \|\n(?:\|.*\n)+", lambda _: "\n".join(rows) + "\n", page, count=1)


def main() -> int:
    SETTINGS.write_text(settings_page())
    MAP.write_text(with_picture(MAP.read_text()))
    README.write_text(with_studies(README.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
