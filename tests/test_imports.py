"""What may import what: commands stand alone, the library needs no commands, and parts of it need few packages."""

import ast
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
COMMANDS = {path.stem: path for path in (ROOT / "experiments").glob("*.py") if path.stem != "__init__"}
COMMON = sorted((ROOT / "experiments" / "common").glob("*.py"))
IMPORTER = """
import importlib, sys
sys.modules |= dict.fromkeys(["minari", "gymnasium", "ml_collections"])  # so that importing them fails
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def imported(path) -> set[str]:
    """Return the full names of what a file imports, inside functions too: a.b and a.b.c for `from a.b import c`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def commands_in(names) -> set[str]:
    parts = [name.split(".") for name in names]
    return {part[1] for part in parts if part[0] == "experiments" and len(part) > 1 and part[1] in COMMANDS}


def test_no_command_imports_another():
    assert {"train_tt", "plan", "quickstart", "benchmark"} <= COMMANDS.keys()
    assert {name: found for name, path in COMMANDS.items() if (found := commands_in(imported(path)))} == {}


def test_every_file_beside_the_commands_is_a_command():
    for path in COMMANDS.values():
        assert 'if __name__ == "__main__":' in path.read_text(), path


def test_what_commands_share_imports_no_command_and_declares_flags_in_one_place():
    assert {"entry.py", "stages.py", "run_flags.py"} <= {path.name for path in COMMON}
    assert {path.name: found for path in COMMON if (found := commands_in(imported(path)))} == {}
    assert {path.name for path in COMMON if "flags.DEFINE" in path.read_text()} == {"entry.py", "run_flags.py"}


def test_the_library_imports_no_experiment_and_no_flags_and_nothing_imports_the_tests():
    for path in (ROOT / "tt_jax").glob("*.py"):
        assert not {name.split(".")[0] for name in imported(path)} & {"experiments", "absl", "ml_collections"}, path
    for path in [*COMMANDS.values(), *COMMON]:
        assert "tests" not in {name.split(".")[0] for name in imported(path)}, path


def test_networks_planning_training_and_benchmark_need_neither_minari_nor_gymnasium_nor_ml_collections():
    modules = ["tt_jax.transformer", "tt_jax.planning", "tt_jax.iql", "tt_jax.training", "experiments.benchmark"]
    command = [sys.executable, "-c", IMPORTER, *modules]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
