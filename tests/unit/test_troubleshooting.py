"""The troubleshooting page covers the errors that the code raises: every message has an entry, every entry a message."""

import ast
import re
from pathlib import Path

import pytest

from stepquant import errors

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
# LayoutError is for those who write kernels and hosts: no artist can do anything about it.
CLASSES = {name for name in vars(errors) if name.endswith("Error")} - {"LayoutError"}
FOLDERS = ("nodes", "hosts", "quant", "kernels")


def _phrases() -> list[str]:
    lines = [line for line in PAGE.splitlines() if line.startswith("Message contains: ")]
    return [phrase for line in lines for phrase in re.findall(r"`([^`]+)`", line)]


def _texts(path: Path) -> list[str]:
    """All sentences of a file, with values left out: a raise may take its text from a function or a variable."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


def _raised() -> list[tuple[str, str]]:
    """(place, text with values left out) of every raise whose text stands there."""
    found = []
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and getattr(node.exc.func, "id", "") in CLASSES:
                    text = node.exc.args[0]
                    if isinstance(text, ast.JoinedStr):
                        text = "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in text.values)
                    elif isinstance(text, ast.Constant):
                        text = text.value
                    else:
                        continue
                    if re.sub(r"[{}:. ]", "", text):  # else it passes another message on
                        found.append((f"{path.relative_to(ROOT)}:{node.lineno}", text))
    return found


def test_every_error_has_an_entry():
    phrases = _phrases()
    missing = [f"{place}: {text}" for place, text in _raised() if not any(phrase in text for phrase in phrases)]
    assert not missing, "docs/troubleshooting.md has no entry for:\n" + "\n".join(missing)


@pytest.mark.parametrize("phrase", _phrases())
def test_every_entry_is_of_an_error_that_exists(phrase):
    texts = (text for folder in FOLDERS for path in (ROOT / folder).rglob("*.py") for text in _texts(path))
    assert any(phrase in text for text in texts), "no error says so any more: change the entry"


def test_there_is_something_to_check():
    assert len(_raised()) > 50 and len(_phrases()) > 30
