"""The tables name every tensor of the reference classes with its shape, at full size too (nothing is allocated)."""

import pytest

from mlx_blockskip.converters import flux1
from mlx_blockskip.converters.encoders import autoencoder_kl, clip_text, t5_encoder
from mlx_blockskip.converters.write import Precision, plan_shards
from mlx_blockskip.models.flux1.transformer import FluxTransformer2DConfig
from mlx_blockskip.models.text import clip, t5
from mlx_blockskip.models.vae.kl import AutoencoderKLConfig

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

DEV = {
    **{"attention_head_dim": 128, "num_attention_heads": 24, "in_channels": 64, "patch_size": 1},
    **{"joint_attention_dim": 4096, "pooled_projection_dim": 768, "num_layers": 19, "num_single_layers": 38},
    **{"guidance_embeds": True, "axes_dims_rope": (16, 56, 56)},
}
CLIP_L = {
    **{"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    **{"vocab_size": 49408, "max_position_embeddings": 77, "projection_dim": 768},
}
T5_XXL = {
    **{"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24, "vocab_size": 32128},
    **{"relative_attention_num_buckets": 32, "feed_forward_proj": "gated-gelu", "is_gated_act": True},
}
VAE = {
    **{"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16},
    **{"in_channels": 3, "out_channels": 3, "use_quant_conv": False, "use_post_quant_conv": False},
    **{"mid_block_add_attention": True},
    **{"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4},
}


def reference(make):
    """Names and shapes of the reference class, made without memory for its weights."""
    with torch.device("meta"):
        model = make()
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def ours(component):
    names = [row.name for row in component.rows]
    assert len(names) == len(set(names))
    return {row.name: row.their_shape() for row in component.rows}


@pytest.mark.parametrize("change", [{}, {"guidance_embeds": False}, {"num_single_layers": 0}, {"out_channels": 32}])
def test_transformer(change):
    from diffusers import FluxTransformer2DModel

    config = DEV | change
    expected = reference(lambda: FluxTransformer2DModel(**config))
    assert ours(flux1.transformer("transformer", FluxTransformer2DConfig(**config))) == expected


def test_flux_dev_has_a_shard_for_each_of_its_57_blocks():
    component = flux1.transformer("transformer", FluxTransformer2DConfig(**DEV))
    shards = {shard.file: shard for shard in plan_shards(component, Precision("bfloat16", 4))}
    assert set(shards) == {f"block-{i:03d}.safetensors" for i in range(57)} | {"rest.safetensors"}
    for number, prefix in (
        (0, "transformer_blocks.0."),
        (18, "transformer_blocks.18."),
        (19, "single_transformer_blocks.0."),
    ):
        assert all(row.name.startswith(prefix) for row in shards[f"block-{number:03d}.safetensors"].rows)
    assert not any("transformer_blocks" in row.name for row in shards["rest.safetensors"].rows)
    assert not shards["rest.safetensors"].groups
    assert not any(".norm" in name for shard in shards.values() for name in shard.groups)


def test_clip():
    from transformers import CLIPTextConfig, CLIPTextModel

    expected = reference(lambda: CLIPTextModel(CLIPTextConfig(**CLIP_L)))
    expected = {name.removeprefix("text_model."): shape for name, shape in expected.items()}
    expected.pop("embeddings.position_ids", None)
    assert ours(clip_text("text_encoder", clip.CLIPTextConfig.from_dict(CLIP_L))) == expected


@pytest.mark.parametrize("change", [{}, {"feed_forward_proj": "relu", "is_gated_act": False}])
def test_t5(change):
    from transformers import T5Config, T5EncoderModel

    config = T5_XXL | change
    expected = reference(lambda: T5EncoderModel(T5Config(**config)))
    expected.pop("encoder.embed_tokens.weight", None)
    assert ours(t5_encoder("text_encoder_2", t5.T5Config(**config))) == expected


@pytest.mark.parametrize(
    "change", [{}, {"use_quant_conv": True, "use_post_quant_conv": True}, {"mid_block_add_attention": False}]
)
def test_vae(change):
    from diffusers import AutoencoderKL

    config = VAE | change
    component = autoencoder_kl("vae", AutoencoderKLConfig(**config))
    expected = reference(lambda: AutoencoderKL(**config))
    assert set(ours(component)) == set(expected)
    assert [row.name for row in component.rows if not row.fits(expected[row.name])] == []
    assert {shard.file for shard in plan_shards(component, Precision("float32", 4))} == {"rest.safetensors"}
    assert not any(row.role != "plain" for row in component.rows)
