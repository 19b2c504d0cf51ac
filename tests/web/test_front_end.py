"""The pack in the real front end: found by search, values kept, reports shown in both renderers and themes, files remembered."""

from __future__ import annotations

import pytest

from ..comfyui.pack import workflows as w

SEARCH = "input[placeholder*='Add a node']"
FILE = "checkpoints/shared.safetensors"
WIDGETS = {"StepQuantQuantize": ["w8a8-static", 5], "StepQuantSave": ["my/model", True]}


@pytest.fixture(scope="module")
def compared(front_end):
    """A graph with Quantize and Compare, run once."""
    front_end.load(w.stock_parts() | w.quantize() | w.compare(runs=1))
    front_end.run()
    return front_end


def test_node_is_added_from_the_search_box(front_end):
    page = front_end.page
    front_end.load_workflow({"nodes": [], "links": [], "version": 0.4})
    page.mouse.dblclick(700, 500)
    page.locator(SEARCH).last.fill("quantize sdxl")
    page.get_by_text("Quantize SDXL").last.wait_for()
    page.keyboard.press("Enter")
    page.wait_for_function("() => app.graph.nodes.length > 0")
    page.mouse.click(700, 500)  # the new node hangs on the pointer
    assert [node["type"] for node in front_end.workflow()["nodes"]] == ["StepQuantQuantize"]


def test_widget_values_survive_saving_and_opening(front_end):
    graph = w.stock_parts() | w.quantize("w8a8-static") | w.save("my/model", overwrite=True)
    graph["quantize"]["inputs"]["timestep_groups"] = 5
    front_end.load(graph)
    saved = front_end.workflow()
    front_end.load_workflow(saved)
    for kind, values in WIDGETS.items():
        assert front_end.node(kind)["widgets_values"][: len(values)] == values


@pytest.mark.parametrize("vue", [False, True], ids=["canvas", "nodes_2"])
def test_reports_are_shown_on_the_nodes(compared, vue):
    compared.setting("Comfy.VueNodes.Enabled", vue)
    compared.run()  # answered from ComfyUI's cache
    page = compared.page
    page.wait_for_selector(".stepquant-panel .stepquant-report")
    assert page.locator(".stepquant-panel .stepquant-report").count() == 2  # Quantize and Compare
    texts = " ".join(page.locator(".stepquant-panel").all_inner_texts())
    for part in ("257 layers", "W8, token, int8", "StepQuant", "SQNR at each step", "PSNR"):
        assert part in texts
    assert page.locator(".stepquant-plot .stepquant-dot").count() == w.STEPS


def test_slider_moves_between_original_and_quantized(compared):
    slider, before = compared.page.locator(".stepquant-slider").first, compared.page.locator(".stepquant-before").first
    shown = []
    for value in ("10", "90"):
        slider.evaluate("(one, value) => { one.value = value; one.dispatchEvent(new Event('input')); }", value)
        shown.append(before.evaluate("(image) => image.style.clipPath"))
    assert "90%" in shown[0] and "10%" in shown[1]
    assert before.evaluate("(image) => image.complete && image.naturalWidth") == w.SIDE


def test_panel_leaves_the_saved_values_alone(compared):
    """A DOM widget that is saved would shift the values of the widgets after it."""
    saved = compared.workflow()
    quantize = next(node for node in saved["nodes"] if node["type"] == "StepQuantQuantize")
    assert quantize["widgets_values"][:2] == ["w8a8-token", 8]
    assert not any("report" in str(value) for value in quantize["widgets_values"])


@pytest.mark.parametrize("theme", ["dark", "light"])
def test_sidebar_is_readable_in_both_themes(compared, theme):
    page = compared.page
    compared.setting("Comfy.ColorPalette", theme)
    if not page.locator(".stepquant-sidebar").count():
        page.locator(".stepquant-tab-button").click()
    page.wait_for_selector(".stepquant-sidebar .stepquant-card")
    assert page.locator(".stepquant-sidebar .stepquant-card").count() >= 2
    ink = page.locator(".stepquant-sidebar .stepquant-title").first.evaluate("(one) => getComputedStyle(one).color")
    brightness = sum(int(part) for part in ink.removeprefix("rgba(").removeprefix("rgb(").split(")")[0].split(",")[:3]) / 3
    assert (brightness > 150) == (theme == "dark"), ink
    compared.setting("Comfy.ColorPalette", "dark")


def test_workflow_remembers_its_file_and_a_picture_brings_it_back(front_end, base):
    front_end.load(w.stock_parts() | w.quantize() | w.save("shared"))
    front_end.run()
    front_end.page.evaluate("() => app.refreshComboInNodes()")
    front_end.load(w.stock_parts() | w.load_quantized(FILE) | w.sample(model="load", prefix="dropped"))
    front_end.run()
    known = front_end.node("StepQuantLoad")["properties"]["stepquant_file"]
    assert known["file"] == FILE and len(known["sha256"]) == 64 and known["preset"] == "w8a8-token"
    front_end.load_workflow({"nodes": [], "links": [], "version": 0.4})
    front_end.open_picture(next((base / "output").glob("dropped*.png")))
    again = front_end.node("StepQuantLoad")
    assert again["properties"]["stepquant_file"] == known and again["widgets_values"][0] == FILE
    assert "StepQuant" not in front_end.toasts()


def test_opening_a_workflow_whose_file_is_missing_names_it(front_end, base):
    workflow = front_end.workflow()
    path = base / "models" / FILE
    path.rename(path.with_suffix(".away"))
    try:
        front_end.load_workflow(workflow)
        front_end.page.wait_for_selector(".p-toast-message")
        said = front_end.toasts()
    finally:
        path.with_suffix(".away").rename(path)
    assert f"{FILE}: no such file" in said and "w8a8-token of demo.safetensors" in said and "Put the file there" in said
    assert "no such file" in " ".join(front_end.page.locator(".stepquant-panel").all_inner_texts())
    front_end.close_toasts()


def test_nothing_of_ours_failed_in_the_browser(front_end):
    assert not front_end.errors
