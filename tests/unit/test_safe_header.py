"""Hostile headers: refused with a sentence before anything is allocated or written by their word."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from stepquant.errors import StepQuantError
from stepquant.quant.calibration import Calibration
from stepquant.quant.file_format import FORMAT_VERSION, HEADER_KEY, read_header, read_model
from stepquant.quant.safe_header import LARGEST_HEADER_BYTES, LONGEST_TEXT

LAYER = "model.diffusion_model.middle_block.1.proj_in"
SCHEMES = {"middle_block.1.proj_in": {"weight_bits": 8, "activation": "token", "symmetric": True, "compute": "int8"}}


def _ours(**changes) -> dict:
    recipe = {"preset": "w8a8-token", "chosen_by": "preset", "groups": [0] * 64, "schemes": SCHEMES}
    header = {"version": FORMAT_VERSION, "library_version": "0.1.0", "kind": "unet", "base_model": {}, "recipe": recipe, "calibration": {}}
    return {HEADER_KEY: json.dumps({**header, **changes})}


def _write(path, header, body=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)
    return path


def _tensor(dtype, shape, start, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


NESTED = "[" * 50_000 + "]" * 50_000
HOSTILE = {
    "endless_header": lambda path: _write(path, b"{}", length=2**63 - 1),
    "header_longer_than_any_model": lambda path: _write(path, b" " * (LARGEST_HEADER_BYTES + 1)),
    "deep_json": lambda path: _write(path, f'{{"__metadata__": {NESTED}}}'.encode()),
    "deep_json_in_our_header": lambda path: _write(path, {"__metadata__": {HEADER_KEY: f'{{"version": 1, "recipe": {NESTED}}}'}}),
    "not_json": lambda path: _write(path, {"__metadata__": {HEADER_KEY: "\x00\x01"}}),
    "list_for_a_header": lambda path: _write(path, {"__metadata__": {HEADER_KEY: "[1]"}}),
    "boolean_for_a_version": lambda path: _write(path, {"__metadata__": _ours(version=True)}),
    "version_below_one": lambda path: _write(path, {"__metadata__": _ours(version=0)}),
    "offsets_beyond_the_file": lambda path: _write(path, {"__metadata__": _ours(), LAYER: _tensor("I8", [2**40], 0, 2**40)}),
    "shape_that_overflows": lambda path: _write(path, {"__metadata__": _ours(), LAYER: _tensor("I8", [2**62, 8], 0, 8)}, b"12345678"),
    "huge_shape_without_elements": lambda path: _write(path, {"__metadata__": _ours(), LAYER: _tensor("F16", [0, 2**40], 0, 0)}),
    "overlapping_tensors": lambda path: _write(
        path, {"__metadata__": _ours(), LAYER: _tensor("I8", [8], 0, 8), "b": _tensor("I8", [8], 0, 8)}, b"12345678"
    ),
    "empty_codes": lambda path: _write(
        path,
        {"__metadata__": _ours(), f"{LAYER}.qweight": _tensor("I8", [0, 64], 0, 0), f"{LAYER}.weight_scale": _tensor("F32", [0], 0, 0)},
    ),
    "empty_file": lambda path: path.write_bytes(b"") and path,
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_read_refuses_a_hostile_file_by_name(tmp_path, kind):
    path = tmp_path / "hostile.safetensors"
    HOSTILE[kind](path)
    with pytest.raises(StepQuantError, match=r"hostile\.safetensors"):
        read_model(path)


def test_calibrations_are_opened_with_the_same_care(tmp_path):
    path = _write(tmp_path / "hostile.safetensors", b" " * (LARGEST_HEADER_BYTES + 1))
    with pytest.raises(StepQuantError, match="hostile"):
        Calibration.load(path)


def test_names_in_a_file_are_never_paths(tmp_path):
    """A name that climbs out of the folder stays a name: it is text in a message, and nothing is written."""
    name = "../../outside"
    tensors = {f"model.diffusion_model.{name}.qweight": torch.zeros(4, 4, dtype=torch.int8)}
    inner = tmp_path / "models" / "inner"
    inner.mkdir(parents=True)
    save_file(tensors, str(inner / "m.safetensors"), metadata=_ours(base_model={"name": name}))
    with pytest.raises(StepQuantError):
        read_model(inner / "m.safetensors")
    assert read_header(inner / "m.safetensors").base_model["name"] == name
    assert [path.name for path in tmp_path.rglob("*")] == ["models", "inner", "m.safetensors"]


def test_texts_of_a_header_are_fit_to_be_shown(tmp_path):
    hostile = {"name": "\x1b[2J\r\n[/red]" + "x" * 10_000, "sha256": ["not", "text"]}
    save_file({"a": torch.zeros(1)}, str(tmp_path / "m.safetensors"), metadata=_ours(base_model=hostile, library_version="\x07" * 10))
    header = read_header(tmp_path / "m.safetensors")
    assert len(header.base_model["name"]) == LONGEST_TEXT and header.base_model["name"].isprintable()
    assert header.base_model["sha256"] is None and header.library_version == "unknown"
