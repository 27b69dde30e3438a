"""On exFAT disks and shares macOS keeps a `._name` beside every file and directory: none is taken for anything."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from mlx_blockskip import data, events, generate, train
from mlx_blockskip.converters.source import open_source
from mlx_blockskip.engine import listing
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.models import presets
from mlx_blockskip.models.registry import open_model
from mlx_blockskip.tasks.checkpoint import encoders
from mlx_blockskip.tasks.train import checkpoints
from support.compare import assert_same_adapter
from support.models import HEDGEHOG, assets, convert

APPLE_DOUBLE = b"\0\5\x16\7\0\2\0\0Mac OS X        "


def scatter(directory: Path) -> None:
    """A companion beside whatever is in a directory and below."""
    for path in list(directory.rglob("*")):
        if not path.name.startswith("."):
            listing.companion(path).write_bytes(APPLE_DOUBLE)


def names(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


def test_weights_tokenizers_and_configs(tmp_path, tiny_flux):
    source = shutil.copytree(assets() / "tiny-flux", tmp_path / "theirs")
    scatter(source)
    (source / ".cache").mkdir()
    (source / ".cache" / "config.json").write_text("{")
    assert presets.configs(source) == presets.configs(assets() / "tiny-flux")
    target = convert(source, tmp_path / "ours")
    assert names(target) == names(tiny_flux)
    before = open_model(target).identity
    scatter(target)
    assert open_model(target).identity == before


def test_pickled_weights_are_not_made_up(tmp_path):
    (tmp_path / "._pytorch_model.bin").write_bytes(APPLE_DOUBLE)
    with pytest.raises(UserError, match="has no safetensors file"):
        open_source(tmp_path)


def test_a_companion_does_not_make_a_small_model_large(tmp_path):
    (tmp_path / "transformer").mkdir()
    with (tmp_path / "transformer" / "._block-000.safetensors").open("wb") as file:
        file.truncate(encoders.SMALL)
    assert encoders.default(encoders.VISION, tmp_path) == "tiny-dino"


def test_images_and_captions(tmp_path):
    place = shutil.copytree(HEDGEHOG, tmp_path / "photos")
    scatter(place)
    assert data.load_dataset(place).identity == data.load_dataset(HEDGEHOG).identity
    examples = data.load_dataset(place).examples
    (place / "metadata.jsonl").write_text("".join(data.metadata_line(e.path.name, e.caption) for e in examples))
    scatter(place)
    assert data.load_dataset(place).warnings == ()


@pytest.mark.parametrize("family_model", ["toy"], indirect=True)
def test_chunks_checkpoints_class_images_and_adapters(quick, tmp_path):
    settings = quick("whole", iters=4, class_prompt=["a dog"], class_images=2)
    train(settings)
    stopped = replace(settings, adapter_path=str(tmp_path / "stopped"))

    def stop(event):
        scatter(tmp_path / "stopped")
        if isinstance(event, events.Step) and event.phase == "train" and event.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(stopped, on_event=stop)
    assert [path.name for path in checkpoints.found(tmp_path / "stopped")] == ["step-000002", "step-000003"]
    scatter(tmp_path / "stopped")
    train(replace(stopped, resume=True), on_event=lambda _: scatter(tmp_path / "stopped"))
    scatter(tmp_path / "stopped")
    assert_same_adapter(tmp_path / "whole", tmp_path / "stopped")
    assert not (tmp_path / "stopped" / "cache").exists()
    for name in ("whole", "stopped"):
        generate(
            model=settings.model, prompt="x", steps=2, adapter_path=[str(tmp_path / name)], width=64, height=64,
            output=str(tmp_path / f"{name}.png"),
        )  # fmt: skip
    a, b = (data.load_image(tmp_path / f"{name}.png") for name in ("whole", "stopped"))
    assert a.tobytes() == b.tobytes()
