"""dispatch: which backend a device gets, that it is said, and that every backend gives the layer's result."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys

import pytest
import torch

from stepquant.kernels import backend, dispatch
from stepquant.kernels.backend import Backend, BackendChoice, choose_backend, choose_fp8_backend
from stepquant.kernels.describe import describe


@pytest.fixture(autouse=True)
def fresh_choices(monkeypatch):
    monkeypatch.delenv(backend.OVERRIDE, raising=False)
    backend.forget_choices()
    yield
    backend.forget_choices()


@pytest.fixture
def pretend_gpu(monkeypatch):
    """Makes cuda:0 look like a GPU of the given capability; nothing runs on it."""

    def pretend(capability: tuple[int, int], name: str = "GPU under test") -> torch.device:
        monkeypatch.setattr(torch.version, "hip", None, raising=False)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(backend, "_try_int_mm", lambda device: True)
        monkeypatch.setattr(backend, "_try_triton", lambda device: True)
        return torch.device("cuda:0")

    return pretend


def layer(device: torch.device | str = "cpu") -> dict:
    generator = torch.Generator().manual_seed(8)
    return {
        "activation": dispatch.quantize_token(torch.randn(24, 64, generator=generator).to(device)),
        "qweight": torch.randint(-127, 128, (32, 64), generator=generator, dtype=torch.int8).to(device),
        "weight_scale": torch.rand(32, generator=generator).to(device),
    }


def run_python(program: str, **environment: str) -> str:
    """Run a program in a fresh interpreter without any StepQuant or Triton settings; its output."""
    variables = {k: v for k, v in os.environ.items() if k not in (backend.OVERRIDE, "TRITON_INTERPRET")}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=variables | environment, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_dispatch_runs_the_reference_on_the_cpu_even_with_the_interpreter_on(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.choose_backend("cpu").backend is Backend.REFERENCE


@pytest.mark.parametrize("name", [b.value for b in Backend])
def test_dispatch_obeys_the_environment(name, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv(backend.OVERRIDE, name)
    choice = dispatch.choose_backend("cpu")
    assert choice.backend.value == name
    assert backend.OVERRIDE in choice.reason


def test_dispatch_keeps_the_reference_on_the_cpu_when_triton_is_asked_for_the_gpu(monkeypatch):
    monkeypatch.setenv(backend.OVERRIDE, "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert dispatch.choose_backend("cpu").backend is Backend.REFERENCE


def test_dispatch_names_the_choices_when_the_environment_asks_for_an_unknown_one(monkeypatch, caplog):
    monkeypatch.setenv(backend.OVERRIDE, "fastest")
    assert dispatch.choose_backend("cpu").backend is Backend.REFERENCE
    assert "fastest" in caplog.text and "triton, reference, dequantized" in caplog.text


def test_dispatch_chooses_triton_on_ampere_and_newer(pretend_gpu, monkeypatch):
    monkeypatch.setattr(backend, "triton_version", lambda: "3.6.0")
    for capability in ((8, 0), (8, 9), (9, 0), (12, 0)):
        backend.forget_choices()
        assert dispatch.choose_backend(pretend_gpu(capability)) == BackendChoice(Backend.TRITON, "GPU under test with Triton 3.6.0")


def test_dispatch_falls_back_once_and_loudly_when_triton_is_missing(pretend_gpu, monkeypatch, caplog):
    monkeypatch.setattr(backend, "triton_version", lambda: None)
    device = pretend_gpu((8, 6))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert dispatch.choose_backend(device).backend is Backend.REFERENCE
    assert len(caplog.records) == 1
    assert "Triton is not installed" in caplog.text and "pip install triton" in caplog.text


def test_dispatch_falls_back_on_turing_and_says_why(pretend_gpu):
    choice = dispatch.choose_backend(pretend_gpu((7, 5), "RTX 2060"))
    assert choice.backend is Backend.REFERENCE
    assert "RTX 2060 is sm_75" in choice.reason and choice.remedy


def test_dispatch_dequantizes_when_nothing_integer_works(pretend_gpu, monkeypatch):
    device = pretend_gpu((7, 0))

    def unsupported(device):
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")

    monkeypatch.setattr(backend, "_try_int_mm", unsupported)
    choice = dispatch.choose_backend(device)
    assert choice.backend is Backend.DEQUANTIZED and not choice.backend.is_integer
    assert "no integer compute" in choice.reason


def test_dispatch_quotes_the_failure_when_a_test_kernel_does_not_run(pretend_gpu, monkeypatch):
    monkeypatch.setattr(backend, "triton_version", lambda: "3.6.0")
    device = pretend_gpu((8, 6))

    def no_compiler(device):
        raise RuntimeError("Failed to find C compiler\nsecond line")

    monkeypatch.setattr(backend, "_try_triton", no_compiler)
    choice = dispatch.choose_backend(device)
    assert choice.backend is Backend.REFERENCE
    assert "Failed to find C compiler" in choice.reason and "second line" not in choice.reason
    assert "C compiler" in choice.remedy


def test_dispatch_describes_itself_as_plain_data():
    report = describe()
    assert json.loads(json.dumps(report)) == report
    cpu = report["devices"][0]
    assert (cpu["device"], cpu["backend"]) == ("cpu", "reference")
    operations = cpu["operations"]
    assert set(operations.values()) == {"reference"}
    assert {"quantize_token", "int8_gemm", "int8_conv2d", "int8_upsample_conv2d", "fp8_gemm", "fp8_conv2d"} <= set(operations)


def test_dispatch_gives_the_reference_result_up_to_rounding_when_dequantized(monkeypatch):
    arguments = layer()
    expected = dispatch.int8_gemm(**arguments, out_dtype=torch.float32)
    x = torch.randn(2, 16, 7, 5, generator=torch.Generator().manual_seed(1))
    image = dispatch.quantize_static(x, torch.full((64,), 0.03), torch.full((64,), -90, dtype=torch.int32), torch.tensor([1]))
    qweight = torch.randint(-127, 128, (24, 3, 3, 16), generator=torch.Generator().manual_seed(2), dtype=torch.int8)
    conv = {
        "activation": image,
        "qweight": qweight,
        "weight_scale": torch.ones(24),
        "border_sums": dispatch.border_sums(qweight),
        "stride": 2,
    }
    expected_conv = dispatch.int8_conv2d(**conv, out_dtype=torch.float32)
    monkeypatch.setenv(backend.OVERRIDE, "dequantized")
    backend.forget_choices()
    torch.testing.assert_close(dispatch.int8_gemm(**arguments, out_dtype=torch.float32), expected, rtol=1e-4, atol=1e-3)
    result = dispatch.int8_conv2d(**conv, out_dtype=torch.float32)
    torch.testing.assert_close(result, expected_conv, rtol=1e-4, atol=1e-3)
    assert result.stride() == expected_conv.stride()


def test_dispatch_gives_the_same_result_when_compiled():
    arguments = layer()

    def linear(x: torch.Tensor) -> torch.Tensor:
        return dispatch.int8_gemm(dispatch.quantize_token(x), arguments["qweight"], arguments["weight_scale"], out_dtype=torch.float32)

    x = torch.randn(24, 64, generator=torch.Generator().manual_seed(8))
    assert torch.equal(torch.compile(linear, backend="eager")(x), linear(x))


def test_dispatch_needs_no_triton_on_the_cpu_and_does_not_import_it():
    program = (
        "import sys, torch\n"
        "from stepquant.kernels import describe, dispatch as d\n"
        "print('imported' if 'triton' in sys.modules else 'not imported')\n"
        "sys.modules['triton'] = None\n"
        "y = d.int8_gemm(d.quantize_token(torch.ones(2, 8)), torch.ones(3, 8, dtype=torch.int8), torch.ones(3))\n"
        "print(y.tolist(), describe.describe()['triton'])"
    )
    assert run_python(program).splitlines() == ["not imported", "[[8.0, 8.0, 8.0], [8.0, 8.0, 8.0]] None"]


def test_dispatch_unrolls_where_triton_compiles_int8_badly(triton_device):
    from stepquant.kernels.triton_ops.launch import unroll_factor

    assert [unroll_factor(sm, "3.7.1") for sm in (80, 89, 90)] == [1, 1, 1]
    assert [unroll_factor(sm, "3.8.0") for sm in (80, 89, 90, 120)] == [2, 2, 1, 1]
    assert unroll_factor(86, "3.10.0+git123") == 2


@pytest.mark.parametrize(("capability", "expected"), [((8, 6), Backend.DEQUANTIZED), ((8, 9), Backend.TRITON), ((9, 0), Backend.TRITON)])
def test_fp8_layers_run_dequantized_and_say_so_where_the_gpu_has_no_fp8(pretend_gpu, caplog, capability, expected):
    pretend_gpu(capability)
    assert choose_backend("cuda:0").backend is Backend.TRITON
    assert choose_fp8_backend("cuda:0").backend is expected
    choose_fp8_backend("cuda:0")
    said = [record for record in caplog.records if "fp8" in record.getMessage()]
    assert len(said) == (expected is Backend.DEQUANTIZED)
    assert all("w8a8-token" in record.getMessage() for record in said)


def test_fp8_layers_run_the_reference_on_the_cpu():
    assert choose_fp8_backend("cpu").backend is Backend.REFERENCE
