"""Networks that families share, as single files have them: text encoders, and VAEs in the names of their authors."""

from collections.abc import Collection

from mlx_blockskip.converters.layouts import Layout, Network, Rule, rule

CLIP_TEXT = Network(
    "CLIP's text encoder",
    (
        Layout("text_model.embeddings.position_embedding.weight", dropped=r"(vision_model|visual_projection)\..*"),
        Layout("embeddings.position_embedding.weight"),
    ),
)

T5 = Network(
    "T5's encoder",
    (
        Layout(
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            dropped=r"(decoder\..*|lm_head\.weight)",
        ),
    ),
)

GEMMA2 = Network(
    "Gemma-2",
    (Layout("layers.0.pre_feedforward_layernorm.weight", dropped=r"lm_head\.weight"),),
)

QWEN3 = Network(
    "Qwen3",
    (Layout("layers.0.self_attn.q_norm.weight", dropped=r"lm_head\.weight"),),
)

RESNET = ("norm1", "conv1", "norm2", "conv2")


def latent_diffusion(names: Collection[str]) -> list[Rule]:
    """AutoencoderKL as in CompVis' latent diffusion and Black Forest Labs' `ae.safetensors`; the decoder's levels count
    from the last.
    """
    found = [rule(f"{half}.norm_out", f"{half}.conv_norm_out") for half in ("encoder", "decoder")]
    for half in ("encoder", "decoder"):
        for i in (0, 1):
            found.append(rule(f"{half}.mid.block_{i + 1}", f"{half}.mid_block.resnets.{i}"))
        attention = f"{half}.mid_block.attentions.0"
        names_of_attention = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
        found += [rule(f"{half}.mid.attn_1.{a}", f"{attention}.{b}") for a, b in names_of_attention.items()]
    levels = len({name.split(".")[2] for name in names if name.startswith("encoder.down.")})
    for i in range(levels):
        last = levels - 1 - i
        found.append(rule(f"encoder.down.{i}.block.{{}}", f"encoder.down_blocks.{i}.resnets.{{}}"))
        found.append(rule(f"encoder.down.{i}.downsample.conv", f"encoder.down_blocks.{i}.downsamplers.0.conv"))
        found.append(rule(f"decoder.up.{last}.block.{{}}", f"decoder.up_blocks.{i}.resnets.{{}}"))
        found.append(rule(f"decoder.up.{last}.upsample.conv", f"decoder.up_blocks.{i}.upsamplers.0.conv"))
    return [part for known in found for part in _with_layers(known)]


def _with_layers(known: Rule) -> list[Rule]:
    """A rule for a residual block as rules for its layers; any other as it is."""
    (ours,) = known.ours
    if not ours.rsplit(".", 1)[0].endswith("resnets"):
        return [known]
    layers = {**{name: name for name in RESNET}, "nin_shortcut": "conv_shortcut"}
    return [rule(f"{known.theirs}.{theirs}", f"{ours}.{layer}") for theirs, layer in layers.items()]


AUTOENCODER_KL = Network(
    "the VAE",
    (
        Layout("decoder.mid.block_1.norm1.weight", latent_diffusion, dropped=r"loss\..*"),
        Layout("decoder.mid_block.resnets.0.norm1.weight"),
    ),
)


def flux2_autoencoder(names: Collection[str]) -> list[Rule]:
    """AutoencoderKLFlux2 as in Black Forest Labs' `flux2-vae.safetensors`: each half has its 1 x 1 convolution."""
    halves = [rule("encoder.quant_conv", "quant_conv"), rule("decoder.post_quant_conv", "post_quant_conv")]
    return latent_diffusion(names) + halves


BATCHES = r"bn\.num_batches_tracked"

AUTOENCODER_KL_FLUX2 = Network(
    "FLUX.2's VAE",
    (
        Layout("encoder.quant_conv.weight", flux2_autoencoder, dropped=BATCHES),
        Layout("bn.running_mean", dropped=BATCHES),
    ),
)


def efficientvit(names: Collection[str]) -> list[Rule]:
    """DC-AE as its authors' efficientvit has it."""
    whole = any(name.endswith("encoder.project_in.conv.bias") for name in names)  # else it is in a block of its own
    early, late = ("conv_in", "conv_out") if whole else ("conv_in.conv", "conv_out.conv")
    found = [
        rule("encoder.project_in.conv", f"encoder.{early}"),
        rule("encoder.project_out.0.conv", "encoder.conv_out"),
        rule("decoder.project_in.conv", "decoder.conv_in"),
        rule("decoder.project_out.0", "decoder.norm_out"),
        rule("decoder.project_out.2.conv", f"decoder.{late}"),
    ]
    for half, levels in (("encoder", "down_blocks"), ("decoder", "up_blocks")):
        theirs, ours = f"{half}.stages.{{}}.{{}}", f"{half}.{levels}.{{}}.{{}}"
        attention, gated = f"{ours}.attn", f"{ours}.conv_out"
        found += [
            *(rule(f"{theirs}.{name}.conv", f"{ours}.{name}") for name in ("conv", "conv1", "conv2")),
            rule(f"{theirs}.conv2.norm", f"{ours}.norm"),
            rule(f"{theirs}.context_module.qkv.conv", *(f"{attention}.to_{part}" for part in "qkv")),
            rule(f"{theirs}.context_module.aggreg.{{}}.0", f"{attention}.to_qkv_multiscale.{{}}.proj_in"),
            rule(f"{theirs}.context_module.aggreg.{{}}.1", f"{attention}.to_qkv_multiscale.{{}}.proj_out"),
            rule(f"{theirs}.context_module.proj.conv", f"{attention}.to_out"),
            rule(f"{theirs}.context_module.proj.norm", f"{attention}.norm_out"),
            rule(f"{theirs}.local_module.inverted_conv.conv", f"{gated}.conv_inverted"),
            rule(f"{theirs}.local_module.depth_conv.conv", f"{gated}.conv_depth"),
            rule(f"{theirs}.local_module.point_conv.conv", f"{gated}.conv_point"),
            rule(f"{theirs}.local_module.point_conv.norm", f"{gated}.norm"),
        ]
    return found


AUTOENCODER_DC = Network(
    "DC-AE",
    (
        Layout(
            "decoder.project_in.conv.weight",
            efficientvit,
            cleaned=lambda name: name.replace("main.", "").replace("op_list.", ""),
        ),
        Layout("encoder.down_blocks.1.0.conv1.weight"),
    ),
)
