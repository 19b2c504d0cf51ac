"""The file: exact round trip, and one readable sentence for everything that can be wrong with it."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from stepquant.errors import FormatError, SchemeError
from stepquant.quant import atomic_file
from stepquant.quant.file_format import QuantizedLayer, QuantizedModel, read_header, read_model, write_model
from stepquant.quant.recipe import Recipe
from stepquant.quant.scheme import FP8 as FP8_SCHEME
from stepquant.quant.scheme import ActivationMode, Scheme
from stepquant.quant.weight import FP8, quantize_weight

LINEAR, CONV = "middle_block.1.proj_in", "middle_block.0.in_layers.2"


def _model(**changes) -> QuantizedModel:
    generator = torch.Generator().manual_seed(0)
    linear = quantize_weight(torch.randn(8, 16, generator=generator), LINEAR)
    conv = quantize_weight(torch.randn(8, 4, 3, 3, generator=generator), CONV)
    layers = {
        LINEAR: QuantizedLayer(linear.codes, linear.scale, bias=torch.randn(8, generator=generator).half()),
        CONV: QuantizedLayer(conv.codes, conv.scale, None, torch.rand(64, generator=generator) + 0.1, torch.zeros(64, dtype=torch.int32)),
    }
    schemes = {LINEAR: Scheme(), CONV: Scheme(activation=ActivationMode.STATIC, symmetric=False)}
    rest = {"out.2.weight": torch.randn(4, 8, 3, 3, generator=generator).half()}
    parts = {"layers": layers, "rest": rest, "recipe": Recipe(schemes, "test", "test"), "base_model": {"name": "base", "sha256": "00"}}
    return QuantizedModel(**(parts | changes))


def _write(path, **changes):
    write_model(path, _model(**changes), "0.1.0")
    return path


def _rewrite(path, change_tensors=None, change_header=None):
    """The same file with tensors or header changed by hand."""
    with safe_open(str(path), "pt") as file:
        tensors, metadata = {key: file.get_tensor(key).clone() for key in file.keys()}, file.metadata()  # noqa: SIM118
    if change_tensors:
        change_tensors(tensors)
    if change_header:
        header = json.loads(metadata["stepquant"])
        change_header(header)
        metadata["stepquant"] = json.dumps(header)
    save_file(tensors, str(path), metadata=metadata)


def test_write_then_read_returns_the_same_bits(tmp_path):
    model = _model(extra={"first_stage_model.taesd_decoder.1.weight": torch.ones(2)})
    write_model(tmp_path / "m.safetensors", model, "0.1.0")
    loaded = read_model(tmp_path / "m.safetensors")
    for name, layer in model.layers.items():
        for part, tensor in vars(layer).items():
            other = getattr(loaded.layers[name], part)
            assert other is None if tensor is None else torch.equal(tensor, other), (name, part)
    assert torch.equal(loaded.rest["out.2.weight"], model.rest["out.2.weight"])
    assert set(loaded.extra) == set(model.extra)
    assert loaded.recipe == model.recipe
    assert loaded.base_model == model.base_model


def test_read_header_tells_kind_and_version_without_reading_tensors(tmp_path):
    header = read_header(_write(tmp_path / "m.safetensors"))
    assert (header.kind, header.version, header.library_version) == ("unet", 1, "0.1.0")
    whole = _write(tmp_path / "whole.safetensors", extra={"first_stage_model.x": torch.ones(1)})
    assert read_header(whole).kind == "checkpoint"


def test_no_key_of_a_quantized_layer_is_called_weight(tmp_path):
    # a stock loader that found `weight` would take codes for weights
    with safe_open(str(_write(tmp_path / "m.safetensors")), "pt") as file:
        assert not [key for key in file.keys() if LINEAR in key and key.endswith(".weight")]  # noqa: SIM118


def test_read_model_says_the_file_is_damaged_when_truncated(tmp_path):
    path = _write(tmp_path / "m.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FormatError, match=r"m\.safetensors: the file is damaged or incomplete"):
        read_model(path)


def test_read_model_asks_for_an_update_when_the_format_is_newer(tmp_path):
    path = _write(tmp_path / "m.safetensors")
    _rewrite(path, change_header=lambda header: header.update(version=99))
    with pytest.raises(FormatError, match=r"made by a newer StepQuant \(format 99"):
        read_model(path)


def test_read_model_refuses_a_plain_safetensors_file(tmp_path):
    save_file({"x": torch.ones(2)}, str(tmp_path / "plain.safetensors"))
    with pytest.raises(FormatError, match="this is not a StepQuant model"):
        read_model(tmp_path / "plain.safetensors")


def test_read_model_names_a_missing_file(tmp_path):
    with pytest.raises(FormatError, match=r"absent\.safetensors: no such file"):
        read_model(tmp_path / "absent.safetensors")


KEY = f"model.diffusion_model.{LINEAR}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{KEY}.weight_scale"), "weight_scale is missing"),
        (lambda t: t[f"{KEY}.weight_scale"].fill_(float("nan")), "weight_scale must be 8 positive"),
        (lambda t: t.update({f"{KEY}.weight_scale": torch.ones(7)}), "weight_scale must be 8 positive"),
        (lambda t: t.update({f"{KEY}.qweight": torch.ones(8, 16)}), "qweight is torch.float32"),
        (lambda t: t.update({f"{KEY}.bias": torch.ones(3)}), "bias must be 8 finite"),
        (lambda t: t.update({f"model.diffusion_model.{CONV}.act_scale": torch.zeros(64)}), "act_scale must be 64 positive"),
        (lambda t: t.pop(f"model.diffusion_model.{CONV}.act_zero_point"), "act_zero_point must be 64"),
        (lambda t: t.update({"model.diffusion_model.stray.qweight": torch.ones(1)}), "stray.qweight: has no scheme"),
    ],
    ids=["missing", "nan-scale", "scale-shape", "float-codes", "bias-shape", "zero-scale", "no-zero-point", "stray"],
)
def test_read_model_names_file_and_layer_when_a_tensor_is_wrong(tmp_path, change, message):
    path = _write(tmp_path / "m.safetensors")
    _rewrite(path, change_tensors=change)
    with pytest.raises(FormatError, match=message) as error:
        read_model(path)
    assert "m.safetensors" in str(error.value)


@pytest.mark.parametrize("text", ["[" * 100_000, "{", '"text"', "{}"], ids=["deep", "cut", "string", "empty"])
def test_read_model_refuses_a_hostile_header(tmp_path, text):
    save_file({"x": torch.ones(1)}, str(tmp_path / "m.safetensors"), metadata={"stepquant": text})
    with pytest.raises(FormatError, match="header of this file is damaged"):
        read_model(tmp_path / "m.safetensors")


def test_read_model_names_the_layer_when_its_scheme_is_unknown(tmp_path):
    path = _write(tmp_path / "m.safetensors")
    _rewrite(path, change_header=lambda header: header["recipe"]["schemes"][LINEAR].update(activation="hologram"))
    with pytest.raises(SchemeError, match=LINEAR):
        read_model(path)


def test_write_model_names_a_missing_folder(tmp_path):
    with pytest.raises(FormatError, match="cannot write here"):
        _write(tmp_path / "absent" / "m.safetensors")


def test_write_model_names_a_read_only_folder(tmp_path, monkeypatch):
    def refuse(*_args, **_kwargs):  # root may write to any folder, so the system's answer is simulated
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(atomic_file.tempfile, "mkstemp", refuse)
    with pytest.raises(FormatError, match=r"cannot write here \(Permission denied"):
        _write(tmp_path / "m.safetensors")


def test_write_model_keeps_the_old_file_and_no_scraps_when_the_disk_is_full(tmp_path, monkeypatch):
    path = _write(tmp_path / "m.safetensors")
    before = path.read_bytes()

    def full_disk(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic_file, "save_file", full_disk)
    with pytest.raises(FormatError, match="No space left on device"):
        _write(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["m.safetensors"]


def test_write_model_leaves_no_scraps_when_cancelled(tmp_path, monkeypatch):
    def cancel(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(atomic_file, "save_file", cancel)
    with pytest.raises(KeyboardInterrupt):
        _write(tmp_path / "m.safetensors")
    assert list(tmp_path.iterdir()) == []


def _fp8_model() -> QuantizedModel:
    weight = quantize_weight(torch.randn(8, 16, generator=torch.Generator().manual_seed(0)), LINEAR, FP8)
    layer = QuantizedLayer(weight.codes, weight.scale, bias=torch.zeros(8).half())
    return _model(layers={LINEAR: layer}, recipe=Recipe({LINEAR: FP8_SCHEME}, "w8a8-fp8", "preset"))


def test_fp8_codes_come_back_bit_for_bit(tmp_path):
    model = _fp8_model()
    write_model(tmp_path / "m.safetensors", model, "0.1.0")
    with safe_open(str(tmp_path / "m.safetensors"), "pt") as file:
        assert file.get_slice(f"model.diffusion_model.{LINEAR}.qweight").get_dtype() == "F8_E4M3"
    loaded = read_model(tmp_path / "m.safetensors").layers[LINEAR]
    assert loaded.qweight.dtype is FP8
    assert torch.equal(loaded.qweight.view(torch.uint8), model.layers[LINEAR].qweight.view(torch.uint8))
    assert torch.equal(loaded.weight_scale, model.layers[LINEAR].weight_scale)


@pytest.mark.parametrize("nan", [0x7F, 0xFF], ids=hex)
def test_read_names_the_layer_when_fp8_codes_hold_nan(tmp_path, nan):
    path = tmp_path / "m.safetensors"
    write_model(path, _fp8_model(), "0.1.0")

    def damage(tensors):
        tensors[f"model.diffusion_model.{LINEAR}.qweight"].view(torch.uint8)[3, 5] = nan

    _rewrite(path, damage)
    with pytest.raises(FormatError, match=f"{LINEAR}: qweight holds NaN"):
        read_model(path)


def test_read_names_the_layer_when_codes_are_not_of_the_schemes_type(tmp_path):
    path = tmp_path / "m.safetensors"
    write_model(path, _fp8_model(), "0.1.0")
    key = f"model.diffusion_model.{LINEAR}.qweight"
    _rewrite(path, lambda tensors: tensors.update({key: tensors[key].view(torch.int8)}))
    with pytest.raises(FormatError, match=f"{LINEAR}: qweight is torch.int8 .* torch.float8_e4m3fn"):
        read_model(path)
