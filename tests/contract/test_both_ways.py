"""Blocks of FLUX.1 with the head dims that Metal has a fused attention for; the bundled models' are smaller.

What runs on Metal as such runs elsewhere with a stand-in that rounds otherwise than scores written out do.
"""

import mlx.core as mx
import pytest

from mlx_blockskip.engine import kept, philox, sweep
from mlx_blockskip.engine.reader import BlockReader
from mlx_blockskip.engine.shards import Shards
from mlx_blockskip.engine.stack import arrays
from mlx_blockskip.engine.sweep import Batch
from mlx_blockskip.models.attention import IMAGE_TO_TEXT
from mlx_blockskip.models.cpu import in_use
from mlx_blockskip.models.family import Tokens
from mlx_blockskip.models.flux1 import transformer
from support.compare import same_bits
from support.component import save_component
from support.metal import kernels_on_the_cpu, route_as_on_metal

TEXT, SIZE, RANK = 5, (6, 8), 2
IMAGE = SIZE[0] * SIZE[1] // 4
AXES = {64: (16, 24, 24), 128: (16, 56, 56)}


def shapes(head_dim, width):
    """Of a double and of a single block: modulation, projections, norms of heads."""
    projections = {f"attn.to_{n}": (width, width) for n in "qkv"}
    double = {"norm1.linear": (6 * width, width), "norm1_context.linear": (6 * width, width)}
    double |= projections
    double |= {f"attn.add_{n}_proj": (width, width) for n in "qkv"}
    double |= {f"attn.{n}": (width, width) for n in ("to_out.0", "to_add_out")}
    double |= {f"{n}.net.0.proj": (2 * width, width) for n in ("ff", "ff_context")}
    double |= {f"{n}.net.2": (width, 2 * width) for n in ("ff", "ff_context")}
    double |= {f"attn.norm_{n}": (head_dim,) for n in ("q", "k", "added_q", "added_k")}
    single = {"norm.linear": (3 * width, width), "proj_mlp": (2 * width, width), "proj_out": (width, 3 * width)}
    single |= projections
    single |= {f"attn.norm_{n}": (head_dim,) for n in "qk"}
    return {"double": double, "single": single}


@pytest.fixture(params=[64, 128], ids=lambda head_dim: f"head dim {head_dim}")
def make(request, tmp_path):
    """`make(budget)`: a stack of four blocks, its reader, and LoRA factors of the last three."""
    head_dim = request.param
    width = 2 * head_dim
    config = transformer.FluxTransformer2DConfig(
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=head_dim,
        num_attention_heads=2,
        axes_dims_rope=AXES[head_dim],
    )
    stack = transformer.stack(config)
    tensors, tree = {}, {}
    for i, block in enumerate(stack.blocks):
        for j, (name, shape) in enumerate(shapes(head_dim, width)[block.kind.name].items()):
            noise = mx.array(philox.normal(1, i, j, shape=shape))
            tensors[f"{block.prefix}{name}.weight"] = 1 + noise / 8 if len(shape) == 1 else noise / shape[1] ** 0.5
            if len(shape) == 2 and "norm" not in name and i > 0:
                for k, (end, factor) in enumerate((("lora_a", (shape[1], RANK)), ("lora_b", (RANK, shape[0])))):
                    tree.setdefault(i, {})[f"{name}.{end}"] = 0.1 * mx.array(philox.normal(2, i, j, k, shape=factor))
    path = save_component(tmp_path / "flux", {}, tensors, stack)
    mx.eval(tree)
    return lambda budget=None: (stack, BlockReader(Shards(path), stack, budget), tree, width)


def batch(width, masked=False):
    cos, sin = transformer.rope_tables(AXES[width // 2], TEXT, SIZE)
    image, text = (mx.array(philox.normal(3, i, shape=(1, n, width))) for i, n in enumerate((IMAGE, TEXT)))
    context = transformer.Context(mx.array(cos), mx.array(sin), mx.array(philox.normal(3, 2, shape=(1, width))), SIZE)
    return Batch(Tokens(image, text), context, masks=dict.fromkeys(range(4), IMAGE_TO_TEXT) if masked else {})


def trained(parts, masked, backward=sweep.backward):
    """The loss, the gradients and the state after blocks 1 to 3."""
    stack, reader, tree, width = parts
    waiting, grads = batch(width, masked), {}
    losses = backward(
        stack,
        reader,
        [waiting],
        range(1, 4),
        trainable=tree,
        loss=lambda i, state: mx.mean(mx.square(state.image)),
        on_grad=grads.__setitem__,
    )
    return losses[0], grads, waiting.state


def same(first, second):
    (loss, grads, state), (own_loss, own, own_state) = first, second
    assert same_bits(loss, own_loss)
    assert all(same_bits(a, b) for a, b in zip(arrays(state), arrays(own_state), strict=True))
    assert all(same_bits(grads[b][n], own[b][n]) for b in grads for n in grads[b])


@pytest.mark.parametrize("way", ["plain", "fused attention", "fused attention and kernels"])
@pytest.mark.parametrize("masked", [False, True])
def test_memory_changes_no_bit(make, masked, way, monkeypatch, tmp_path):
    taken = [] if way == "plain" else route_as_on_metal(monkeypatch)
    if way.endswith("kernels"):
        kernels_on_the_cpu(monkeypatch, tmp_path)
    ample, least = make(), make(0)
    resident = trained(ample, masked)
    same(resident, trained(least, masked))
    same(resident, trained(ample, masked, kept.backward))
    stack, reader, tree, width = least
    alone = batch(width, masked)
    sweep.forward(stack, reader, [alone], range(1, 4), trainable=tree)
    assert all(same_bits(a, b) for a, b in zip(arrays(alone.state), arrays(resident[2]), strict=True))
    assert bool(taken) == (way != "plain" and in_use())
