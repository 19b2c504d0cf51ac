"""The root module: what ComfyUI imports first, and what `import stepquant` means without ComfyUI."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def imported_modules(statement: str) -> set[str]:
    """First path components of everything that a fresh Python has loaded after `statement`."""
    code = f"{statement}; import sys; sys.stdout.write(chr(10).join({{name.partition('.')[0] for name in sys.modules}}))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(answer.stdout.split())


@pytest.mark.parametrize("heavy", ["torch", "triton", "comfy", "comfy_kitchen", "comfy_api", "folder_paths", "nodes", "numpy", "PIL"])
def test_import_stepquant_loads_nothing_else(heavy):
    assert heavy not in imported_modules("import stepquant")


def test_root_offers_the_v3_entry_and_no_v1_mapping():
    import stepquant

    assert callable(stepquant.comfy_entrypoint)
    assert (ROOT / stepquant.WEB_DIRECTORY / "docs").is_dir()
    assert not hasattr(stepquant, "NODE_CLASS_MAPPINGS"), "ComfyUI would take the V1 mapping and ignore the V3 entry"


def test_nodes_folder_is_reached_by_relative_imports_only():
    for file in ROOT.glob("nodes/*.py"):
        for statement in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(statement, ast.Import):
                assert all(alias.name != "nodes" for alias in statement.names), f"{file.name} would find ComfyUI's nodes.py"
