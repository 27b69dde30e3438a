"""Small random SANA transformers made by diffusers, and the same weights as a directory of ours."""

from pathlib import Path

import mlx.core as mx

from mlx_blockskip.converters import run, sana, write
from mlx_blockskip.converters.source import open_source
from mlx_blockskip.engine import files
from mlx_blockskip.engine.reader import BlockReader
from mlx_blockskip.engine.shards import Shards
from mlx_blockskip.engine.sweep import Batch, forward
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
    component = sana.transformer("hf", net.SanaTransformer2DConfig.read(path / "hf" / "config.json"))
    source = open_source(path / "hf")
    run.check_rows(component, source)
    (path / "mlx").mkdir()
    list(write.write_component(component, source, path / "mlx", write.Precision(**{"dtype": "float32", **precision})))
    return Shards(path / "mlx")


class Network:
    """The transformer alone, as the family's model will use it."""

    def __init__(self, shards: Shards, budget: int | None = None):
        self.shards = shards
        self.config = net.SanaTransformer2DConfig.from_dict(shards.config)
        self.stack = net.stack(self.config)
        self.reader = BlockReader(shards, self.stack, budget)
        self.rest = shards.load([name for name in shards.names if not name.startswith("transformer_blocks.")])

    def sample(self, latents, sigma, text, mask, guidance=None, masks=None) -> Batch:
        """What waits at the first block. guidance: (B,); masks: by block."""
        temb, embedded = net.time_embedding(self.rest, self.config, mx.array(sigma), guidance)
        bias = net.text_bias(mx.array(mask), text.dtype)
        context = net.Context(net.caption(self.rest, text), bias, temb, embedded, latents.shape[1:3])
        return Batch(Tokens(net.embed(self.rest, self.config, latents)), context, masks=masks or {})

    def head(self, tokens: Tokens, context: net.Context) -> mx.array:
        return net.output(self.rest, self.config, tokens.image, context.embedded, context.size)

    def velocity(self, *inputs, trainable=None, **more) -> mx.array:
        sample = self.sample(*inputs, **more)
        forward(self.stack, self.reader, [sample], trainable=trainable)
        return self.head(sample.state, sample.context)


WORDS = ("a small cat", "red", "a dog on a red background", "two Cats", "gray", "a picture of a sailboat on blue")
VAE = {
    "latent_channels": 8,
    "attention_head_dim": 8,
    "encoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
    "decoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
    "encoder_block_out_channels": (8, 16, 16),
    "decoder_block_out_channels": (8, 16, 16),
    "encoder_layers_per_block": (1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1),
    "encoder_qkv_multiscales": ((), (), (5,)),
    "decoder_qkv_multiscales": ((), (), (5,)),
    "scaling_factor": 0.41,
}
GEMMA = {
    **{"vocab_size": 340, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 12},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "query_pre_attn_scalar": 10},
}


def gemma_tokenizer(path: Path, texts, starts: bool = True) -> Path:
    """A tokenizer as Gemma's, of few pieces; its tokenizer.json puts the start token in front, or leaves it out."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{i:02X}>" for i in range(256))]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=340, special_tokens=special))
    if starts:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    path.mkdir(parents=True)
    tokenizer.save(str(path / "tokenizer.json"))
    config = {name: f"<{name.removesuffix('_token')}>" for name in ("pad_token", "eos_token", "bos_token", "unk_token")}
    config |= {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True, "add_eos_token": False}
    files.write_json(path / "tokenizer_config.json", config)
    return path


def random_pipeline(path: Path, pipeline="SanaPipeline", vae=VAE, **changes):
    """A whole random checkpoint in Hugging Face layout, and the pipeline that diffusers opens from it."""
    import diffusers
    import torch
    from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

    sprint = pipeline == "SanaSprintPipeline"
    torch.manual_seed(1)
    text = Gemma2Model(Gemma2Config(**GEMMA, attn_implementation="eager")).eval()
    with torch.no_grad():
        for parameter in text.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    flow = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
    parts = {
        "transformer": random_transformer(
            **{"guidance_embeds": sprint, "in_channels": 8, "out_channels": 8, **changes}
        ),
        "text_encoder": text,
        "vae": diffusers.AutoencoderDC(**vae).eval(),
        "tokenizer": GemmaTokenizer.from_pretrained(str(gemma_tokenizer(path / "tokenizer-made", WORDS))),
        "scheduler": diffusers.SCMScheduler() if sprint else diffusers.DPMSolverMultistepScheduler(**flow),
    }
    cls = getattr(diffusers, pipeline)
    cls(**parts).save_pretrained(path / "hf")
    opened = cls.from_pretrained(path / "hf", dtype=torch.float32)
    opened.set_progress_bar_config(disable=True)
    return path / "hf", opened
