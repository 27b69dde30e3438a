"""A folder of what people hand in by mistake or by malice, for commands that are run in it."""

import json
import os
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from mlx_blockskip.tasks.sampling.pictures import PNG_KEY

BOMB = 200 << 20
"""Bytes of a text that a PNG of 200 KB holds."""

YAML = {
    "list.yaml": "- a\n- b",
    "open.yaml": "a: [",
    "bomb.yaml": "a: &a [x, x]\nb: &b [*a, *a]\nprompt: [*b, *b]",
    "deep.yaml": "prompt: " + "[" * 3000,
    "large.yaml": "# " + "x" * 300_000,
    "twice.yaml": "rank: 4\nrank: 8",
    "both.yaml": "max-sequence-length: 4\nmax_sequence_length: 8",
    "date.yaml": "iters: 2024-01-01",
    "noday.yaml": "iters: 2024-13-45",
    "nan.yaml": "learning_rate: .nan",
    "unknown.yaml": "learning_rat: 1",
    "object.yaml": "rank: {a: 1}",
    "python.yaml": "rank: !!python/object/apply:os.system [ls]",
    "digits.yaml": "seed: " + "9" * 5000,
    "latin.yaml": b"prompt: caf\xe9",
    "text.yaml": "just words",
    "nul.yaml": 'data: "a\\0b"',
}
DEFAULTS = {
    "wide": {"width": 10**9},
    "text": {"width": "64"},
    "rankless": {"rank": 0},
    "nan": {"learning_rate": float("nan")},
    "listed": [],
    "classes": {"class_prompt": [1]},
    "plans": {"plans": {"0.5": [3, 3]}},
    "planless": {"plans": [3, 3]},
    "patches": {"patch_mode": "spiral"},
}


def fill(place: Path, model: Path) -> None:
    """Make all of it. model: a whole MLX model directory."""
    (place / "flux").symlink_to(model)
    _photos(place)
    _texts(place)
    _models(place, json.loads((model / "config.json").read_text()), model)
    _adapters(place)
    _pictures(place)
    _noises(place)


def _photos(place: Path) -> None:
    (place / "photos").mkdir()
    Image.new("RGB", (64, 64), "red").save(place / "photos" / "a.png")
    (place / "photos" / "a.txt").write_text("a photo of sks dog")
    for name in ("empty", "broken", "nocaption", "icloud", "rtf", "listed"):
        (place / name).mkdir()
    (place / "broken" / "a.png").write_bytes(b"no image")
    for name in ("nocaption", "rtf", "listed"):
        Image.new("RGB", (64, 64), "red").save(place / name / "a.png")
    (place / "icloud" / ".a.jpg.icloud").touch()
    (place / "rtf" / "a.txt").write_text("{\\rtf1 a dog}")
    (place / "listed" / "metadata.jsonl").write_text('{"file_name": "/etc/passwd", "text": "x"}')


def _texts(place: Path) -> None:
    for name, content in YAML.items():
        (place / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    (place / "latin.txt").write_bytes(b"caf\xe9")
    (place / "empty.txt").write_text("\n\n")
    (place / "plain.txt").write_text("a dog on a mat\n")
    (place / "named.txt").write_text("a {} on a mat\n")
    (place / "array.json").write_text("[1, 2]")
    (place / "number.json").write_text("3")
    (place / "deep.json").write_text("[" * 100_000)
    (place / "plan.json").write_text('{"skip": "all"}')
    (place / "dir.png").mkdir()


def _models(place: Path, config: dict, model: Path) -> None:
    for name, defaults in DEFAULTS.items():
        _model(place / f"model-{name}", model, {**config, "defaults": defaults})
    _model(place / "model-family", model, {**config, "family": "none"})
    _model(place / "model-format", model, {**config, "format": 9})
    _model(place / "model-array", model, [1])


def _model(target: Path, model: Path, config: object) -> None:
    target.mkdir()
    for part in model.iterdir():
        if part.name != "config.json":
            os.symlink(part, target / part.name)
    (target / "config.json").write_text(json.dumps(config))


def _adapters(place: Path) -> None:
    found: dict[str, object] = {
        "array": [],
        "settings": {"settings": {"rank": "many"}},
        "range": {"settings": {"learning_rate": -1.0}},
        "captions": {"captions": [1]},
        "base": {"base_model": 3},
        "named": {"base_model": "flux", "captions": ["a sks dog"], "settings": {"data": "photos"}},
    }
    for name, config in found.items():
        (place / f"adapter-{name}").mkdir()
        (place / f"adapter-{name}" / "adapter_config.json").write_text(json.dumps(config))


def _pictures(place: Path) -> None:
    good = {"model": "tiny-flux", "prompt": ["a dog"], "seed": 1, "steps": 1, "width": 32, "height": 32}
    texts: dict[str, object] = {
        "good": good,
        "model": {**good, "model": "owner/name"},
        "adapter": {**good, "adapter_path": ["/etc/dog"]},
        "noise": {**good, "noise": "/etc/noise"},
        "steps": {**good, "steps": 10**9},
        "width": {**good, "width": "64"},
        "cfg": {**good, "cfg_scale": float("inf")},
        "prompts": {**good, "prompt": ["a"] * 9},
        "none": {"seed": 1},
        "array": [good],
    }
    for name, settings in texts.items():
        _picture(place / f"of-{name}.png", json.dumps(settings))
    _picture(place / "of-words.png", "no JSON")
    _picture(place / "of-deep.png", "[" * 100_000)
    Image.new("RGB", (8, 8)).save(place / "of-nothing.png")
    Image.new("RGB", (8, 8)).save(place / "of-jpeg.jpg")
    (place / "of-bytes.png").write_bytes(b"no image")
    info = PngImagePlugin.PngInfo()
    info.add(b"zTXt", PNG_KEY.encode() + b"\0\0" + zlib.compress(b"x" * BOMB, 9))
    Image.new("RGB", (8, 8)).save(place / "of-bomb.png", pnginfo=info)


def _picture(path: Path, text: str) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_itxt(PNG_KEY, text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)


def _noises(place: Path) -> None:
    import mlx.core as mx

    noise = np.zeros((1, 16, 8, 8), np.float32)
    mx.save_safetensors(str(place / "small.safetensors"), {"noise": mx.array(noise[:, :, :2])})
    mx.save_safetensors(str(place / "other.safetensors"), {"latents": mx.array(noise)})
    noise[0, 0, 0, 0] = np.nan
    mx.save_safetensors(str(place / "nan.safetensors"), {"noise": mx.array(noise)})
