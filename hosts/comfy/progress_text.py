"""The line of text that ComfyUI's front end shows on a running node: here the time left. Draws no bar (see sampling.py)."""

from __future__ import annotations

import sys
import time

from comfy_execution.utils import get_executing_context

SECONDS_BETWEEN = 1.0  # more often nobody can read it


class TimeLeft:
    """Estimates the time left of a run of equal parts, from the time of those done."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._start = self._shown = time.monotonic()

    def text(self, done: int) -> str:
        """For example: 12 of 80, about 1 min 20 s left."""
        seconds = round((time.monotonic() - self._start) * (self._total - done) / max(1, done))
        minutes, seconds = divmod(seconds, 60)
        left = f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
        return f"{done} of {self._total}, about {left} left" if done < self._total else f"{done} of {self._total}"

    def show(self, done: int) -> None:
        """Show the text on the node that is running. Without a server, or outside a node, nothing happens."""
        now = time.monotonic()
        # Looked up, not imported: in tests and scripts there is no server, and its import would make one.
        server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
        context = get_executing_context()
        if server is None or context is None or (now - self._shown < SECONDS_BETWEEN and done < self._total):
            return
        self._shown = now
        server.send_progress_text(self.text(done), context.node_id)
