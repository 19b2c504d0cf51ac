"""Starts graph_runner.py and talks to it: runs ComfyUI graphs in a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

RUNNER = Path(__file__).with_name("graph_runner.py")


class GraphProcess:
    """A ComfyUI without a port over a base directory. Close it with `stop`."""

    def __init__(self, comfyui: Path, base: Path) -> None:
        self.base = base
        self.log = base / "runner.log"
        self._log_file = self.log.open("w", encoding="utf-8")
        self._process = subprocess.Popen(
            [sys.executable, str(RUNNER), str(comfyui), str(base)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log_file,
            text=True,
            cwd=base,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def run(self, prompt: dict, cancel_after: int | None = None, extra_pnginfo: dict | None = None) -> dict:
        """Run an API-format graph; see graph_runner.py for the answer. extra_pnginfo: what a browser sends with it."""
        return self._ask({"prompt": prompt, "cancel_after": cancel_after, "extra_pnginfo": extra_pnginfo})

    def run_until_killed(self, prompt: dict, kill_after: int) -> None:
        """Run a graph; the process is killed at the n-th progress report, and is of no more use afterwards."""
        try:
            self._ask({"prompt": prompt, "kill_after": kill_after})
        except (AssertionError, OSError):
            self._process.wait(timeout=30)
            return
        raise AssertionError(f"the graph was done before its {kill_after}th progress report")

    def outputs(self, prompt: dict) -> dict:
        """The outputs by node id of a graph that must succeed."""
        answer = self.run(prompt)
        if not answer.get("success"):
            raise AssertionError(f"the graph failed: {json.dumps(answer, indent=1)}\n{self.log.read_text()[-3000:]}")
        return answer["outputs"]

    def failure(self, prompt: dict) -> str:
        """The sentence that an artist reads from a graph that must fail while running."""
        answer = self.run(prompt)
        if answer.get("success", True):
            raise AssertionError(f"the graph did not fail while running: {json.dumps(answer, indent=1)}")
        return answer["failure"]["exception_message"]

    def schemas(self) -> dict:
        return self._ask({"schemas": True})

    def memory_bytes(self) -> int:
        return self._ask({"memory": True})["bytes"]

    def limit_file_size(self, size: int | None) -> None:
        """Let the process write no file larger than `size` bytes, as on a full disk; None lifts the limit."""
        self._ask({"limit": size})

    def stop(self) -> None:
        self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._log_file.close()

    def _ask(self, request: dict) -> dict:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise AssertionError(f"the ComfyUI process ended:\n{self.log.read_text()[-3000:]}")
        answer = json.loads(line)
        if "crash" in answer:
            raise AssertionError(answer["crash"])
        return answer
