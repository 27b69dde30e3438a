"""Small random SANA transformers made by diffusers, and the same weights as a directory of ours."""

from pathlib import Path

import mlx.core as mx
from mlx_blockskip.converters import run, sana
from mlx_blockskip.converters.source import open_source

from mlx_blockskip.engine import files
from mlx_blockskip.engine.sweep import Sample, forward
from mlx_blockskip.engine.weights import BlockReader, Shards
from mlx_blockskip.models.family import Tokens
from mlx_blockskip.models.sana import ATTENTION, FEED_FORWARD
from mlx_blockskip.models.sana import transformer as net

TRANSFORMER = {
    "in_channels": 6,
    "out_channels": 6,
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "num_layers": 3,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 16,
    "cross_attention_dim": 32,
    "caption_channels": 24,
    "sample_size": 8,
}
MODULES = ATTENTION["sana"] + FEED_FORWARD["sana"]


def random_transformer(**changes):
    """A SanaTransformer2DModel whose norms, biases and tables are random too."""
    import torch
    from diffusers import SanaTransformer2DModel

    torch.manual_seed(0)
    model = SanaTransformer2DModel(**{**TRANSFORMER, **changes}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def converted(path: Path, reference, **precision) -> Shards:
    """The same weights in a component directory of ours."""
    reference.save_pretrained(path / "hf")
    component = sana.transformer("hf", files.read_json(path / "hf" / "config.json"))
    source = open_source(path / "hf")
    run.check_rows(component, source)
    (path / "mlx").mkdir()
    list(run.write_component(component, source, path / "mlx", run.Precision(**{"dtype": "float32", **precision})))
    return Shards(path / "mlx")


class Network:
    """The transformer alone, as the family's model will use it."""

    def __init__(self, shards: Shards, budget: int | None = None):
        self.shards = shards
        self.config = shards.config
        self.stack = net.stack(shards.config)
        self.reader = BlockReader(shards, self.stack, budget)
        self.rest = shards.load([name for name in shards.names if not name.startswith("transformer_blocks.")])

    def sample(self, latents, sigma, text, mask, guidance=None, masks=None) -> Sample:
        """What waits at the first block. guidance: (B,); masks: by block."""
        temb, embedded = net.time_embedding(self.rest, self.config, mx.array(sigma), guidance)
        bias = net.text_bias(mx.array(mask), text.dtype)
        context = net.Context(net.caption(self.rest, text), bias, temb, embedded, latents.shape[1:3])
        return Sample(Tokens(net.embed(self.rest, self.config, latents)), context, masks=masks or {})

    def head(self, tokens: Tokens, context: net.Context) -> mx.array:
        return net.output(self.rest, self.config, tokens.image, context.embedded, context.size)

    def velocity(self, *inputs, trainable=None, **more) -> mx.array:
        sample = self.sample(*inputs, **more)
        forward(self.stack, self.reader, [sample], trainable=trainable)
        return self.head(sample.state, sample.context)
