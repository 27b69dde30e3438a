"""The model card of an adapter or a converted model: README.md on the Hub, its metadata and its text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any

from mlx_blockskip.engine import files
from mlx_blockskip.tasks.checkpoint.address import Repo, repo_named

TAG = "mlx-blockskip"
LICENCE_KEYS = ("license", "license_name", "license_link")
SHOWN = ("steps", "rank", "scale", "targets")
SHOWN_SETTINGS = ("learning_rate", "batch_size", "grad_accumulation", "resolution", "train_resolution", "patch_mode",
                  "residuals", "guidance", "seed")  # fmt: skip
METRICS = {"dino": "DINO", "clip_i": "CLIP-I", "clip_t": "CLIP-T"}

ADAPTER = Template("""# $title

A LoRA for $base, trained on $count by mlx-blockskip (DiT-BlockSkip on MLX).

$prompt
$pictures
## Use

With mlx-blockskip, on a Mac:

```bash
hf download $repo --local-dir $name
mlx-blockskip generate --model $base_name --adapter-path $name --prompt "$example"
```

With diffusers:

```python
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("$base_name", torch_dtype=torch.bfloat16)
pipe.load_lora_weights("$repo", weight_name="$weights")
image = pipe("$example").images[0]
```

With ComfyUI: put `$weights` into `models/loras` under a name of your choice, and load it with the node
*LoraLoaderModelOnly* behind the node that loads $base.

## Training

$settings
$metrics
## Licence

$licence
""")

MODEL = Template("""# $title

$base, converted to MLX by mlx-blockskip: $precision.

## Use

```bash
hf download $repo --local-dir $name
mlx-blockskip generate --model $name --prompt "a photo of a dog on a beach"
```

This directory is in MLX's layout, which diffusers and ComfyUI do not read; for these take $base itself. A LoRA that is
trained on it works with all three (`mlx-blockskip export`).

## Licence

