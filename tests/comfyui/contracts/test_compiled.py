"""TorchCompileModel: the whole UNet given to torch.compile. How often that compiles is in ../test_compile.py."""

from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_torch_compile import TorchCompileModel
from sampling_run import sample_latent


def _compiled(model, mode):
    """As the node does; but where the UNet is traced a CPU spends minutes in inductor's C++ compiler, and another backend is used."""
    if mode != "plain":
        return TorchCompileModel.execute(model, "inductor").result[0]
    patched = model.clone(disable_dynamic=True)
    set_torch_compile_wrapper(model=patched, backend="aot_eager")
    return patched


def test_torch_compile(contract, family, mode):
    def use(model):
        one = family()
        return one.plain_picture if model is one.reference.model else sample_latent(_compiled(model, mode))

    contract("TorchCompileModel", use, shows=False)


def test_torch_compile_with_a_lora(contract, add_lora, family, mode):
    """Put on after the first picture: a graph that holds weights would not see it."""

    def use(model):
        one = family()
        if model is one.reference.model:
            return sample_latent(add_lora(model))
        compiled = _compiled(model, mode)
        sample_latent(compiled)
        return sample_latent(add_lora(compiled))

    contract("TorchCompileModel, then LoraLoader", use)
