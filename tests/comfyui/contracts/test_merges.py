"""Model merging: quantized and float models in both orders, whole and by blocks."""

import comfy.sd
import comfy_extras.nodes_model_merging as merging
import pytest
import tiny_sdxl
from sampling_run import sample_latent


@pytest.fixture(scope="module")
def other_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("other") / "other.safetensors"
    tiny_sdxl.write_unet(path, seed=9)
    return str(path)


@pytest.fixture
def other(other_file):
    """A fresh one for each test: a merge that fails in ComfyUI's int8 leaves the other model half fetched."""
    return comfy.sd.load_diffusion_model(other_file)


def test_merge_quantized_first(contract, other):
    contract("ModelMerge, quantized first", lambda model: sample_latent(merging.ModelMergeSimple().merge(model, other, 0.5)[0]))


def test_merge_quantized_second(contract, other):
    contract("ModelMerge, quantized second", lambda model: sample_latent(merging.ModelMergeSimple().merge(other, model, 0.5)[0]))


def test_merge_by_blocks(contract, other):
    ratios = {"input": 0.3, "middle": 0.6, "out": 0.8}
    contract("ModelMergeBlocks", lambda model: sample_latent(merging.ModelMergeBlocks().merge(model, other, **ratios)[0]))


def test_difference_added(contract, other):
    """Add difference, as inpainting and turbo variants are made."""

    def use(model):
        difference = merging.ModelSubtract().merge(other, model, 0.5)[0]
        return sample_latent(merging.ModelAdd().merge(model, difference)[0])

    contract("ModelSubtract and ModelAdd", use)


def test_merge_of_loras(contract, add_lora):
    contract(
        "ModelMerge of two clones with LoRAs",
        lambda model: sample_latent(merging.ModelMergeSimple().merge(add_lora(model), add_lora(model, -0.7, seed=5), 0.5)[0]),
    )
