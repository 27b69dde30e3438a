"""The SANA transformer against diffusers, in every branch of its config."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_blockskip.engine import philox, sweep
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.models.attention import IMAGE_TO_TEXT
from mlx_blockskip.models.sana import transformer as net
from support.compare import assert_parity, relative_error, same_bits
from support.sana import MODULES, Network, converted, random_transformer

SIGMA = np.array([0.3, 0.9], np.float32)
TEXT, LENGTHS = 7, (7, 4)


def inputs(config, size, batch=2, seed=0):
    """Latents, sigma, text and its mask."""
    latents = philox.normal(seed, 1, shape=(batch, *size, config.in_channels))
    text = philox.normal(seed, 2, shape=(batch, TEXT, config.caption_channels))
    mask = (np.arange(TEXT)[None] < np.array(LENGTHS)[:batch, None]).astype(np.float32)
    return mx.array(latents), SIGMA[:batch], mx.array(text), mask


def theirs(reference, latents, sigma, text, mask, guidance=None):
    """The reference's velocity (B, h, w, C), called as SanaPipeline and SanaSprintPipeline do."""
    import torch

    config = reference.config
    time = sigma if config.guidance_embeds else sigma * 1000 * config.timestep_scale
    more = {}
    if guidance is not None:
        more["guidance"] = torch.from_numpy(np.array(guidance)) * config.guidance_embeds_scale
    found = reference(
        hidden_states=torch.from_numpy(np.array(latents).transpose(0, 3, 1, 2)),
        encoder_hidden_states=torch.from_numpy(np.array(text)),
        timestep=torch.from_numpy(time.astype(np.float32)),
        encoder_attention_mask=torch.from_numpy(mask),
        **more,
    ).sample
    return found.permute(0, 2, 3, 1)


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({}, (6, 10)),
        ({"qk_norm": "rms_norm_across_heads"}, (5, 3)),
        ({"qk_norm": "rms_norm_across_heads", "guidance_embeds": True}, (4, 7)),
        ({"guidance_embeds": True, "guidance_embeds_scale": 0.5, "timestep_scale": 0.001}, (4, 4)),
        ({"timestep_scale": 0.001}, (4, 6)),
        ({"interpolation_scale": 1.0}, (8, 8)),
        ({"interpolation_scale": 2.0, "sample_size": 4}, (9, 5)),
        ({"patch_size": 2}, (6, 10)),
        ({"patch_size": 2, "interpolation_scale": 1.5, "out_channels": 12}, (8, 4)),
        ({"attention_bias": True, "norm_elementwise_affine": True, "norm_eps": 1e-3}, (4, 6)),
        ({"num_cross_attention_heads": 3, "cross_attention_head_dim": 8, "mlp_ratio": 1.7}, (3, 4)),
        (
            {
                **{"num_cross_attention_heads": 5, "cross_attention_head_dim": 8, "attention_head_dim": 12},
                **{"cross_attention_dim": 48, "qk_norm": "rms_norm_across_heads", "num_layers": 1, "in_channels": 4},
            },
            (1, 9),
        ),
    ],
)
def test_equals_diffusers_on_random_configs(tmp_path, changes, size):
    torch = pytest.importorskip("torch")
    reference = random_transformer(**changes)
    network = Network(converted(tmp_path, reference))
    given = inputs(network.config, size)
    guidance = mx.array([4.5, 1.0]) if reference.config.guidance_embeds else None
    with torch.no_grad():
        expected = theirs(reference, *given, guidance)
    assert_parity("SANA transformer", network.velocity(*given, guidance=guidance), expected.numpy())


@pytest.mark.parametrize("size", [(26, 40), (40, 26), (2, 600), (3, 1100)])
def test_maps_that_take_several_strips_equal_diffusers(tmp_path, size):
    torch = pytest.importorskip("torch")
    reference = random_transformer(num_layers=1)
    network = Network(converted(tmp_path, reference))
    given = inputs(network.config, size)
    with torch.no_grad():
        expected = theirs(reference, *given)
    assert_parity("SANA transformer", network.velocity(*given), expected.numpy())


@pytest.mark.parametrize("rows", [5, 10, 15, 25])
def test_strips_of_every_size_give_the_same_as_none(tmp_path, monkeypatch, rows):
    pytest.importorskip("torch")
    network = Network(converted(tmp_path, random_transformer(num_layers=1)))
    ((_, weights),) = network.reader.walk([0])
    x = mx.array(philox.normal(3, shape=(2, 7, 5, 32)))
    whole = net.glumb_conv(weights, "ff", x, {})
    monkeypatch.setattr(net, "TOKEN_ROWS", rows)
    assert relative_error(net.glumb_conv(weights, "ff", x, {}), whole) <= 1e-6


def test_the_image_to_text_mask_drops_cross_attention_and_nothing_else(tmp_path):
    torch = pytest.importorskip("torch")
    reference = random_transformer()
    network = Network(converted(tmp_path, reference))
    given = inputs(network.config, (4, 6))
    with torch.no_grad():
        for index in (0, 2):
            last = reference.transformer_blocks[index].attn2.to_out[0]
            last.weight.zero_()
            last.bias.zero_()
        expected = theirs(reference, *given)
    masked = network.velocity(*given, masks={0: IMAGE_TO_TEXT, 2: IMAGE_TO_TEXT})
    assert_parity("SANA transformer", masked, expected.numpy())
    everywhere = dict.fromkeys(range(3), IMAGE_TO_TEXT)
    latents, sigma, _, mask = given
    other = inputs(network.config, (4, 6), seed=1)[2]
    assert same_bits(
        network.velocity(*given, masks=everywhere), network.velocity(latents, sigma, other, mask, masks=everywhere)
    )
    assert relative_error(network.velocity(latents, sigma, other, mask), network.velocity(*given)) > 1e-2


