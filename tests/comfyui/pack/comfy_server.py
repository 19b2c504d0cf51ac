"""Starts ComfyUI's main.py for real and drives it over HTTP, as a browser would."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

START_SECONDS = 180
RUN_SECONDS = 240


class ComfyServer:
    """A running server over a base directory, on a free port. Always `stop` it."""

    def __init__(self, comfyui: Path, base: Path) -> None:
        self.log = base / "server.log"
        self._log_file = self.log.open("w", encoding="utf-8")
        self.address = f"127.0.0.1:{free_port()}"
        self._process = subprocess.Popen(
            [*command(comfyui, base), "--listen", "127.0.0.1", "--port", self.address.partition(":")[2]],
            stdout=self._log_file,
            stderr=subprocess.STDOUT,
            cwd=comfyui,
            env=environment(),
        )
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def get(self, path: str) -> object:
        with urllib.request.urlopen(f"http://{self.address}{path}", timeout=30) as answer:
            body = answer.read()
        return json.loads(body) if answer.headers.get_content_type() == "application/json" else body

    def queue(self, prompt: dict) -> str:
        """Queue an API-format graph. Returns its id."""
        return json.loads(self._post("/prompt", {"prompt": prompt, "client_id": "test"}))["prompt_id"]

    def result(self, identifier: str) -> dict:
        """Wait for the history entry of a queued graph."""
        deadline = time.monotonic() + RUN_SECONDS
        while time.monotonic() < deadline:
            history = self.get(f"/history/{identifier}")
            if identifier in history:
                return history[identifier]
            time.sleep(0.2)
        raise AssertionError(f"the graph did not finish in {RUN_SECONDS} s:\n{self.log.read_text()[-3000:]}")

    def run(self, prompt: dict) -> dict:
        return self.result(self.queue(prompt))

    def wait_for_log(self, text: str) -> None:
        deadline = time.monotonic() + RUN_SECONDS
        while text not in self.log.read_text(encoding="utf-8"):
            if time.monotonic() > deadline:
                raise AssertionError(f"{text!r} did not appear:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.2)

    def interrupt(self) -> None:
        """What the front end's Cancel button does."""
        self._post("/interrupt", {})

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log_file.close()

    def _post(self, path: str, data: dict) -> bytes:
        body = json.dumps(data).encode()
        request = urllib.request.Request(f"http://{self.address}{path}", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            raise AssertionError(f"the server refused {path}: {error.read().decode()}") from None

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                self.get("/system_stats")
                return
            except OSError:
                time.sleep(0.3)
        raise AssertionError(f"ComfyUI did not start:\n{self.log.read_text()[-3000:]}")


def command(comfyui: Path, base: Path) -> list[str]:
    options = ["--cpu", "--base-directory", str(base), "--disable-api-nodes", "--disable-auto-launch"]
    return [sys.executable, str(comfyui / "main.py"), *options, "--database-url", "sqlite:///:memory:"]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
