"""Rules of the project that no other test would notice being broken."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import fathom

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "platform" / "fathom"
CORE = ("engine", "models", "attention", "exits", "bench", "routing")
NOT_IN_CORE = {"ray", "mlflow", "fastapi", "starlette", "uvicorn", "vllm"}


@pytest.fixture(scope="module")
def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def imports(path: Path) -> Iterator[str]:
    """Top-level names of all modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


def test_platform_is_a_source_root_not_a_package() -> None:
    # A package of that name would shadow the standard library's module for everything run here.
    assert not (ROOT / "platform" / "__init__.py").exists()


def test_every_folder_with_code_is_a_package() -> None:
    # The wheel holds packages only: a folder without __init__.py would be missing from it.
    for root in (PACKAGE, ROOT / "deployments"):
        for path in root.rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), path.parent


@pytest.mark.parametrize("room", CORE)
def test_core_imports_no_ray_and_no_http(room: str) -> None:
    for path in sorted((PACKAGE / room).rglob("*.py")):
        assert not NOT_IN_CORE & set(imports(path)), path


def test_the_library_does_not_import_what_stands_on_it() -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.parent.name != "commands":
            assert not {"deployments", "experiments"} & set(imports(path)), path


def test_readme_commands_are_in_the_makefile() -> None:
    readme = (ROOT / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in ("serve", "test"):
        assert f"make {target}" in readme
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    mentioned = set(re.findall(r"^make ([a-z]+)", readme, re.MULTILINE))
    defined = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    assert mentioned <= defined


def test_ci_runs_the_readmes_test_command() -> None:
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_versions_agree(pyproject: dict) -> None:
    assert pyproject["project"]["version"] == fathom.__version__


def test_every_third_party_import_is_a_dependency(pyproject: dict) -> None:
    import sys

    names = {
        "huggingface-hub": "huggingface_hub",
        "pyyaml": "yaml",
        "pillow": "PIL",
        "grpcio": "grpc",
    }
    names["prometheus-client"] = "prometheus_client"
    names["opentelemetry-sdk"] = "opentelemetry"
    names["flashinfer-python"] = "flashinfer"
    extras = pyproject["project"]["optional-dependencies"]
    declared = {
        names.get(name, name)
        for line in (
            *pyproject["project"]["dependencies"],
            *(line for name in ("train", "otel", "gpu", "vllm") for line in extras[name]),
        )
        if (name := re.split(r"[\[<>=!~]", line)[0].lower())
    }
    ours = {"fathom", "deployments"}
    for root in (PACKAGE, ROOT / "deployments"):
        for path in sorted(root.rglob("*.py")):
            used = set(imports(path)) - set(sys.stdlib_module_names) - ours
            assert used <= declared, (path, used - declared)


def test_the_readmes_file_map_is_true() -> None:
    readme = (ROOT / "README.md").read_text()
    block = readme.split("## The file map")[1].split("```")[1]
    parents: list[tuple[int, Path]] = []
    for line in block.strip("\n").splitlines()[1:]:
        indent = len(line) - len(line.lstrip())
        name = line.split()[0]
        parents = [(depth, path) for depth, path in parents if depth < indent]
        path = (parents[-1][1] if parents else ROOT) / name.rstrip("/")
        assert path.exists(), f"the README's file map names {path.relative_to(ROOT)}"
        if name.endswith("/"):
            parents.append((indent, path))
