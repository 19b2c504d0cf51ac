"""When Gluon's kernels serve a product, and that Triton's do where they cannot. The kernels themselves: tests/gpu/test_gluon.py."""

from __future__ import annotations

import logging

import pytest
import torch

from stepquant.kernels.activation import QuantizedActivation
from stepquant.kernels.design import GLUON, Design
from stepquant.kernels.int8_geglu_gemm import int8_geglu_gemm_ref
from stepquant.kernels.int8_gemm import int8_gemm_ref
from stepquant.kernels.tables import forced_design, load_table

pytest.importorskip("triton", reason="Triton is not installed: there are no kernels to choose from")

from stepquant.kernels.gluon_ops import launch as gluon_launch
from stepquant.kernels.triton_ops import int8_geglu_gemm, int8_gemm, int8_gemm_many, launch

WIDE = Design(64, 64, 64, 4, 3, backend=GLUON, rest_n=32)
MULTIPROCESSOR = 227 << 10  # bytes of shared memory


def operands(M: int, N: int, K: int) -> tuple[QuantizedActivation, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    codes, qweight = (torch.randint(-127, 128, size, dtype=torch.int8, generator=generator) for size in ((M, K), (N, K)))
    return QuantizedActivation(codes, torch.rand(M, generator=generator), None, 1), qweight, torch.rand(N, generator=generator)


@pytest.fixture
def on_hopper(monkeypatch):
    """Launchers believe to be on sm_90; nothing may be launched."""
    for module in (gluon_launch, int8_gemm, int8_geglu_gemm, int8_gemm_many):
        monkeypatch.setattr(module, "compute_capability", lambda device: 90)


def test_gluon_design_is_carried_out_by_triton_where_there_is_no_hopper():
    activation, qweight, scale = operands(70, 96, 64)
    with forced_design(WIDE):
        y = int8_gemm.int8_gemm(activation, qweight, scale, out_dtype=torch.float32)
        gated = int8_geglu_gemm.int8_geglu_gemm(activation, qweight, scale, out_dtype=torch.float32)
        many = int8_gemm_many.int8_gemm_many(activation, [(qweight, scale)] * 2, torch.float32)
    expected = int8_gemm_ref(activation, qweight, scale, out_dtype=torch.float32)
    torch.testing.assert_close(y, expected)
    expected_gated = int8_geglu_gemm_ref(activation, qweight, scale, out_dtype=torch.float32)
    assert (gated - expected_gated).norm() < 1e-4 * expected_gated.norm()
    assert len(many) == 2
    for one in many:
        torch.testing.assert_close(one, expected)


@pytest.mark.parametrize(
    "design", [design for design in set(load_table(90).rows.values()) if design.backend == GLUON], ids=lambda d: d.label
)
def test_triton_in_the_place_of_gluon_runs_two_programs_on_a_multiprocessor(design):
    operand = torch.empty(64, 64, dtype=torch.int8)
    fitted = int8_gemm.fitting(design, (operand, None, operand), 90)
    assert fitted.backend == "triton" and fitted.tma and not fitted.rest_n
    assert fitted.sums_per_thread <= 64 and 2 * gluon_launch._ring_bytes(fitted) <= MULTIPROCESSOR


@pytest.mark.parametrize(
    ("results", "row_bytes", "start", "served"),
    [
        ((torch.float16, None), 192, 0, True),
        ((torch.bfloat16, torch.empty(64, 96, dtype=torch.float16)), 192, 0, True),
        ((torch.float32, None), 384, 0, False),
        ((torch.float16, torch.empty(64, 96)), 192, 0, False),
        ((torch.float16, None), 192, 8, False),
        ((None,), 168, 0, False),
    ],
    ids=["fp16", "bf16 with fp16 addend", "fp32", "fp32 addend", "unaligned codes", "rows of 168 codes"],
)
def test_gluon_serves_16_bit_results_of_aligned_codes(on_hopper, results, row_bytes, start, served):
    wide, qweight, _ = operands(64, 96, 80)
    activation = QuantizedActivation(wide.codes[:, start : start + 64], wide.scale, None, 1)
    assert int8_gemm.serves_gluon(WIDE, activation, [qweight[:, :64].contiguous()], results, row_bytes, 90) is served


@pytest.fixture
def asked_anew():
    """What launch.gluon() found is forgotten before and after."""
    launch.gluon.cache_clear()
    yield
    launch.gluon.cache_clear()


@pytest.mark.parametrize("version", ["3.5.1", "3.10.0", "4.0.0+git"])
def test_gluon_is_left_out_with_a_triton_that_was_not_tried(monkeypatch, caplog, on_hopper, asked_anew, version):
    monkeypatch.setattr(launch.triton, "__version__", version)
    activation, qweight, _ = operands(64, 96, 64)
    with caplog.at_level(logging.WARNING):
        assert not int8_gemm.serves_gluon(WIDE, activation, [qweight], (torch.float16,), 192, 90)
    assert version in caplog.text and "Triton's own kernels are used" in caplog.text


def test_gluon_is_left_out_when_it_cannot_be_imported(monkeypatch, caplog, on_hopper, asked_anew):
    def missing(name: str, package: str) -> None:
        raise ImportError("no module named triton.experimental.gluon")

    monkeypatch.setattr(launch.importlib, "import_module", missing)
    activation, qweight, _ = operands(64, 96, 64)
    with caplog.at_level(logging.WARNING):
        assert not int8_gemm.serves_gluon(WIDE, activation, [qweight], (torch.float16,), 192, 90)
    assert "no module named" in caplog.text and "Triton's own kernels are used" in caplog.text


@pytest.mark.parametrize(
    "design", [design for design in set(load_table(90).rows.values()) if design.backend == GLUON], ids=lambda d: d.label
)
def test_addend_is_copied_early_only_where_it_costs_no_program(design):
    ring = gluon_launch._ring_bytes(design)
    staging = 2 * design.BLOCK_M * design.columns
    programs = MULTIPROCESSOR // ring
    assert gluon_launch.fits_early(design) == (MULTIPROCESSOR // (ring + staging + (4 << 10)) >= min(programs, 2))
