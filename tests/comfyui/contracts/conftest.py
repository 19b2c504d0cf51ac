"""Tries one contract on every MODEL and keeps the verdicts; with STEPQUANT_RECORD_CONTRACTS set they are written for the docs."""

from __future__ import annotations

import datetime
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import comfyui_version
import pytest
import tiny_sdxl
import torch

from .subjects import ALL_MODES, MODES, ON_CPU, Family, Subject, relative_error

RECORD = "STEPQUANT_RECORD_CONTRACTS"
OURS = "ours"  # as RECORD's value: without ComfyUI's int8
RESULTS = Path(__file__).resolve().parents[3] / "benchmarks" / "results" / "contracts.json"
# In this random UNet a code more or less grows to 7 % (ComfyUI's own int8) or 10 % (convolutions too) of a two-step
# sample; what a broken contract gives is 50 % and more.
LARGEST_ERROR = 0.3
# Every feature must show more than the noise of quantization, else the test would pass without it.
SMALLEST_EFFECT = 0.05
Use = Callable[[object], torch.Tensor]


class Verdict:
    """holds, and the sentence for the table. error: |result - float result| / |float result|, None if there was no result."""

    def __init__(self, holds: bool, text: str, error: float | None = None) -> None:
        self.holds, self.text, self.error = holds, text, error


NOT_TRIED = Verdict(False, "not tried")


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    """family() is the plain SDXL; family("name", write, sample) another one, made once."""
    known: dict[str, Family] = {}

    def get(name: str = "sdxl", write: Callable[[Path], None] = tiny_sdxl.write_unet, **how) -> Family:
        if name not in known:
            folder = tmp_path_factory.mktemp(name)
            write(folder / f"{name}.safetensors")
            known[name] = Family(folder / f"{name}.safetensors", folder, **how)
        return known[name]

    return get


@pytest.fixture(scope="session")
def once():
    """once(contract, kind, make): float and native results do not depend on our compute mode, so they are made once."""
    kept: dict[tuple[str, str], object] = {}

    def get(name: str, kind: str, make: Callable):
        if (name, kind) not in kept:
            kept[name, kind] = make()
        return kept[name, kind]

    return get


@pytest.fixture(params=MODES)
def mode(request) -> str:
    return request.param


@pytest.fixture
def contract(request, family, mode, once):
    """Check `use`, what an artist does with a MODEL, on ours against the float MODEL; returns ours' error.

    Ours must give what the float MODEL gives up to the noise of quantization, and be bit for bit what it was afterwards.
    When recording, the same is tried on ComfyUI's own int8. `shows`: whether the feature changes the picture.
    """

    def check(name: str, use: Use, of: Family | None = None, shows: bool = True) -> float:
        one = of or family()
        expected = once(name, "reference", lambda: use(one.reference.model))
        if shows:
            plain = one.plain_picture
            effect = relative_error(plain, expected) if plain.shape == expected.shape else math.inf
            assert effect > SMALLEST_EFFECT, f"the feature changes the float model's picture by {effect:.3f} only: no test"
        ours = _try(one.ours(mode), use, expected)
        if os.environ.get(RECORD):
            native = once(name, "native", lambda: _try_native(one, use, expected)) if os.environ[RECORD] != OURS else NOT_TRIED
            _write(_row(name, mode, ours, native, request.node))
        if not ours.holds:
            one.discard(mode)
        assert ours.holds, f"{name}: {ours.text}"
        return ours.error

    return check


def _write(row: dict) -> None:
    """In place of the same contract's of before, so that one file can be run alone; at once, so that a run cut short loses nothing."""
    rows = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else []
    known = {(each["contract"], each["mode"]): each for each in [*rows, row]}
    RESULTS.write_text(json.dumps([known[key] for key in sorted(known, key=_place)], indent=1) + "\n", encoding="utf-8")


def _place(key: tuple[str, str]) -> tuple:
    """Of a row in the file: by contract, the CPU's modes first."""
    contract, mode = key
    return contract, ALL_MODES.index(mode)


def _try(subject: Subject, use: Use, expected: torch.Tensor) -> Verdict:
    try:
        result = use(subject.model)
    except Exception as error:
        return Verdict(False, f"fails: {type(error).__name__}: {str(error).splitlines()[0][:120]}")
    error = relative_error(result, expected)
    if not error <= LARGEST_ERROR:
        return Verdict(False, f"differs by {100 * error:.0f} %", error)
    if not subject.is_as_before():
        return Verdict(False, "leaves the model changed", error)
    return Verdict(True, "holds", error)


def _try_native(of: Family, use: Use, expected: torch.Tensor) -> Verdict:
    verdict = _try(of.native, use, expected)
    if not verdict.holds:
        of.discard_native()
    return verdict


def _row(name: str, mode: str, ours: Verdict, native: Verdict, test) -> dict:
    return {
        "contract": name,
        "ours": ours.text,
        "native": native.text,
        "mode": mode,
        "comfyui": comfyui_version.__version__,
        "device": "CPU" if ON_CPU else torch.cuda.get_device_name(),
        "utc": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "ours_error": ours.error,
        "native_error": native.error,
        "test": f"tests/comfyui/contracts/{test.path.name}::{test.originalname}",
    }
