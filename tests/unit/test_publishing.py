"""What the Comfy Registry asks of the pack, and what its archive leaves out."""

import struct
import sys
from pathlib import Path

import pytest

from stepquant.version import VERSION

ROOT = Path(__file__).resolve().parents[2]
tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib") if sys.version_info < (3, 11) else __import__("tomllib")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def _png_size(path: Path) -> tuple[int, int]:
    return struct.unpack(">II", path.read_bytes()[16:24])


def test_registry_finds_what_it_requires():
    project, comfy = PROJECT["project"], PROJECT["tool"]["comfy"]
    assert "comfyui" not in project["name"].lower() and len(project["name"]) < 100
    assert project["version"] == VERSION and project["urls"]["Repository"].startswith("https://")
    assert project["dependencies"] == [], "ComfyUI brings everything"
    assert comfy["PublisherId"] and comfy["DisplayName"] and comfy["requires-comfyui"].startswith(">=")


def test_icon_and_banner_have_the_registrys_shapes():
    comfy = PROJECT["tool"]["comfy"]
    sizes = {}
    for field in ("Icon", "Banner"):
        path = ROOT / comfy[field].partition("/main/")[2]
        sizes[field] = _png_size(path)
    width, height = sizes["Icon"]
    assert width == height <= 400
    width, height = sizes["Banner"]
    assert width * 9 == height * 21


def test_archive_leaves_tests_out_and_keeps_what_the_nodes_need():
    lines = [line for line in (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    assert all(line.startswith("/") for line in lines), "docs/ alone would leave web/docs out too"
    ignored = {line.strip("/") for line in lines}
    assert {"tests", "benchmarks", ".github"} <= ignored
    needed = {
        "__init__.py",
        "errors.py",
        "hosts",
        "kernels",
        "nodes",
        "quant",
        "web",
        "locales",
        "example_workflows",
        "version.py",
        "LICENSE",
    }
    assert not needed & ignored
    assert all((ROOT / one).exists() for one in needed | ignored)
