"""Turns a workflow as the front end saves it into the API form that the server runs, as the front end does on Queue."""

from __future__ import annotations

# Nodes that exist in the browser only.
VIRTUAL = {"MarkdownNote", "Note", "Reroute", "PrimitiveNode"}
MUTED, BYPASSED = 2, 4  # a node's mode
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}


def to_api(workflow: dict, object_info: dict) -> dict:
    """Raises AssertionError if a node's saved values do not fit its inputs: the front end would shift them silently."""
    nodes = {node["id"]: node for node in workflow["nodes"]}
    source = {link[0]: _origin(nodes[link[1]], link[2]) for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in VIRTUAL or node["mode"] in (MUTED, BYPASSED):
            continue
        info, linked = (
            object_info[node["type"]],
            {slot["name"]: source[slot["link"]] for slot in node["inputs"] if slot["link"] is not None},
        )
        inputs, values = dict(linked), list(node["widgets_values"])
        for name in _widgets(info):
            if not values and name in info["input"].get("optional", {}):
                continue  # saved before the input existed
            value = values.pop(0)
            inputs[name] = linked.get(name, value)
            if values and (name in ("seed", "noise_seed") or _is_upload(info, name)):
                values.pop(0)  # "control after generate" or the upload button: widgets of the front end
        if values:
            raise AssertionError(f"node {node['id']} ({node['type']}) has {len(values)} values too many")
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def _origin(node: dict, slot: int) -> object:
    """What a link brings: an output, or the value of a PrimitiveNode, which exists in the browser only."""
    return node["widgets_values"][0] if node["type"] == "PrimitiveNode" else [str(node["id"]), slot]


def _is_upload(info: dict, name: str) -> bool:
    specs = info["input"].get("required", {}) | info["input"].get("optional", {})
    return len(specs[name]) > 1 and bool(specs[name][1].get("image_upload"))


def _widgets(info: dict) -> list[str]:
    """Names of the inputs that are widgets, in the order in which their values are saved."""
    specs = {name: spec for part in ("required", "optional") for name, spec in info["input"].get(part, {}).items()}
    order = [name for part in ("required", "optional") for name in info["input_order"].get(part, [])]
    return [name for name in order if isinstance(specs[name][0], list) or specs[name][0] in WIDGET_TYPES]
