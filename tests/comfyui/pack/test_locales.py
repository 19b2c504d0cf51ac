"""Names and tooltips in every language the pack speaks: complete, and the English ones are the nodes' own."""

from __future__ import annotations

import json
import os

import pytest

from .conftest import ROOT

LANGUAGES = ("en", "zh", "ja")
# Set to write locales/en/nodeDefs.json from the nodes; the other languages are translated by hand.
REWRITE = "STEPQUANT_WRITE_LOCALES"


def read(language: str) -> dict:
    return json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))


def from_schemas(schemas: dict) -> dict:
    """As ComfyUI reads nodeDefs.json."""
    found = {}
    for node_id, schema in sorted(schemas.items()):
        inputs = {name: spec for part in ("required", "optional") for name, spec in schema["input"].get(part, {}).items()}
        outputs = zip(schema["output_name"], schema["output_tooltips"], strict=True)
        found[node_id] = {
            "display_name": schema["display_name"],
            "description": schema["description"],
            "inputs": {name: {"name": name, "tooltip": spec[1]["tooltip"]} for name, spec in inputs.items()},
            "outputs": {str(number): {"name": name, "tooltip": tooltip} for number, (name, tooltip) in enumerate(outputs)},
        }
    return found


def keys(part: object) -> object:
    return {key: keys(value) for key, value in part.items()} if isinstance(part, dict) else None


def test_english_is_what_the_nodes_say(graphs):
    expected = from_schemas(graphs.schemas())
    if os.environ.get(REWRITE):
        text = json.dumps(expected, ensure_ascii=False, indent=2) + "\n"
        (ROOT / "locales" / "en" / "nodeDefs.json").write_text(text, encoding="utf-8")
    assert read("en") == expected, f"run this test once with {REWRITE}=1, then translate what is new"


@pytest.mark.parametrize("language", LANGUAGES[1:])
def test_translations_are_complete(language):
    english, translated = read("en"), read(language)
    assert keys(translated) == keys(english)
    for node_id, node in translated.items():
        assert node["description"] != english[node_id]["description"]
        for name, given in node["inputs"].items():
            assert given["tooltip"] and given["tooltip"] != english[node_id]["inputs"][name]["tooltip"], f"{node_id}.{name}"
        assert node["display_name"].endswith("(StepQuant)")
