"""The scripts in web/: small, from this pack alone, and of the types that ComfyUI's front end has. tests/web runs them in a browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "web").glob("*.js"))
MOST_LINES = 500
COMPILER = ROOT / "tests" / "web" / "node_modules" / "typescript" / "bin" / "tsc"


def test_scripts_are_small_enough_to_be_read():
    assert 0 < sum(len(path.read_text(encoding="utf-8").splitlines()) for path in SCRIPTS) < MOST_LINES


@pytest.mark.parametrize("path", [*SCRIPTS, *(ROOT / "web").glob("*.css")], ids=lambda path: path.name)
def test_scripts_load_nothing_from_elsewhere_run_no_text_and_draw_on_no_canvas(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"https?://(?!www\.w3\.org/)|\beval\(|new Function|getContext|onDrawForeground", text)
    imported = re.findall(r'^import .* from "(.+)"', text, re.MULTILINE)
    assert all(name.startswith(("./", "../../scripts/")) for name in imported)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_ask_for_the_type_check(path):
    assert "// @ts-check" in path.read_text(encoding="utf-8")


@pytest.mark.skipif(not COMPILER.is_file() or shutil.which("node") is None, reason="the types are not installed: npm install in tests/web")
def test_scripts_fit_the_front_ends_own_types():
    answer = subprocess.run(["node", COMPILER, "-p", "tsconfig.json"], cwd=COMPILER.parents[3], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout
