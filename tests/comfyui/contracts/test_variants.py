"""SDXL in its other shapes and samplings: inpainting, refiner, v-prediction, EDM, few-step distillations."""

import comfy_extras.nodes_custom_sampler as custom
import comfy_extras.nodes_model_advanced as advanced
import pytest
import tiny_sdxl
import torch
from sampling_run import conditioning, sample_latent

from .tiny_refiner import write_refiner

NO_TENSOR = torch.zeros(0)


def _inpaint(model):
    generator = torch.Generator().manual_seed(4)
    masked = torch.randn(1, 4, 8, 8, generator=generator)
    mask = (torch.rand(1, 1, 8, 8, generator=generator) > 0.5).float()
    prompts = [conditioning(seed, concat_latent_image=masked, concat_mask=mask) for seed in (11, 12)]
    return sample_latent(model, positive=prompts[0], negative=prompts[1])


def test_inpainting(contract, family):
    inpainting = family("inpaint", lambda path: tiny_sdxl.write_unet(path, in_channels=9))
    contract("inpainting model (9 channels)", _inpaint, of=inpainting)


def test_refiner(contract, family):
    prompts = {"positive": conditioning(11, width=tiny_sdxl.CLIP_G), "negative": conditioning(12, width=tiny_sdxl.CLIP_G)}
    refiner = family("refiner", write_refiner, sample=lambda model, **how: sample_latent(model, **how, **prompts))
    contract("refiner", lambda model: sample_latent(model, steps=3, **prompts), of=refiner, shows=False)


@pytest.mark.parametrize(
    ("name", "markers"),
    [
        ("v-prediction, zero terminal SNR", {"v_pred": NO_TENSOR, "ztsnr": NO_TENSOR}),
        ("EDM (v-prediction)", {"edm_vpred.sigma_max": torch.tensor(80.0), "edm_vpred.sigma_min": torch.tensor(0.002)}),
        ("EDM (Playground 2.5)", {"edm_mean": torch.zeros(1, 4, 1, 1), "edm_std": torch.ones(1, 4, 1, 1)}),
    ],
)
def test_sampling_of_the_file(contract, family, name, markers):
    variant = family(name.replace(" ", "_"), lambda path: tiny_sdxl.write_unet(path, **markers))
    contract(name, lambda model: sample_latent(model, steps=3), of=variant, shows=False)


@pytest.mark.parametrize(("node", "sampling"), [("Discrete", "v_prediction"), ("ContinuousEDM", "edm")])
def test_sampling_node(contract, node, sampling):
    def use(model):
        if node == "Discrete":
            return sample_latent(advanced.ModelSamplingDiscrete().patch(model, sampling, False)[0])
        return sample_latent(advanced.ModelSamplingContinuousEDM().patch(model, sampling, 80.0, 0.002)[0])

    contract(f"ModelSampling{node}, {sampling}", use)


def test_turbo(contract):
    def use(model):
        sigmas = _result(custom.SDTurboScheduler, model, 2, 1.0)
        sampler = _result(custom.KSamplerSelect, "euler_ancestral")
        latent = {"samples": torch.zeros(1, 4, 8, 8)}
        return _result(custom.SamplerCustom, model, True, 1, 1.0, conditioning(11), conditioning(12), sampler, sigmas, latent)["samples"]

    contract("Turbo schedule, 2 steps, cfg 1", use)


def test_lcm(contract, add_lora):
    def use(model):
        patched = advanced.ModelSamplingDiscrete().patch(add_lora(model), "lcm", False)[0]
        return sample_latent(patched, steps=4, cfg=1.5, sampler="lcm", scheduler="sgm_uniform")

    contract("LCM LoRA, 4 steps", use)


def test_lightning(contract, add_lora):
    contract("Lightning LoRA, 4 steps", lambda model: sample_latent(add_lora(model), steps=4, cfg=1.0, scheduler="sgm_uniform"))


def _result(node, *args):
    return node.execute(*args).result[0]
