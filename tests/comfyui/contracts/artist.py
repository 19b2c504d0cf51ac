"""What an artist puts on a model besides LoRAs of the usual kind: other adapters, ControlNet, T2I-Adapter, IP-Adapter, DeepCache."""

from __future__ import annotations

import comfy.cldm.cldm
import comfy.controlnet
import comfy.sd
import comfy.t2i_adapter.adapter
import tiny_sdxl
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.ldm.modules.diffusionmodules.openaimodel import forward_timestep_embed
from comfy.ldm.modules.diffusionmodules.util import timestep_embedding
from safetensors.torch import save_file

TO_Q, FEED_FORWARD = (
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
    "lora_unet_middle_block_1_transformer_blocks_0_ff_net_0_proj",
)
CONV = "lora_unet_input_blocks_4_0_in_layers_2"
ATTENTION_PLACES = [("input", 4), ("input", 5), ("input", 7), ("input", 8), ("middle", 0), *(("output", n) for n in range(6))]


def _noise(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def adapter_tensors(kind: str) -> dict[str, torch.Tensor]:
    """A downloaded file's tensors on a Linear (64, 64), a Linear (1024, 128) and a 3x3 convolution (64, 32)."""
    if kind == "dora":
        tensors = tiny_sdxl.lora_tensors()
        tensors[f"{TO_Q}.dora_scale"] = torch.full((64, 1), 1.6)
        tensors[f"{FEED_FORWARD}.dora_scale"] = torch.full((1024, 1), 0.7)
        return tensors
    if kind == "loha":
        parts = {"hada_w1_a": (64, 4), "hada_w1_b": (4, 64), "hada_w2_a": (64, 4), "hada_w2_b": (4, 64)}
        return {f"{TO_Q}.{part}": _noise(*shape, seed=n, scale=0.35) for n, (part, shape) in enumerate(parts.items())}
    if kind == "lokr":
        return {
            f"{FEED_FORWARD}.lokr_w1": _noise(32, 8, seed=1, scale=0.3),
            f"{FEED_FORWARD}.lokr_w2": _noise(32, 16, seed=2, scale=0.3),
        }
    if kind == "locon_mid":
        return {
            f"{CONV}.lora_down.weight": _noise(4, 32, 1, 1, seed=1, scale=0.4),
            f"{CONV}.lora_mid.weight": _noise(4, 4, 3, 3, seed=2, scale=0.4),
            f"{CONV}.lora_up.weight": _noise(64, 4, 1, 1, seed=3, scale=0.4),
            f"{CONV}.alpha": torch.tensor(4.0),
        }
    if kind == "diff":
        return {f"{TO_Q}.diff": _noise(64, 64, seed=1, scale=0.2), f"{CONV}.diff": _noise(64, 32, 3, 3, seed=2, scale=0.1)}
    raise ValueError(kind)


def with_adapter(model, kind: str, strength: float = 1.0):
    patched = comfy.sd.load_lora_for_models(model, None, adapter_tensors(kind), strength, 0)[0]
    if len(patched.patches) <= len(model.patches) and kind != "dora":
        raise ValueError(f"ComfyUI took nothing from the {kind} file")
    return patched


def tiny_controlnet(folder):
    """A ControlNet of the tiny SDXL's shape, written to a file and opened by ComfyUI's own loader."""
    config = {
        **tiny_sdxl.TinySDXL.unet_config,
        "image_size": 32,
        "use_spatial_transformer": True,
        "legacy": False,
        "num_classes": "sequential",
        "in_channels": 4,
        "hint_channels": 3,
        "num_res_blocks": [2, 2, 2],
        "channel_mult": [1, 2, 4],
        "transformer_depth_middle": 2,
        "num_head_channels": 32,
    }
    net = comfy.cldm.cldm.ControlNet(**config, operations=tiny_sdxl.WithWeights, dtype=torch.float32, device="cpu")
    tensors = {f"control_model.{key}": tensor for key, tensor in tiny_sdxl._random(net, 21).items()}
    save_file(tensors, str(folder / "tiny_controlnet.safetensors"))
    return comfy.controlnet.load_controlnet(str(folder / "tiny_controlnet.safetensors"))


def tiny_t2i_adapter():
    channels = [tiny_sdxl.CHANNELS * factor for factor in (1, 2, 4, 4)]
    net = comfy.t2i_adapter.adapter.Adapter(cin=768, channels=channels, nums_rb=2, ksize=1, sk=True, use_conv=False, xl=True)
    return comfy.controlnet.load_t2i_adapter({key: tensor.float() for key, tensor in tiny_sdxl._random(net, 22).items()})


def with_ip_adapter(model, weight: float = 0.8, tokens: int = 4):
    """As IP-Adapter packs do: every cross-attention also attends to image tokens, through the adapter's own projections."""
    patched = model.clone()
    # Not in the checkpoint: the adapter has K and V of its own per layer.
    for number, place in enumerate(ATTENTION_PLACES):

        def attend(q, k, v, extra_options, number=number):
            heads, batch, width = extra_options["n_heads"], q.shape[0], q.shape[-1]
            text = optimized_attention(q, k, v, heads)
            keys, values = (_noise(1, tokens, width, seed=2 * number + part).expand(batch, -1, -1).to(q) for part in (0, 1))
            return text + weight * optimized_attention(q, keys, values, heads)

        patched.set_model_attn2_replace(attend, *place)
    return patched


def with_deep_cache(model, every: int = 2, depth: int = 3):
    """As DeepCache packs do: in between full steps only the outermost blocks run, on the deep features of the last full step."""
    patched, kept = model.clone(), {"step": 0, "deep": None}
    unet = patched.model.diffusion_model
    first_output = len(unet.output_blocks) - depth

    def blocks(modules, h, emb, context, options, skips=None, take=False):
        for module in modules:
            if take:
                h = torch.cat([h, skips.pop()], 1)
            shape = skips[-1].shape if take and skips else None
            h = forward_timestep_embed(module, h, emb, context, options, output_shape=shape)
            if not take:
                skips.append(h)
        return h

    def shallow(x, timesteps, context, y, options):
        emb = unet.time_embed(timestep_embedding(timesteps, unet.model_channels).to(x.dtype)) + unet.label_emb(y)
        skips: list[torch.Tensor] = []
        blocks(unet.input_blocks[:depth], x, emb, context, options, skips)
        return unet.out(blocks(unet.output_blocks[first_output:], kept["deep"], emb, context, options, skips, take=True))

    def wrapper(apply_model, arguments):
        x, sigma, given = arguments["input"], arguments["timestep"], arguments["c"]
        full = kept["step"] % every == 0
        kept["step"] += 1
        options = dict(given["transformer_options"])
        if full:
            patches = dict(options.get("patches", {}))

            def keep(h, skip, where):
                if where["block"] == ("output", first_output):
                    kept["deep"] = h
                return h, skip

            options["patches"] = {**patches, "output_block_patch": [*patches.get("output_block_patch", []), keep]}
            return apply_model(x, sigma, **{**given, "transformer_options": options})
        sampling = patched.model.model_sampling
        place = {"device": x.device, "dtype": patched.model.get_dtype_inference()}
        scaled, timesteps = sampling.calculate_input(sigma, x).to(**place), sampling.timestep(sigma).float()
        output = shallow(scaled, timesteps, given["c_crossattn"].to(**place), given["y"].to(**place), options).float()
        return sampling.calculate_denoised(sigma, output, x)

    patched.set_model_unet_function_wrapper(wrapper)
    return patched
