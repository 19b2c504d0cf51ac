"""A real ComfyUI server and a headless Chromium that has its front end open; without either this folder's tests are left out."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

import pytest

BROWSER = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
COMFYUI = Path(os.environ["COMFYUI_PATH"]) if os.environ.get("COMFYUI_PATH") else None
REASON = ""
if COMFYUI is None or not (COMFYUI / "comfy" / "quant_ops.py").is_file():
    REASON = "left out, COMFYUI_PATH does not name a ComfyUI 0.33.0 or newer"
elif BROWSER is None:
    REASON = "left out, no Chromium found: install one, or name it in CHROMIUM"
elif importlib.util.find_spec("playwright") is None:
    REASON = "left out, playwright drives the browser: pip install playwright"
if REASON:
    collect_ignore_glob = ["*"]


def pytest_report_header() -> str:
    return f"tests/web: {REASON or f'with {BROWSER}'}"


if not REASON:
    from playwright.sync_api import sync_playwright

    from stepquant.demo.checkpoint import write_checkpoint

    from ..comfyui.pack.comfy_server import ComfyServer
    from ..comfyui.pack.conftest import make_base
    from .front_end import FrontEnd

    @pytest.fixture(scope="session")
    def base(tmp_path_factory) -> Path:
        folder = tmp_path_factory.mktemp("web")
        return make_base(folder / "base", write_checkpoint(folder / "demo.safetensors"))

    @pytest.fixture(scope="session")
    def server(base):
        running = ComfyServer(COMFYUI, base)
        yield running
        running.stop()

    @pytest.fixture(scope="session")
    def front_end(server):
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
            yield FrontEnd(browser, server)
            browser.close()
