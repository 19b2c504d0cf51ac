"""Turns a workflow as the front end saves it into the API form that the server runs, as the front end does on Queue."""

from __future__ import annotations

# Nodes that exist in the browser only.
VIRTUAL = {"MarkdownNote", "Note", "Reroute", "PrimitiveNode"}
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}


def to_api(workflow: dict, object_info: dict) -> dict:
    """Raises AssertionError if a node's saved values do not fit its inputs: the front end would shift them silently."""
    source = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in VIRTUAL:
            continue
        inputs = {slot["name"]: source[slot["link"]] for slot in node["inputs"] if slot["link"] is not None}
        values = list(node["widgets_values"])
        for name in _widgets(object_info[node["type"]]):
            inputs[name] = values.pop(0)
            if name in ("seed", "noise_seed"):
                values.pop(0)  # "control after generate", a widget of the front end
        if values:
            raise AssertionError(f"node {node['id']} ({node['type']}) has {len(values)} values too many")
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def _widgets(info: dict) -> list[str]:
    """Names of the inputs that are widgets, in the order in which their values are saved."""
    specs = {name: spec for part in ("required", "optional") for name, spec in info["input"].get(part, {}).items()}
    order = [name for part in ("required", "optional") for name in info["input_order"].get(part, [])]
    return [name for name in order if isinstance(specs[name][0], list) or specs[name][0] in WIDGET_TYPES]
