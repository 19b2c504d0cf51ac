"""What the front end is told about each node."""

import re
from pathlib import Path

import pytest

from .test_entry import IDS

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def schemas(graphs) -> dict:
    return graphs.schemas()


def inputs_of(schema: dict) -> dict:
    return {name: spec for part in ("required", "optional") for name, spec in schema["input"].get(part, {}).items()}


def test_every_node_is_offered(schemas):
    assert schemas.keys() == IDS


def test_every_node_has_a_name_a_category_a_description_and_other_search_words(schemas):
    for schema in schemas.values():
        assert schema["display_name"].endswith("(StepQuant)")
        assert schema["category"] == "StepQuant"
        assert len(schema["description"]) > 40
        assert schema["search_aliases"]


def test_every_input_has_a_tooltip_that_ends_in_a_sentence(schemas):
    for node_id, schema in schemas.items():
        for name, spec in inputs_of(schema).items():
            tooltip = spec[1].get("tooltip", "")
            assert len(tooltip) > 20 and tooltip.endswith("."), f"{node_id}.{name}: {tooltip!r}"


def test_every_number_and_choice_names_its_usual_value(schemas):
    for node_id, schema in schemas.items():
        for name, spec in inputs_of(schema).items():
            if spec[0] in ("INT", "FLOAT", "BOOLEAN") or (spec[0] == "COMBO" and "file" not in name):
                assert re.search(r"[Uu]sual|[Aa]ny value|1 starts from", spec[1]["tooltip"]), f"{node_id}.{name}"


def test_every_output_has_a_tooltip(schemas):
    for node_id, schema in schemas.items():
        assert all(schema["output_tooltips"]), node_id


def test_every_node_has_a_help_page_that_names_each_input(schemas):
    for node_id, schema in schemas.items():
        page = (ROOT / "web" / "docs" / f"{node_id}.md").read_text(encoding="utf-8")
        assert page.startswith(f"# {schema['display_name']}\n")
        shared = {"negative", "latent_image", "seed", "steps", "cfg", "sampler_name", "scheduler"} if "denoise" in page else set()
        missing = [name for name in inputs_of(schema) if name not in page and name not in shared]
        assert not missing, f"{node_id}.md does not mention {missing}"


def test_quantize_works_without_calibration_by_default(schemas):
    schema = schemas["StepQuantQuantize"]
    assert schema["input"]["required"]["preset"][1]["default"] == "w8a8-token"
    assert "calibration" in schema["input"]["optional"]
