"""Who may import whom, read from the syntax trees: the invariants of the architecture."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "fourdvq": ROOT / "fourdvq",
    "client": ROOT / "client" / "fourdvq_client",
    "server": ROOT / "server" / "fourdvq_server",
}
FORBIDDEN = {
    "fourdvq": {"flwr", "mlflow", "hydra", "omegaconf", "fourdvq_client", "fourdvq_server"},
    "client": {"fourdvq_server", "mlflow", "hydra"},
    "server": {"fourdvq_client"},
}
# The one file of the library that speaks Flower, and the one at the client that reads YAML.
EXCEPTIONS = {("fourdvq/wire/flower.py", "flwr")}
# One file for the site, four small ones for the coordinator: docs/decisions/0001-own-fleet-client.md.
FLWR_INTERNALS = {
    "client/fourdvq_client/fleet.py",
    "server/fourdvq_server/superlink.py",
    "server/fourdvq_server/control.py",
    "server/fourdvq_server/fab.py",
    "server/fourdvq_server/local_grid.py",
}
FLWR_PUBLIC = {"flwr", "flwr.app", "flwr.clientapp", "flwr.serverapp"}
SERIALISERS_THAT_RUN_CODE = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS_THAT_RUN_CODE = {
    "torch.load",
    "eval",
    "exec",
    "yaml.load",
    "pandas.read_pickle",
    "pd.read_pickle",
    "hydra.utils.instantiate",
    "instantiate",
}


def sources(package: str) -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGES[package].rglob("*.py")):
        yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.lineno, node.module


def violations(package: str) -> list[str]:
    found = []
    for file, tree in sources(package):
        for line, name in imports(tree):
            top = name.split(".")[0]
            if top in FORBIDDEN[package] and (file, top) not in EXCEPTIONS:
                found.append(f"{file}:{line} imports {name}")
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_library_imports_no_shell_and_shells_do_not_import_each_other(package):
    assert violations(package) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_that_can_run_received_code_is_imported_or_called(package):
    found = []
    for file, tree in sources(package):
        found += [
            f"{file}:{line} imports {name}"
            for line, name in imports(tree)
            if name.split(".")[0] in SERIALISERS_THAT_RUN_CODE
        ]
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                door = file == "fourdvq/weights_import.py" and name == "torch.load"
                if name in CALLS_THAT_RUN_CODE and not door:
                    found.append(f"{file}:{node.lineno} calls {name}")
                found += [
                    f"{file}:{node.lineno} shell=True"
                    for k in node.keywords
                    if k.arg == "shell" and ast.unparse(k.value) == "True"
                ]
                found += [
                    f"{file}:{node.lineno} allow_pickle"
                    for k in node.keywords
                    if k.arg == "allow_pickle" and ast.unparse(k.value) != "False"
                ]
    assert found == []


def test_flower_internals_live_in_the_transport_files_alone():
    found = []
    for package in ("client", "server"):
        for file, tree in sources(package):
            inner = {name for _, name in imports(tree) if name.split(".")[0] == "flwr" and name not in FLWR_PUBLIC}
            if inner and file not in FLWR_INTERNALS:
                found.append(f"{file}: {sorted(inner)}")
    assert found == []


def test_records_are_built_in_one_file_and_replies_packed_in_one_more():
    builders, packers = set(), set()
    for package in PACKAGES:
        for file, tree in sources(package):
            for node in ast.walk(tree):
                if isinstance(node, ast.Call):
                    name = ast.unparse(node.func).split(".")[-1]
                    if name in {"ConfigRecord", "ArrayRecord", "MetricRecord"}:
                        builders.add(file)
                    if name == "pack" and package == "client":
                        packers.add(file)
    assert builders == {"fourdvq/wire/flower.py"}
    assert packers == {"client/fourdvq_client/guard.py"}


def test_models_and_training_import_on_a_machine_with_torch_alone():
    """A bare GPU machine has torch, torchdiffeq, monai, numpy, safetensors; the benchmarks must run there."""
    code = """
import importlib, sys
ABSENT = set("SimpleITK pydicom lifelines matplotlib pandas flwr mlflow hydra omegaconf typer rich opacus PIL".split())
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ABSENT:
            raise ImportError("not on this machine: " + name)
sys.meta_path.insert(0, Refuse())
import pkgutil, fourdvq.models, fourdvq.training, fourdvq.federation
for package in (fourdvq.models, fourdvq.training, fourdvq.federation):
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
import fourdvq.losses, fourdvq.metrics
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_source_folders_are_not_importable_as_packages():
    """`import server.fourdvq_server` would make a second copy of every module."""
    code = """
import sys, fourdvq_server, fourdvq_client
print(sorted({"server", "client", "configs", "site_templates"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True, cwd="/")
    assert done.stdout.strip() == "[]"


def test_the_rule_finds_a_planted_violation(tmp_path, monkeypatch):
    planted = tmp_path / "fourdvq"
    planted.mkdir()
    (planted / "bad.py").write_text("import mlflow\n")
    monkeypatch.setitem(PACKAGES, "fourdvq", planted)
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert violations("fourdvq") == ["fourdvq/bad.py:1 imports mlflow"]
