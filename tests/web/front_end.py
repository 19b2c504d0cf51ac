"""Drives ComfyUI's front end in a browser as an artist does, as far as a test needs it."""

from __future__ import annotations

import base64
import time
from pathlib import Path

READY = "!!(window.app?.extensionManager && window.app.graph && window.LiteGraph?.registered_node_types['StepQuantQuantize'])"
SECONDS = 1000  # playwright counts milliseconds
START_SECONDS, RUN_SECONDS = 240, 400


class FrontEnd:
    """One page. `errors`: what our scripts logged or threw."""

    def __init__(self, browser, server) -> None:
        self.server = server
        self.errors: list[str] = []
        self.page = browser.new_page(viewport={"width": 1500, "height": 950})
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._note)
        self.open()

    def _note(self, message) -> None:
        if message.type == "error" and ("stepquant" in message.text.lower() or "stepquant" in str(message.location).lower()):
            self.errors.append(message.text)

    def open(self) -> None:
        """Load the page anew; dialogs that greet a new user are closed."""
        self.page.goto(f"http://{self.server.address}/", timeout=START_SECONDS * SECONDS)
        self.page.wait_for_function(READY, timeout=START_SECONDS * SECONDS)
        self.page.wait_for_timeout(2 * SECONDS)
        self.page.keyboard.press("Escape")

    def setting(self, name: str, value: object) -> None:
        self.page.evaluate("([name, value]) => app.extensionManager.setting.set(name, value)", [name, value])
        self.page.wait_for_timeout(SECONDS // 2)

    def load(self, prompt: dict) -> None:
        """Open an API-format graph."""
        self.page.evaluate("(prompt) => app.loadApiJson(prompt, 'test.json')", prompt)
        self.page.wait_for_timeout(SECONDS // 2)

    def load_workflow(self, workflow: dict) -> None:
        self.page.evaluate("(workflow) => app.loadGraphData(workflow, true, true, null)", workflow)
        self.page.wait_for_timeout(SECONDS // 2)

    def workflow(self) -> dict:
        """As it would be saved."""
        return self.page.evaluate("() => JSON.parse(JSON.stringify(app.graph.serialize()))")

    def node(self, kind: str) -> dict:
        return next(node for node in self.workflow()["nodes"] if node["type"] == kind)

    def run(self) -> None:
        """Queue the graph and wait until it is done; a failed run raises AssertionError."""
        before = self._finished()
        self.page.evaluate("() => app.queuePrompt(0, 1)")
        deadline = time.monotonic() + RUN_SECONDS
        while self._finished() == before:
            if time.monotonic() > deadline:
                raise AssertionError(f"the graph did not finish in {RUN_SECONDS} s")
            self.page.wait_for_timeout(SECONDS // 2)
        last = list(self.server.get("/history").values())[-1]
        if last["status"]["status_str"] != "success":
            raise AssertionError(str(last["status"])[:3000])
        self.page.wait_for_timeout(SECONDS)

    def open_picture(self, path: Path) -> None:
        """Drop a picture on the canvas: its metadata holds the graph."""
        data = base64.b64encode(path.read_bytes()).decode()
        self.page.evaluate(
            """async (data) => {
                const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
                await app.handleFile(new File([bytes], "dropped.png", { type: "image/png" }));
            }""",
            data,
        )
        self.page.wait_for_timeout(2 * SECONDS)

    def toasts(self) -> str:
        return " ".join(self.page.locator(".p-toast-message").all_inner_texts())

    def close_toasts(self) -> None:
        for button in self.page.locator(".p-toast-close-button").all():
            button.click()

    def _finished(self) -> int:
        return len(self.server.get("/history"))
