"""Code that a node can reach imports only what ComfyUI brings. tests/comfyui runs every node with the rest hidden."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BROUGHT_BY_COMFYUI = {"torch", "numpy", "scipy", "safetensors", "PIL", "tqdm", "comfy_aimdo", "comfy_kitchen"}
# server and aiohttp: one route of ours asks whether a shared file is here (nodes/routes.py).
COMFYUI_ITSELF = {"comfy", "comfy_api", "comfy_execution", "comfyui_version", "folder_paths", "latent_preview", "server", "aiohttp"}
OPTIONAL = {"triton"}  # imported by kernels/triton_ops only, at the first call that needs it


def imported_packages(file: Path) -> set[str]:
    found = set()
    for statement in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(statement, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom) and not statement.level:
            found.add(statement.module.partition(".")[0])
    return found - sys.stdlib_module_names


@pytest.mark.parametrize(
    ("folder", "allowed"),
    [
        ("nodes", BROUGHT_BY_COMFYUI | COMFYUI_ITSELF),
        ("hosts/comfy", BROUGHT_BY_COMFYUI | COMFYUI_ITSELF),
        ("quant", BROUGHT_BY_COMFYUI),
        ("kernels", BROUGHT_BY_COMFYUI | OPTIONAL),
    ],
)
def test_reachable_code_imports_only_what_comfyui_brings(folder, allowed):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for file in files:
        assert imported_packages(file) <= allowed, f"{file.relative_to(ROOT)} imports {imported_packages(file) - allowed}"
