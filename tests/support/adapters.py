"""What LoRA files of a family with names of its own are held against, whichever family it is."""

import mlx.core as mx
import numpy as np

from mlx_blockskip.converters.lora_export import NATIVE, to_diffusers, to_native
from mlx_blockskip.engine import files, philox
from mlx_blockskip.tasks.checkpoint.adapters import load_adapter

STYLES = [
    ("transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight"),
    ("diffusion_model.{}.lora_down.weight", "diffusion_model.{}.lora_up.weight"),
    ("lora_unet_{_}.lora_down.weight", "lora_unet_{_}.lora_up.weight"),
]


def assert_each_is_read(path, model, style, layers):
    """A pair of factors for every layer of theirs, in files of one style, adds its product to the layers of ours."""
    for number, (layer, modules) in enumerate(layers.items()):
        sizes = [model.shards.shape(f"{module}.weight") for module in modules]
        a = philox.normal(number, 0, shape=(3, sizes[0][1]))
        b = philox.normal(number, 1, shape=(sum(size[0] for size in sizes), 3))
        names = (one.replace("{_}", layer.replace(".", "_")).replace("{}", layer) for one in style)
        files.save_tensors(path / "x.safetensors", dict(zip(names, (mx.array(a), mx.array(b)), strict=True)))
        found = load_adapter(model, path / "x.safetensors")[0].layers(model.stack)
        assert found.keys() == set(modules)
        added = np.concatenate([np.array(found[m].weight.b.T @ found[m].weight.a.T) for m in modules])
        np.testing.assert_allclose(added, b @ a, rtol=1e-5, atol=1e-5)


def exported(model, tree, table, form):
    """An adapter's tensors in our names, and what is exported of them at half its strength."""
    tensors = {f"{model.stack.block(i).prefix}{name}": value for i, own in tree.items() for name, value in own.items()}
    if form == "diffusers":
        return tensors, to_diffusers(tensors, 0.5, table.ADAPTER_PREFIX, (), mx.float32)[0]
    naming = table.ADAPTER_NAMINGS.get(form, NATIVE[form])
    return tensors, to_native(tensors, 0.5, naming, table.ADAPTER_FORMATS[form], mx.float32)


def assert_read_as_its_product(pipeline, tensors, made):
    """diffusers' loader makes of what is exported the factors of every layer, with the adapter's own product."""
    import torch

    read = pipeline.lora_state_dict({n: torch.from_numpy(np.array(v)) for n, v in made.items()})
    modules = {name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")}
    assert {name.rpartition(".lora_")[0] for name in read} == {f"transformer.{module}" for module in modules}
    for module in modules:
        a, b = (read[f"transformer.{module}.lora_{letter}.weight"].numpy() for letter in "AB")
        wanted = 0.5 * np.array(tensors[f"{module}.lora_b"].T @ tensors[f"{module}.lora_a"].T)
        np.testing.assert_allclose(b @ a, wanted, rtol=1e-4, atol=1e-6, err_msg=module)
