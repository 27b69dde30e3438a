"""`--from-image`: a picture is drawn again by the settings that its file holds.

Somebody else may have written the file. So it says how to draw, and what is opened or written comes from the user.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image as PillowImage

from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.options import changed, shown
from mlx_blockskip.settings import GenerateSettings
from mlx_blockskip.tasks.checkpoint.resolve import BUNDLED
from mlx_blockskip.tasks.defaults import FROM_MODEL
from mlx_blockskip.tasks.sampling.pictures import PNG_KEY

TAKEN = ("negative_prompt", "seed", *FROM_MODEL)
"""What is taken from a picture as it is; a prompt, a model in the package and strengths have rules of their own."""


def recall(settings: GenerateSettings) -> GenerateSettings:
    """The settings with those of the picture, over which go those that were given. Raises UserError for a picture that
    holds none, and where it was drawn with files that were not given.
    """
    path = Path(settings.from_image or "").expanduser()
    found = kept_settings(path)
    taken = {name: found[name] for name in TAKEN if name in found and name not in settings.given}
    if not settings.prompt and not settings.prompt_file:
        taken["prompt"] = _prompt(found, path)
    try:
        return changed(settings, **taken, **_files(found, settings, path), from_image=None)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def kept_settings(path: Path) -> dict[str, Any]:
    """What a PNG says of how it was drawn. Raises UserError where that is nothing, or nothing of this tool's."""
    try:
        with PillowImage.open(path) as image:  # which bounds the texts that it makes whole
            text = image.info.get(PNG_KEY)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; --from-image takes a PNG made by mlx-blockskip") from None
    except Exception as error:  # decoders raise whatever a broken file makes of them
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not an image that Pillow can read ({reason})") from None
    if not isinstance(text, str):
        raise UserError(f"{path}: holds no settings; only PNG files made by mlx-blockskip do")
    try:
        found = json.loads(text)
        if isinstance(found, dict):
            return found
    except (ValueError, RecursionError):
        pass
    raise UserError(f"{path}: its settings are damaged; give --prompt and the others by hand")


def _prompt(found: Mapping[str, Any], path: Path) -> list[str]:
    """A picture shows one prompt."""
    prompts = found.get("prompt")
    if isinstance(prompts, list) and len(prompts) == 1 and isinstance(prompts[0], str):
        return prompts
    raise UserError(f"{path}: its prompt is not one text; give --prompt")


def _files(found: Mapping[str, Any], settings: GenerateSettings, path: Path) -> dict[str, Any]:
    """The model where it is in the package, and the strengths of adapters that were given. Raises UserError, a
    sentence that begins with what is to be given, where the picture needs another file.
    """
    taken: dict[str, Any] = {}
    model, adapters, noise = (found.get(name) for name in ("model", "adapter_path", "noise"))
    if "model" not in settings.given and model is not None:
        if model not in BUNDLED:
            raise _needed("model", model, "the model")
        taken["model"] = model
    if adapters and not settings.adapter_path:
        raise _needed("adapter_path", adapters, "the adapter")
    if noise is not None and settings.noise is None and "seed" not in settings.given:
        raise _needed("noise", noise, "the noise of")
    scales = found.get("lora_scale")
    if "lora_scale" not in settings.given and isinstance(scales, list) and len(scales) <= len(settings.adapter_path):
        taken["lora_scale"] = scales
    return taken


def _needed(name: str, value: Any, what: str) -> UserError:
    values = [shown(str(one)) for one in (value if isinstance(value, list) else [value])[:4]]
    flags = " ".join(f"--{name.replace('_', '-')} {one}" for one in values)
    return UserError(
        f"was drawn with {what} {', '.join(values)}, and a picture may not choose which files are opened; "
        f"give {flags}, or your own"
    )
