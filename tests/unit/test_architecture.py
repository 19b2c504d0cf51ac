"""The folders are the architecture: imports point one way, and what is installed is what is there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CORE = {"errors", "version"}
# folder -> folders it may import from, besides itself and CORE
ALLOWED = {
    "quant": set(),
    "kernels": set(),
    "hosts": {"quant", "kernels"},
    "nodes": {"hosts", "quant", "kernels"},
    "demo": {"hosts", "quant", "kernels"},
    "cli": {"hosts", "quant", "kernels", "demo"},
}


def _imports(file: Path) -> set[str]:
    """First path component, below the package root, of every import of this package in a file."""
    depth = len(file.relative_to(ROOT).parts) - 1
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = file.relative_to(ROOT).parts[: depth + 1 - node.level]
            path = list(base) + (node.module.split(".") if node.module else [])
            found |= {path[0]} if path else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "stepquant":
            found.add("absolute import of stepquant")
    return found


@pytest.mark.parametrize("folder", sorted(ALLOWED))
def test_imports_point_one_way(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files, f"{folder}/ holds no Python file"
    for file in files:
        extra = _imports(file) - ALLOWED[folder] - {folder} - CORE
        assert not extra, f"{file.relative_to(ROOT)} imports {sorted(extra)}"


def test_hosts_do_not_know_each_other():
    for file in (ROOT / "hosts" / "diffusers").rglob("*.py"):
        assert "comfy" not in re.sub(r'""".*?"""|#.*', "", file.read_text(encoding="utf-8"), flags=re.S), file.name


def test_every_package_folder_is_installed():
    listed = set(re.findall(r'"stepquant(?:\.([\w.]+))?"', (ROOT / "pyproject.toml").read_text(encoding="utf-8")))
    on_disk = {
        file.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for top in (*ALLOWED, "benchmarks")
        for file in (ROOT / top).rglob("__init__.py")
    }
    assert on_disk <= listed, f"missing from pyproject.toml: {sorted(on_disk - listed)}"


def test_version_is_the_same_everywhere():
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M).group(1)
    assert f'VERSION = "{version}"' in (ROOT / "version.py").read_text(encoding="utf-8")
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
