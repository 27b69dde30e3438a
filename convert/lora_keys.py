"""How tools call the tensors of a LoRA file: prefix, layer, factor. Nothing here knows which layers a model has.

| tool | a key |
|---|---|
| diffusers, PEFT, ai-toolkit, SimpleTuner | `transformer.transformer_blocks.0.attn.to_q.lora_A.weight` |
| PEFT's directories | `base_model.model.transformer_blocks.0.attn.to_q.lora_A.default.weight` |
| ComfyUI, and others in Black Forest Labs' names | `diffusion_model.double_blocks.0.img_attn.qkv.lora_up.weight` |
| kohya's sd-scripts | `lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight`, `.alpha` |
| OneTrainer | `lora_transformer_transformer_blocks_0_attn_to_q.lora_down.weight` |
| XLabs | `double_blocks.0.processor.qkv_lora1.down.weight` |
| mflux, mlx-examples, mlx-lm | `transformer_blocks.0.attn.to_q.lora_A`, `double_blocks.0.img_attn.qkv.lora_a` |
"""

import re
from dataclasses import dataclass

PREFIXES = ("base_model.model.", "model.", "diffusion_model.", "transformer.", "unet.")
"""What stands before a layer's path, several of them one after the other."""

FLAT_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_")
"""What stands before a layer's path whose dots are underscores."""

LETTERS = {"lora_A": "a", "lora_down": "a", "lora.down": "a", "down": "a", "lora_a": "a"}
LETTERS |= {"lora_B": "b", "lora_up": "b", "lora.up": "b", "up": "b", "lora_b": "b"}

FACTOR = re.compile(r"(?P<layer>.+)\.(?P<letter>lora_[AB]|lora_down|lora_up|lora\.down|lora\.up)(\.[^.]+)?\.weight")
XLABS = re.compile(r"(?P<layer>.+\.processor\.\w*lora\d?)\.(?P<letter>down|up)\.weight")
BARE = re.compile(r"(?P<layer>.+)\.(?P<letter>lora_[ABab])")
ALPHA = re.compile(r"(?P<layer>.+?)(\.lora)?\.alpha")

TEXT_ENCODER = re.compile(
    r"(base_model\.model\.)?(text_encoders?(_\d)?\.|text_model\.|lora_te\d?_|lycoris_te|(clip|t5)\w*\.).*"
)

OTHER_KINDS = (
    ("DoRA", re.compile(r".*(lora_magnitude_vector|dora_scale)(\..*)?")),
    ("LoKr", re.compile(r".*\.lokr_\w+")),
    ("LoHa", re.compile(r".*\.hada_\w+")),
    ("LoCon with a middle factor", re.compile(r".*\.(lora_mid|hada_t\d)(\..*)?")),
    ("OFT", re.compile(r".*\.(oft_\w+)(\..*)?")),
)
ADDED = re.compile(r".*\.(diff|diff_b|(lora_B|lora_up|lora\.up)(\.[^.]+)?\.bias)")
"""Added to a weight or to a bias as it is: without effect where it is zero."""


@dataclass(frozen=True)
class Key:
    """A tensor's part: "a" (in, r), "b" (r, out), "alpha" of `layer` (with its prefix), "text" (for a text encoder),
    "added" (see ADDED), a kind of adapter that is no LoRA, or "unknown". bare: both factors may be as MLX has them.
    """

    part: str
    layer: str = ""
    bare: bool = False


def parse(name: str) -> Key:
    """What a tensor of this name is."""
    if TEXT_ENCODER.fullmatch(name):
        return Key("text")
    for kind, pattern in OTHER_KINDS:
        if pattern.fullmatch(name):
            return Key(kind)
    if ADDED.fullmatch(name):
        return Key("added")
    for pattern in (FACTOR, XLABS, BARE):
        if match := pattern.fullmatch(name):
            return Key(LETTERS[match["letter"]], match["layer"], pattern is BARE)
    if match := ALPHA.fullmatch(name):
        return Key("alpha", match["layer"])
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