def test_padding_does_not_matter(tmp_path):
    pytest.importorskip("torch")
    network = Network(converted(tmp_path, random_transformer()))
    latents, sigma, text, mask = inputs(network.config, (4, 6))
    other = mx.where(mx.array(mask)[..., None] > 0, text, 5.0)
    assert same_bits(network.velocity(latents, sigma, other, mask), network.velocity(latents, sigma, text, mask))


def random_factors(network, block, rank=3):
    """LoRA factors on every module of a block, none zero."""
    tree = {}
    prefix = network.stack.blocks[block].prefix
    for number, module in enumerate(MODULES):
        out, width = network.shards.shape(f"{prefix}{module}.weight")
        for letter, shape in (("a", (width, rank)), ("b", (rank, out))):
            draw = philox.normal(9, block, number, ord(letter), shape=shape)
            tree[f"{module}.lora_{letter}"] = mx.array(draw) / shape[0] ** 0.5
    return tree


def train_pass(network, given, tree, target):
    """Loss, gradients of the factors, and the tokens at the end, by the house's backward sweep."""
    sample, grads = network.sample(*given), {}

    def loss(_, tokens):
        return mx.mean(mx.square(network.head(tokens, sample.context) - target))

    (value,) = sweep.backward(
        *(network.stack, network.reader, [sample], range(network.stack.depth)),
        trainable=tree,
        loss=loss,
        on_grad=grads.__setitem__,
    )
    return value, grads, sample.state


@pytest.mark.parametrize("changes", [{}, {"qk_norm": "rms_norm_across_heads", "norm_elementwise_affine": True}])
def test_lora_gradients_equal_torch(tmp_path, changes):
    torch = pytest.importorskip("torch")
    reference = random_transformer(**changes)
    network = Network(converted(tmp_path, reference))
    given = inputs(network.config, (4, 6))
    target = philox.normal(4, shape=given[0].shape)
    tree = random_factors(network, 1)
    value, grads, _ = train_pass(network, given, {1: tree}, mx.array(target))

    factors = {name: torch.from_numpy(np.array(f)).requires_grad_() for name, f in tree.items()}
    replaced = {}
    for module in MODULES:
        name = f"transformer_blocks.1.{module}.weight"
        weight = reference.get_parameter(name).detach()
        product = (factors[f"{module}.lora_a"] @ factors[f"{module}.lora_b"]).T
        replaced[name] = weight + product.reshape(weight.shape)

    def call(*args, **more):
        return torch.func.functional_call(reference, replaced, args, more)

    call.config = reference.config
    loss = ((theirs(call, *given) - torch.from_numpy(target)) ** 2).mean()
    loss.backward()
    assert relative_error(value, loss.detach().numpy()) <= 1e-5
    for name, factor in factors.items():
        assert_parity("SANA LoRA gradients", grads[1][name], factor.grad.numpy())


def test_streamed_equals_resident_bit_for_bit(tmp_path):
    pytest.importorskip("torch")
    shards = converted(tmp_path, random_transformer(qk_norm="rms_norm_across_heads"))
    given = inputs(Network(shards).config, (4, 6))
    target = mx.array(philox.normal(4, shape=given[0].shape))
    found = []
    for budget in (None, 0):
        network = Network(shards, budget)
        tree = {block: random_factors(network, block) for block in range(3)}
        found.append(train_pass(network, given, tree, target))
    (loss, grads, state), (own_loss, own, own_state) = found
    assert same_bits(loss, own_loss)
    assert same_bits(state.image, own_state.image)
    assert all(same_bits(grads[b][n], own[b][n]) for b in grads for n in grads[b])


def test_gradients_through_strips_equal_those_without(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    network = Network(converted(tmp_path, random_transformer(num_layers=2)))
    given = inputs(network.config, (6, 5))
    target = mx.array(philox.normal(4, shape=given[0].shape))
    tree = {block: random_factors(network, block) for block in range(2)}
    _, whole, _ = train_pass(network, given, tree, target)
    monkeypatch.setattr(net, "TOKEN_ROWS", 10)
    _, parts, _ = train_pass(network, given, tree, target)
    for block in whole:
        assert all(relative_error(parts[block][n], g) <= 1e-5 for n, g in whole[block].items())


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_and_bfloat16_blocks_run_and_stay_near(tmp_path, bits):
    torch = pytest.importorskip("torch")
    reference = random_transformer(attention_head_dim=16, cross_attention_dim=64, mlp_ratio=2.5)
    shards = converted(tmp_path, reference, dtype="bfloat16", bits=bits)
    assert shards.group_sizes["transformer_blocks.0.ff.conv_inverted"] == 64
    assert shards.group_sizes["transformer_blocks.0.ff.conv_point"] == 32
    network = Network(shards)
    latents, sigma, text, mask = inputs(network.config, (4, 6))
    ours = network.velocity(latents.astype(mx.bfloat16), sigma, text.astype(mx.bfloat16), mask)
    assert ours.dtype == mx.bfloat16
    with torch.no_grad():
        expected = theirs(reference, latents, sigma, text, mask).numpy()
    assert relative_error(ours.astype(mx.float32), expected) <= {4: 0.5, 8: 0.1}[bits]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"qk_norm": "l2"}, 'qk_norm="l2" is not implemented'),
        ({"cross_attention_dim": None}, "cross_attention_dim is null"),
    ],
)
def test_configs_that_are_not_implemented_are_refused(changes, match):
    with pytest.raises(UserError, match=match):
        net.SanaTransformer2DConfig(**changes)