$licence
""")


@dataclass(frozen=True)
class Base:
    """The model that something was made of. repo: None where it is not on the Hub, as far as is known. metadata: of its
    own card.
    """

    name: str
    repo: Repo | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def linked(self) -> str:
        return f"[{self.repo.name}](https://huggingface.co/{self.repo.name})" if self.repo else self.name

    def licence(self) -> dict[str, str]:
        """The licence's entries of a card. A link into the base's repo becomes one from anywhere."""
        found = {key: str(self.metadata[key]) for key in LICENCE_KEYS if self.metadata.get(key)}
        link = found.get("license_link", "")
        if link and "://" not in link and self.repo:
            found["license_link"] = f"https://huggingface.co/{self.repo.name}/blob/main/{link}"
        return found


@dataclass(frozen=True)
class Picture:
    """A sample. file: its name in the repo."""

    file: str
    prompt: str


def metadata_of(readme: Path) -> dict[str, Any]:
    """The metadata of a card on this disk; nothing where there is none, or it cannot be read."""
    from huggingface_hub import ModelCard

    try:
        text = readme.read_text(encoding="utf-8")
        return dict(ModelCard(text).data.to_dict()) if text.startswith("---") else {}
    except Exception:  # whatever another tool wrote there
        return {}


def base_of(source: str, directory: Path | None) -> Base:
    """What a name or a path says the base model is. directory: where it lies here, if it does."""
    name = Path(source).name if source.startswith(("/", "~", ".")) else source
    repo = None if directory is not None and str(directory) == source else repo_named(source)
    return Base(repo.name if repo else name, repo, metadata_of(directory / "README.md") if directory else {})


def adapter_card(
    repo: str, config: Mapping[str, Any], base: Base, pictures: Sequence[Picture], means: Mapping[str, float], file: str
) -> str:
    """The card of an adapter. config: adapter_config.json. means: of its evaluation, if there is one. file: the LoRA in
    diffusers' format.
    """
    captions = list(dict.fromkeys(config.get("captions") or []))
    example = captions[0] if captions else "a photo"
    data = {
        **_common(base, "adapter", [TAG, "lora", "diffusers", "dreambooth", "template:sd-lora", config["family"]]),
        "library_name": "diffusers",
        "instance_prompt": example if captions else None,
        "widget": [{"text": shown.prompt, "output": {"url": shown.file}} for shown in pictures] or None,
    }
    text = ADAPTER.substitute(
        title=_name(repo),
        base=base.linked,
        base_name=base.name,
        name=_name(repo),
        repo=repo,
        weights=file,
        example=example.replace('"', "'"),
        count=_counted(len(config.get("captions") or []), "photo"),
        prompt=f"Prompt: `{example}`\n" if captions else "",
        pictures="".join(f"![{shown.prompt}]({shown.file})\n" for shown in pictures),
        settings=_settings(config),
        metrics=_metrics(means),
        licence=_licence(base),
    )
    return _card(data, text)


def model_card(repo: str, config: Mapping[str, Any], base: Base) -> str:
    """The card of a converted model. config: its config.json."""
    quantization = config.get("quantization")
    relation = "quantized" if quantization else None
    data = {**_common(base, relation, [TAG, "mlx", config["family"]]), "library_name": "mlx"}
    precision = str(config["dtype"])
    if quantization and quantization["bits"]:
        precision = f"{quantization['bits']} bit in groups of {quantization['group_size']}, else {precision}"
    text = MODEL.substitute(
        title=_name(repo),
        base=base.linked,
        precision=precision,
        repo=repo,
        name=_name(repo),
        licence=_licence(base),
    )
    return _card(data, text)


def _common(base: Base, relation: str | None, tags: list[str]) -> dict[str, Any]:
    linked = {"base_model": base.repo.name, "base_model_relation": relation} if base.repo else {}
    return {**linked, **base.licence(), "pipeline_tag": "text-to-image", "tags": ["text-to-image", *tags]}


def _card(data: Mapping[str, Any], text: str) -> str:
    from huggingface_hub import ModelCard, ModelCardData

    metadata = ModelCardData(**{key: value for key, value in data.items() if value is not None})
    return str(ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{text}"))


def _name(repo: str) -> str:
    return repo.rsplit("/", 1)[-1]


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _settings(config: Mapping[str, Any]) -> str:
    settings = config.get("settings", {})
    rows = {name: config.get(name) for name in SHOWN} | {name: settings.get(name) for name in SHOWN_SETTINGS}
    if plan := config.get("plan"):
        skipped = ", ".join(f"{start} to {stop - 1}" for start, stop in plan["runs"]) or "none"
        rows["skipped blocks"] = f"{skipped} of {plan['depth']}"
    lines = [f"| {name.replace('_', ' ')} | {value} |" for name, value in rows.items() if value is not None]
    return "\n".join(["| setting | value |", "|---|---|", *lines, ""])


def _metrics(means: Mapping[str, float]) -> str:
    if not means:
        return ""
    lines = [f"| {METRICS[name]} | {value:.4f} |" for name, value in means.items() if name in METRICS]
    told = "By DreamBooth's protocol, as `mlx-blockskip evaluate` measures it:\n"
    return "\n".join(["## Evaluation\n", told, "| metric | mean |", "|---|---|", *lines, ""])


def _licence(base: Base) -> str:
    found = base.licence()
    name = found.get("license_name") or found.get("license")
    if not name:
        return f"That of {base.linked}, which it was made of."
    link = found.get("license_link")
    return f"That of {base.linked}: {f'[{name}]({link})' if link else name}."


def means_of(directory: Path) -> dict[str, float]:
    """What an evaluation in an adapter directory found on the whole."""
    report = directory / "evaluation" / "evaluation.json"
    means = files.read_json(report).get("means", {}) if report.is_file() else {}
    return {name: float(means[name]) for name in METRICS if means.get(name) is not None}
