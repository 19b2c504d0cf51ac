"""What a workflow remembers of the quantized file it was made with, and what to say when the file here is not that one.

Kept as the Load node's property `stepquant_file`, so it travels with a saved workflow and in a picture's metadata: name,
size, SHA-256, format, recipe at a glance, base model. Reads headers and hashes; loads no weights.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import lru_cache

import folder_paths

from ..errors import StepQuantError
from ..quant.file_format import Header, read_header
from ..quant.safe_header import printable
from .base_file import sha256
from .file_names import file_state
from .report import scheme_counts

PROPERTY = "stepquant_file"
FOLDERS = ("diffusion_models", "checkpoints")
SHOWN_DIGITS = 12
PUT_THERE = "Put the file there (ask whoever shared the workflow, or make it with Quantize and Save quantized), then press R"


def find_file(file_name: str) -> str | None:
    """Full path of `checkpoints/my-model.safetensors`, or None. Looks in the two model folders only."""
    folder, _, name = file_name.replace("\\", "/").partition("/")
    return folder_paths.get_full_path(folder, name) if folder in FOLDERS and name else None


def identify(file_name: str, path: str, header: Header) -> dict[str, object]:
    """What to remember. Hashes the file, with progress, unless it has been hashed since it last changed."""
    return {
        "file": file_name,
        "size_bytes": os.path.getsize(path),
        "sha256": _cached_sha256(path, file_state(path)),
        "format": header.version,
        "preset": header.recipe.preset,
        "chosen_by": header.recipe.chosen_by,
        "timestep_groups": len(set(header.recipe.groups)),
        "schemes": scheme_counts(header.recipe),
        "base_model": dict(header.base_model),
    }


def remembered(extra_pnginfo: object, node_id: object) -> dict | None:
    """What the workflow that is being run remembers for this Load node; None for an API graph or a node that never ran."""
    for node in _load_nodes(extra_pnginfo, node_id):
        known = (node.get("properties") or {}).get(PROPERTY)
        return known if isinstance(known, dict) else None
    return None


def remember(extra_pnginfo: object, node_id: object, identity: Mapping[str, object]) -> None:
    """Write it into the workflow that is being run, so that this run's pictures carry it. The browser keeps its own copy."""
    for node in _load_nodes(extra_pnginfo, node_id):
        node.setdefault("properties", {})[PROPERTY] = dict(identity)


def _load_nodes(extra_pnginfo: object, node_id: object) -> Iterator[dict]:
    workflow = extra_pnginfo.get("workflow") if isinstance(extra_pnginfo, dict) else None
    if not isinstance(workflow, dict):
        return
    # In a subgraph the id is "outer:inner", and the node is listed with the subgraph's definition.
    wanted = str(node_id).rpartition(":")[2]
    subgraphs = (workflow.get("definitions") or {}).get("subgraphs") or []
    for graph in (workflow, *subgraphs):
        for node in graph.get("nodes") or []:
            if str(node.get("id")) == wanted and node.get("type") == "StepQuantLoad":
                yield node


def difference(known: Mapping[str, object] | None, identity: Mapping[str, object]) -> str | None:
    """One sentence if the workflow was made with another file of this name; None if not, or if another name was chosen since."""
    if known is None or known.get("file") != identity["file"] or known.get("sha256") in (None, identity["sha256"]):
        return None
    return _different(str(identity["file"]), known, f"SHA-256 {_short(identity['sha256'])}", f"{_short(known.get('sha256'))}")


def opening_message(known: Mapping[str, object]) -> str | None:
    """One sentence if the file a workflow remembers is missing, newer, damaged or plainly another one here; None if it looks right.

    Quick: looks at name, size and header. Whether every byte is the same shows when the file is loaded.
    """
    name = printable(known.get("file")) or "no file name"
    path = find_file(name)
    if path is None:
        return f"{missing(name)} The workflow was made with {_described(known)}."
    try:
        read_header(path)
    except StepQuantError as error:
        return str(error).replace(path, name)
    size = os.path.getsize(path)
    if isinstance(known.get("size_bytes"), int) and known["size_bytes"] != size:
        return _different(name, known, f"{size} bytes", f"{known['size_bytes']} bytes")
    return None


def missing(file_name: str) -> str:
    """One sentence about a file that is not here, or is elsewhere."""
    base = os.path.basename(file_name.replace("\\", "/"))
    found = [f"{folder}/{name}" for folder in FOLDERS for name in folder_paths.get_filename_list(folder) if os.path.basename(name) == base]
    if base and found:
        return f"{file_name}: no such file in models/checkpoints or models/diffusion_models, but there is {found[0]}. Choose that one."
    return f"{file_name}: no such file in models/checkpoints or models/diffusion_models. {PUT_THERE}, or choose another one."


def _different(name: str, known: Mapping[str, object], found: str, expected: str) -> str:
    return (
        f"{name}: another file than this workflow was made with ({found}; it was {expected}, {_described(known)}). Pictures may differ. "
        "Put that file in its place, or choose this one again in the node to keep it."
    )


def _described(known: Mapping[str, object]) -> str:
    base = known.get("base_model")
    name = printable(base.get("name")) if isinstance(base, Mapping) else None
    parts = [printable(known.get("preset")) or "an unknown recipe", f"of {name}" if name else "", f"SHA-256 {_short(known.get('sha256'))}"]
    return " ".join(part for part in parts if part)


def _short(digest: object) -> str:
    return (printable(digest) or "unknown")[:SHOWN_DIGITS]


@lru_cache(maxsize=64)
def _cached_sha256(path: str, _state: str) -> str:
    return sha256(path)
