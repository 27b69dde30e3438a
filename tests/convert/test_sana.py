"""SANA's table against the reference at full size (nothing is allocated), and LoRA files of diffusers and PEFT."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_blockskip.converters import lora_files, sana
from mlx_blockskip.converters.lora_layers import Layers
from mlx_blockskip.converters.lora_scales import Strengths
from mlx_blockskip.converters.peft import to_peft
from mlx_blockskip.converters.views import Stored, whole
from mlx_blockskip.converters.write import Precision, exceptions, plan_shards
from mlx_blockskip.engine import files, philox
from mlx_blockskip.models.sana.transformer import SanaTransformer2DConfig
from support.compare import assert_parity, relative_error
from support.sana import MODULES, Network, converted, random_transformer

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

SANA_1600M = {
    **{"in_channels": 32, "out_channels": 32, "num_attention_heads": 70, "attention_head_dim": 32, "num_layers": 20},
    **{"num_cross_attention_heads": 20, "cross_attention_head_dim": 112, "cross_attention_dim": 2240},
    **{"caption_channels": 2304, "mlp_ratio": 2.5, "attention_bias": False, "sample_size": 32, "patch_size": 1},
    **{"norm_elementwise_affine": False, "norm_eps": 1e-6},
}
SANA_600M = SANA_1600M | {
    **{"num_attention_heads": 36, "num_layers": 28},
    **{"num_cross_attention_heads": 16, "cross_attention_head_dim": 72, "cross_attention_dim": 1152},
}


@pytest.mark.parametrize(
    "config",
    [
        SANA_1600M,
        SANA_600M,
        SANA_1600M | {"num_layers": 60, "qk_norm": "rms_norm_across_heads"},
        SANA_600M | {"qk_norm": "rms_norm_across_heads", "guidance_embeds": True},
        SANA_1600M | {"interpolation_scale": 2, "sample_size": 128},
        SANA_600M | {"patch_size": 2, "norm_elementwise_affine": True, "attention_bias": True, "out_channels": None},
    ],
    ids=["1.6B", "0.6B", "1.5 4.8B", "Sprint 0.6B", "4K", "patches"],
)
def test_the_table_names_every_tensor_of_the_reference(config):
    from diffusers import SanaTransformer2DModel

    with torch.device("meta"):
        expected = {name: tuple(t.shape) for name, t in SanaTransformer2DModel(**config).state_dict().items()}
    rows = sana.transformer("transformer", SanaTransformer2DConfig(**config)).rows
    assert len({row.name for row in rows}) == len(rows)
    assert {row.name for row in rows} == set(expected)
    assert [row.name for row in rows if not row.fits(expected[row.name])] == []


def test_a_shard_a_block_and_smaller_groups_where_64_does_not_divide():
    component = sana.transformer("transformer", SanaTransformer2DConfig(**SANA_1600M))
    shards = {shard.file: shard for shard in plan_shards(component, Precision("bfloat16", 4))}
    assert set(shards) == {f"block-{i:03d}.safetensors" for i in range(20)} | {"rest.safetensors"}
    assert not shards["rest.safetensors"].groups
    groups = shards["block-003.safetensors"].groups
    assert groups["transformer_blocks.3.ff.conv_inverted.weight"] == 64
    assert groups["transformer_blocks.3.ff.conv_point.weight"] == 32
    assert not any("conv_depth" in name or "table" in name for name in groups)
    found = exceptions(component, Precision("bfloat16", 4))
    assert found == {f"transformer/transformer_blocks.{i}.ff.conv_point": 32 for i in range(20)}


def given(network):
    latents, text = (philox.normal(0, i, shape=shape) for i, shape in enumerate([(1, 4, 6, 6), (1, 5, 24)]))
    return mx.array(latents), np.array([0.6], np.float32), mx.array(text), np.ones((1, 5), np.float32)


def theirs(reference, latents, sigma, text, mask):
    with torch.no_grad():
        found = reference(
            hidden_states=torch.from_numpy(np.array(latents).transpose(0, 3, 1, 2)),
            encoder_hidden_states=torch.from_numpy(np.array(text)),
            timestep=torch.from_numpy(sigma * 1000),
            encoder_attention_mask=torch.from_numpy(mask),
        ).sample
    return found.permute(0, 2, 3, 1).numpy()


def by_block(tensors, depth):
    prefixes = [f"transformer_blocks.{i}." for i in range(depth)]
    return {
        i: {name.removeprefix(p): value for name, value in tensors.items() if name.startswith(p)}
        for i, p in enumerate(prefixes)
    }


def read_back(tensors, network, folder):
    source = folder / "lora.safetensors"
    files.save_tensors(source, tensors)
    views = {name: whole(Stored(source, entry)) for name, entry in files.read_header(source).entries.items()}
    entries, left_out = lora_files.read(views, Strengths(), Layers(network.shards), source)
    assert left_out == []
    return {f"{e.module}.lora_{letter}": getattr(e.added.weight, letter) for e in entries for letter in "ab"}


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_diffusers_loads_our_factors_and_gives_our_velocity(tmp_path, scale):
    pytest.importorskip("peft")
    from diffusers import SanaPipeline

    reference = random_transformer()
    network = Network(converted(tmp_path, reference))
    tensors = {}
    for number, module in enumerate(MODULES):
        path = f"transformer_blocks.1.{module}"
        out, width = network.shards.shape(f"{path}.weight")
        tensors[f"{path}.lora_a"] = mx.array(philox.normal(1, number, 0, shape=(width, 3))) / width**0.5
        tensors[f"{path}.lora_b"] = mx.array(philox.normal(1, number, 1, shape=(3, out)))
    exported = to_peft(tensors, scale, sana.ADAPTER_PREFIX, pointwise=sana.ADAPTER_POINTWISE)
    plain = theirs(reference, *given(network))
    pipe = SanaPipeline(None, None, None, reference, None)
    pipe.load_lora_weights({name: torch.from_numpy(np.array(value)) for name, value in exported.items()})
    expected = theirs(reference, *given(network))
    assert relative_error(plain, expected) > 1e-2
    back = read_back(exported, network, tmp_path)
    assert {name: value.shape for name, value in back.items()} == {n: v.shape for n, v in tensors.items()}
    ours = network.velocity(*given(network), trainable=by_block(back, 3))
    assert_parity("SANA LoRA of diffusers + peft", ours, expected)


def test_a_lora_of_diffusers_and_peft_gives_the_same_velocity_here(tmp_path):
    pytest.importorskip("peft")
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    reference = random_transformer()
    network = Network(converted(tmp_path, reference))
    torch.manual_seed(1)
    modules = ["to_q", "to_k", "to_v", "to_out.0", "conv_inverted", "conv_point"]
    reference.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=modules, init_lora_weights=False))
    state = get_peft_model_state_dict(reference)
    tensors = {f"{sana.ADAPTER_PREFIX}{name}": mx.array(value.detach().numpy()) for name, value in state.items()}
    factors = read_back(tensors, network, tmp_path)
    ours = network.velocity(*given(network), trainable=by_block(factors, 3))
    assert_parity("SANA LoRA of diffusers + peft", ours, theirs(reference, *given(network)))
