"""The bundled models' weights as other tools keep them in single files: names and divisions written down once more."""

import re
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_blockskip import convert
from mlx_blockskip.converters import singles
from mlx_blockskip.engine import files
from mlx_blockskip.models.registry import open_model

PLAIN = {
    "x_embedder": "img_in", "context_embedder": "txt_in", "proj_out": "final_layer.linear",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
}  # fmt: skip
DOUBLE = {
    "norm1.linear": "img_mod.lin", "norm1_context.linear": "txt_mod.lin", "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj", "ff.net.0.proj": "img_mlp.0", "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0", "ff_context.net.2": "txt_mlp.2",
}  # fmt: skip
DOUBLE_NORMS = {
    "attn.norm_q": "img_attn.norm.query_norm", "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm", "attn.norm_added_k": "txt_attn.norm.key_norm",
}  # fmt: skip
SINGLE_NORMS = {"attn.norm_q": "norm.query_norm", "attn.norm_k": "norm.key_norm"}


def weights(folder: Path) -> dict[str, mx.array]:
    """The tensors of the one safetensors file in a folder."""
    (path,) = folder.glob("*.safetensors")
    tensors = files.load_lazily(path)
    mx.eval(tensors)
    return tensors


def black_forest_labs(ours: dict[str, mx.array]) -> dict[str, mx.array]:
    """A FLUX.1 transformer as in flux1-dev.safetensors."""
    theirs = {}
    for name, known in PLAIN.items():
        for kind in ("weight", "bias"):
            if f"{name}.{kind}" in ours:
                theirs[f"{known}.{kind}"] = ours[f"{name}.{kind}"]
    for kind in ("weight", "bias"):
        scale, shift = mx.split(ours[f"norm_out.linear.{kind}"], 2)
        theirs[f"final_layer.adaLN_modulation.1.{kind}"] = mx.concatenate([shift, scale])
    doubles, singles = (
        {int(match[1]) for name in ours if (match := re.match(rf"{kind}\.(\d+)\.", name))}
        for kind in ("transformer_blocks", "single_transformer_blocks")
    )
    for i in doubles:
        block, known = f"transformer_blocks.{i}", f"double_blocks.{i}"
        for name, other in DOUBLE.items():
            theirs |= {f"{known}.{other}.{kind}": ours[f"{block}.{name}.{kind}"] for kind in ("weight", "bias")}
        for name, other in DOUBLE_NORMS.items():
            theirs[f"{known}.{other}.scale"] = ours[f"{block}.{name}.weight"]
        for kind in ("weight", "bias"):
            image = [ours[f"{block}.attn.to_{part}.{kind}"] for part in "qkv"]
            text = [ours[f"{block}.attn.add_{part}_proj.{kind}"] for part in "qkv"]
            theirs[f"{known}.img_attn.qkv.{kind}"] = mx.concatenate(image)
            theirs[f"{known}.txt_attn.qkv.{kind}"] = mx.concatenate(text)
    for i in singles:
        block, known = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        for name, other in SINGLE_NORMS.items():
            theirs[f"{known}.{other}.scale"] = ours[f"{block}.{name}.weight"]
        for kind in ("weight", "bias"):
            parts = [ours[f"{block}.{name}.{kind}"] for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
            theirs[f"{known}.linear1.{kind}"] = mx.concatenate(parts)
            theirs[f"{known}.linear2.{kind}"] = ours[f"{block}.proj_out.{kind}"]
            theirs[f"{known}.modulation.lin.{kind}"] = ours[f"{block}.norm.linear.{kind}"]
    assert sum(t.size for t in theirs.values()) == sum(t.size for t in ours.values())
    return theirs


def latent_diffusion(ours: dict[str, mx.array]) -> dict[str, mx.array]:
    """An AutoencoderKL as in ae.safetensors."""
    levels = len({name.split(".")[2] for name in ours if name.startswith("decoder.up_blocks.")})
    theirs = {}
    for name, tensor in ours.items():
        known = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        known = re.sub(r"encoder\.down_blocks\.(\d+)\.resnets", r"encoder.down.\1.block", known)
        known = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", known)
        known = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", known)
        known = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", known)
        known = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", known)
        if "attentions.0" in known:
            known = known.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm")
            known = known.replace("to_out.0", "proj_out").replace("to_", "")
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        theirs[known] = tensor
    assert not any("_blocks" in name or "mid_block" in name for name in theirs)
    return theirs


def prefixed(tensors: dict[str, mx.array], prefix: str) -> dict[str, mx.array]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def parts_of(model: Path) -> dict[str, dict[str, mx.array]]:
    """tiny-flux' networks under the names of their files' authors, by file."""
    clip = weights(model / "text_encoder")
    return {
        "flux1-dev": black_forest_labs(weights(model / "transformer")),
        "ae": latent_diffusion(weights(model / "vae")),
        "clip_l": prefixed(clip, "text_model.") | {"text_model.embeddings.position_ids": mx.arange(77)[None]},
        "t5xxl_fp16": weights(model / "text_encoder_2"),
    }


def all_in_one(parts: dict[str, dict[str, mx.array]], prefix: str = "model.diffusion_model.") -> dict[str, mx.array]:
    """One file as ComfyUI saves a checkpoint. prefix: the transformer's."""
    prefixes = {
        "flux1-dev": prefix, "ae": "vae.", "clip_l": "text_encoders.clip_l.transformer.",
        "t5xxl_fp16": "text_encoders.t5xxl.transformer.",
    }  # fmt: skip
    found = {n: t for name, tensors in parts.items() for n, t in prefixed(tensors, prefixes[name]).items()}
    found["text_encoders.clip_l.logit_scale"] = mx.array(4.6)
    found["text_encoders.clip_l.transformer.text_projection.weight"] = mx.zeros((2, 2))
    return found


SANA = {
    "patch_embed.proj": "x_embedder.proj", "time_embed.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_embed.emb.timestep_embedder.linear_2": "t_embedder.mlp.2", "time_embed.linear": "t_block.1",
    "time_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_embed.guidance_embedder.linear_1": "cfg_embedder.mlp.0",
    "time_embed.guidance_embedder.linear_2": "cfg_embedder.mlp.2",
    "caption_projection.linear_1": "y_embedder.y_proj.fc1", "caption_projection.linear_2": "y_embedder.y_proj.fc2",
    "caption_norm": "attention_y_norm", "proj_out": "final_layer.linear", "attn1.to_out.0": "attn.proj",
    "attn1.norm_q": "attn.q_norm", "attn1.norm_k": "attn.k_norm", "attn2.to_q": "cross_attn.q_linear",
    "attn2.to_out.0": "cross_attn.proj", "attn2.norm_q": "cross_attn.q_norm", "attn2.norm_k": "cross_attn.k_norm",
    "ff.conv_inverted": "mlp.inverted_conv.conv", "ff.conv_depth": "mlp.depth_conv.conv",
    "ff.conv_point": "mlp.point_conv.conv",
}  # fmt: skip


def nvidia(ours: dict[str, mx.array]) -> dict[str, mx.array]:
    """A SANA transformer as in NVIDIA's own checkpoints."""
    theirs = {"pos_embed": mx.zeros((1, 4, 2)), "y_embedder.y_embedding": mx.zeros((3, 2))}
    for name, tensor in ours.items():
        match = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", name)
        prefix, inner = (f"blocks.{match[1]}.", match[2]) if match else ("", name)
        module, _, kind = inner.rpartition(".")
        if inner == "scale_shift_table":
            theirs[f"{prefix or 'final_layer.'}scale_shift_table"] = tensor
        elif module == "attn1.to_q":
            parts = [ours[name.replace("to_q", f"to_{part}")] for part in "qkv"]
            theirs[f"{prefix}attn.qkv.{kind}"] = mx.concatenate(parts)
        elif module == "attn2.to_k":
            theirs[f"{prefix}cross_attn.kv_linear.{kind}"] = mx.concatenate(
                [tensor, ours[name.replace("to_k", "to_v")]]
            )
        elif module not in ("attn1.to_k", "attn1.to_v", "attn2.to_v"):
            theirs[f"{prefix}{SANA[module]}.{kind}"] = tensor
    return theirs


def efficientvit(ours: dict[str, mx.array]) -> dict[str, mx.array]:
    """A DC-AE as its authors' code has it."""
    ends = {
        "encoder.conv_in.conv": "encoder.project_in.main.conv", "encoder.conv_in": "encoder.project_in.conv",
        "encoder.conv_out": "encoder.project_out.main.op_list.0.conv",
        "decoder.conv_in": "decoder.project_in.main.conv", "decoder.norm_out": "decoder.project_out.op_list.0",
        "decoder.conv_out.conv": "decoder.project_out.op_list.2.main.conv",
        "decoder.conv_out": "decoder.project_out.op_list.2.conv",
    }  # fmt: skip
    inside = {
        "conv": "main.conv.conv", "conv1": "main.conv1.conv", "conv2": "main.conv2.conv", "norm": "main.conv2.norm",
        "attn.to_qkv_multiscale.0.proj_in": "context_module.main.aggreg.0.0",
        "attn.to_qkv_multiscale.0.proj_out": "context_module.main.aggreg.0.1",
        "attn.to_out": "context_module.main.proj.conv", "attn.norm_out": "context_module.main.proj.norm",
        "conv_out.conv_inverted": "local_module.main.inverted_conv.conv",
        "conv_out.conv_depth": "local_module.main.depth_conv.conv",
        "conv_out.conv_point": "local_module.main.point_conv.conv",
        "conv_out.norm": "local_module.main.point_conv.norm",
    }  # fmt: skip
    theirs = {}
    for name, tensor in ours.items():
        module, _, kind = name.rpartition(".")
        match = re.fullmatch(r"(encoder|decoder)\.(?:down|up)_blocks\.(\d+)\.(\d+)\.(.+)", module)
        if match is None:
            theirs[f"{ends[module]}.{kind}"] = tensor
            continue
        block = f"{match[1]}.stages.{match[2]}.op_list.{match[3]}"
        if match[4] == "attn.to_q":
            parts = [ours[name.replace("to_q", f"to_{part}")] for part in "qkv"]
            theirs[f"{block}.context_module.main.qkv.conv.{kind}"] = mx.concatenate(parts)[:, :, None, None]
        elif match[4] not in ("attn.to_k", "attn.to_v"):
            known = match[4] == "attn.to_out"
            theirs[f"{block}.{inside[match[4]]}.{kind}"] = tensor[:, :, None, None] if known else tensor
    return theirs


def assert_read_as(path, tensors, ours, tables, family, made_by_diffusers):
    """A single file of a transformer gives the tensors that diffusers' converter makes of it, and is taken for no other
    family's. ours: by their names.
    """
    import torch

    files.save_tensors(path, tensors)
    views = singles.opened(path)
    found = singles.held(path, views, tables).networks["transformer"]
    reference = made_by_diffusers({name: torch.from_numpy(np.array(tensor)) for name, tensor in tensors.items()})
    assert found.keys() == reference.keys() == ours.keys()
    for name, tensor in reference.items():
        np.testing.assert_array_equal(np.array(found[name].read()), tensor.numpy(), err_msg=name)
    assert singles.kinds(path, views) == {family: ["transformer"]}


def assert_same_directory(path, checkpoint, flat, other_config):
    """Single files give the shards that the checkpoint gives, beside a base whose transformer has another config."""
    whole = convert(hf_path=str(checkpoint), mlx_path=str(path / "one"))
    base = shutil.copytree(checkpoint, path / "base")
    config = files.read_json(base / "transformer" / "config.json")
    files.write_json(base / "transformer" / "config.json", {**config, **other_config})
    other = convert(hf_path=str(flat), mlx_path=str(path / "two"), base=str(base))
    shards = sorted(found.relative_to(whole) for found in whole.rglob("*.safetensors"))
    assert shards == sorted(found.relative_to(other) for found in other.rglob("*.safetensors"))
    assert all((whole / name).read_bytes() == (other / name).read_bytes() for name in shards)
    assert open_model(other).config == open_model(whole).config
