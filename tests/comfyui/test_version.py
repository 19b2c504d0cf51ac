"""A ComfyUI that is too old is refused in one sentence; the check itself needs nothing new."""

import subprocess
import sys
from pathlib import Path

import pytest

import stepquant.hosts.comfy.version as version
from stepquant.errors import HostError


def test_this_comfyui_is_accepted():
    version.check_comfyui()


@pytest.mark.parametrize("missing", ["comfy.quant_ops", "comfy_kitchen", "comfy.model_patcher", "comfy_api.latest"])
def test_missing_feature_is_named_with_the_remedy(monkeypatch, missing):
    has = version._has
    monkeypatch.setattr(version, "_has", lambda module, attribute=None: module != missing and has(module, attribute))
    with pytest.raises(HostError, match=rf"{missing.split('.')[-1]}.*0\.33\.0 or newer is needed\. Update ComfyUI"):
        version.check_comfyui()


def test_check_runs_where_there_is_no_comfyui(tmp_path):
    script = (
        "from stepquant.hosts.comfy.version import check_comfyui\n"
        "try:\n    check_comfyui()\nexcept Exception as error:\n    print(type(error).__name__, error)"
    )
    package = Path(version.__file__).resolve().parents[2]
    (tmp_path / "stepquant").symlink_to(package)
    environment = {"PYTHONPATH": str(tmp_path), "PATH": ""}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert result.stdout.startswith("HostError StepQuant: this ComfyUI") and "Update ComfyUI" in result.stdout, result.stderr
