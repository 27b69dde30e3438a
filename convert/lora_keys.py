"""How tools call the tensors of a LoRA file: prefix, layer, part. Nothing here knows which layers a model has.

| tool | a key |
|---|---|
| diffusers, PEFT, ai-toolkit, SimpleTuner | `transformer.transformer_blocks.0.attn.to_q.lora_A.weight` |
| PEFT's directories | `base_model.model.transformer_blocks.0.attn.to_q.lora_A.default.weight` |
| ComfyUI, and others in Black Forest Labs' names | `diffusion_model.double_blocks.0.img_attn.qkv.lora_up.weight` |
| kohya's sd-scripts | `lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight`, `.alpha` |
| OneTrainer | `lora_transformer_transformer_blocks_0_attn_to_q.lora_down.weight` |
| XLabs | `double_blocks.0.processor.qkv_lora1.down.weight` |
| mflux, mlx-examples, mlx-lm | `transformer_blocks.0.attn.to_q.lora_A`, `double_blocks.0.img_attn.qkv.lora_a` |
| LyCORIS, ai-toolkit, PEFT | `lycoris_transformer_blocks_0_attn_to_q.lokr_w1`, `….hada_w1_a`, `….dora_scale` |
| ComfyUI's extractions | `diffusion_model.double_blocks.0.img_attn.qkv.diff`, `.diff_b` |
"""

import re
from dataclasses import dataclass

PREFIXES = ("base_model.model.", "model.", "diffusion_model.", "transformer.", "unet.")
"""What stands before a layer's path, several of them one after the other."""

FLAT_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_")
"""What stands before a layer's path whose dots are underscores."""

LETTERS = {"lora_A": "a", "lora_down": "a", "lora.down": "a", "down": "a", "lora_a": "a"}
LETTERS |= {"lora_B": "b", "lora_up": "b", "lora.up": "b", "up": "b", "lora_b": "b", "lora_mid": "mid"}

FACTOR = re.compile(
    r"(?P<layer>.+)\.(?P<letter>lora_[AB]|lora_down|lora_up|lora_mid|lora\.down|lora\.up)(\.[^.]+)?\.weight"
)
XLABS = re.compile(r"(?P<layer>.+\.processor\.\w*lora\d?)\.(?P<letter>down|up)\.weight")
BARE = re.compile(r"(?P<layer>.+)\.(?P<letter>lora_[ABab])")

OTHERS = (
    ("alpha", re.compile(r"(?P<layer>.+?)(\.lora)?\.alpha")),
    ("magnitude", re.compile(r"(?P<layer>.+)\.lora_magnitude_vector(\..*)?")),
    ("lengths", re.compile(r"(?P<layer>.+)\.dora_scale")),
    ("diff", re.compile(r"(?P<layer>.+)\.(diff|w_norm)")),
    ("diff_b", re.compile(r"(?P<layer>.+)\.(diff_b|b_norm)")),
    ("bias", re.compile(r"(?P<layer>.+)\.(lora_B|lora_up|lora\.up)(\.[^.]+)?\.bias")),
)
LYCORIS = re.compile(r"(?P<layer>.+)\.(?P<part>lokr_w[12](_[ab])?|lokr_t2|hada_w[12]_[ab]|hada_t[12])(\.[^.]+)?")

TEXT_ENCODER = re.compile(
    r"(base_model\.model\.)?(text_encoders?(_\d)?\.|text_model\.|lora_te\d?_|lycoris_te|(clip|t5)\w*\.).*"
)

OFT = re.compile(r".*\.(b?oft_\w+)(\..*)?")


@dataclass(frozen=True)
class Key:
    """A tensor's part of `layer` (with its prefix): "a" (r, in), "b" (out, r), "mid", "alpha", "magnitude" of PEFT and
    "lengths" of LyCORIS, which are DoRA's, "diff" and "diff_b" of weight and bias, "bias" of b, or LyCORIS' name; or
    "text" (for a text encoder), "OFT", "unknown". bare: both factors may be as MLX has them.
    """

    part: str
    layer: str = ""
    bare: bool = False


def parse(name: str) -> Key:
    """What a tensor of this name is."""
    if TEXT_ENCODER.fullmatch(name):
        return Key("text")
    if OFT.fullmatch(name):
        return Key("OFT")
    for pattern in (FACTOR, XLABS, BARE):
        if match := pattern.fullmatch(name):
            return Key(LETTERS[match["letter"]], match["layer"], pattern is BARE)
    if match := LYCORIS.fullmatch(name):
        return Key(match["part"], match["layer"])
    for part, pattern in OTHERS:
        if match := pattern.fullmatch(name):
            return Key(part, match["layer"])
    return Key("unknown")


def stripped(layer: str) -> str:
    """A layer's path without what tools put before it."""
    while prefix := next((p for p in PREFIXES if layer.startswith(p)), None):
        layer = layer.removeprefix(prefix)
    return layer


def flat(layer: str) -> str | None:
    """The path of a layer whose dots are underscores; None where they are dots."""
    prefix = next((p for p in FLAT_PREFIXES if layer.startswith(p)), None)
    return None if prefix is None else layer.removeprefix(prefix)
