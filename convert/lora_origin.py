"""Which model an adapter file is likely for, by the names in it and by what it says of itself."""

import re
from collections.abc import Iterable, Mapping

UNET = r"(lora_unet_|unet\.|diffusion_model\.)?"
MARKS = (
    (
        "Stable Diffusion XL",
        rf"lora_te2_|{UNET}(down|up)_blocks[_.]\d[_.]attentions[_.]\d[_.]transformer_blocks[_.][2-9]",
    ),
    ("Stable Diffusion", rf"{UNET}(down_blocks|up_blocks|mid_block|input_blocks|output_blocks)[_.]"),
    ("Z-Image", r"(.*[._])?layers[._]\d+[._](attention|adaLN_modulation|feed_forward)[._]"),
    ("FLUX.2", r".*(double_stream_modulation|attn[._]to_qkv_mlp_proj|(double|single)_stream_)"),
    ("Qwen-Image", r".*transformer_blocks[._]\d+[._](img_mlp|txt_mlp|img_mod|txt_mod)[._]"),
    ("Stable Diffusion 3", r".*joint_blocks[._]\d+[._]"),
    ("Wan", r".*blocks[._]\d+[._](cross_attn|self_attn)[._]"),
    ("FLUX.1", r".*(single_transformer_blocks|double_blocks|single_blocks)[._]\d+[._]"),
    ("SANA", r".*blocks[._]\d+[._](attn[12][._]to_|ff[._]conv_|mlp[._](inverted|depth|point)_conv)"),
    ("a language model", r".*(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"),
)
"""What the first name that one of these fits is of; the more particular come first."""


def likely(names: Iterable[str]) -> str:
    """The end of a sentence that says which model a file with these tensors is for; empty where it cannot be told."""
    known = list(names)
    for model, pattern in MARKS:
        if any(re.match(pattern, name) for name in known):
            return f" (its names are those of {model})"
    return ""


def disagreement(said: Mapping[str, str], own: Mapping[str, str]) -> tuple[str, str] | None:
    """What a file says it is for, and what the model is, in ModelSpec's words, else in sd-scripts'; None where they
    agree, or one of them says nothing.
    """
    for key in ("modelspec.architecture", "ss_base_model_version"):
        theirs, ours = (str(metadata.get(key) or "").partition("/")[0] for metadata in (said, own))
        if theirs and ours:
            return (theirs, ours) if theirs != ours else None
    return None
