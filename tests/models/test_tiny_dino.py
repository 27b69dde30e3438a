"""tiny-dino: it opens in transformers, and tells emoji apart that were kept out of its training."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlx_blockskip import convert
from mlx_blockskip.engine import files
from mlx_blockskip.models.vision import preprocess
from mlx_blockskip.models.vision.encoder import open_encoder
from support.compare import assert_parity
from support.models import assets
from support.vision import pictures

SOURCE = assets() / "tiny-dino"
SHEET = Path(__file__).parents[2] / "examples" / "quality"
HELD_OUT = ("ghost", "rocket", "turtle", "hamburger", "otter", "beaver", "turkey", "mango", "coffee", "violin", "snail")
CELL = 64


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return open_encoder(convert(hf_path=str(SOURCE), mlx_path=str(tmp_path_factory.mktemp("dino") / "mlx")))


def test_it_is_small_and_stored_in_half_precision():
    header = files.read_header(SOURCE / "model.safetensors")
    assert {entry.dtype for entry in header.entries.values()} == {"F16"}
    assert sum(path.stat().st_size for path in SOURCE.iterdir()) < 4 << 20
    assert "SIL Open Font License" in (SOURCE / "README.md").read_text(encoding="utf-8")


def test_it_equals_transformers(encoder):
    torch = pytest.importorskip("torch")
    from transformers import ViTModel

    reference = ViTModel.from_pretrained(str(SOURCE), add_pooling_layer=False).float().eval()
    images = pictures((64, 64), (128, 128), (90, 130))
    inputs = np.stack([preprocess.pixels(image, encoder.how).transpose(2, 0, 1) for image in images])
    with torch.no_grad():
        theirs = reference(torch.from_numpy(inputs)).last_hidden_state[:, 0].numpy()
    theirs = theirs / np.linalg.norm(theirs, axis=-1, keepdims=True)
    assert_parity("tiny-dino", encoder.embed_images(images), theirs)


def emoji(name: str) -> Image.Image:
    """One cell of the sheet."""
    sheet = Image.open(SHEET / "emoji.png")
    i = json.loads((SHEET / "emoji.json").read_text()).index(name)
    left, top = i % 10 * CELL, i // 10 * CELL
    return sheet.crop((left, top, left + CELL, top + CELL))


def on(colour: str, cell: Image.Image, side: int, place: tuple[int, int]) -> Image.Image:
    """128 px, as tiny-flux draws it."""
    shown, canvas = cell.resize((side, side), Image.Resampling.LANCZOS), Image.new("RGB", (128, 128), colour)
    canvas.paste(shown, place, shown)
    return canvas


def test_pictures_of_one_unseen_emoji_are_nearer_than_those_of_two(encoder):
    views = [("white", 96, (16, 16)), ("royalblue", 70, (8, 40)), ("orange", 84, (40, 30)), ("gray", 60, (50, 10))]
    images = [on(colour, emoji(name), side, place) for name in HELD_OUT for colour, side, place in views]
    found = encoder.embed_images(images)
    count, many = len(HELD_OUT), len(views)
    near = (found @ found.T).reshape(count, many, count, many)
    wins = [
        near[i, a, i, b] > np.delete(near[i, a], i, axis=0)
        for i in range(count)
        for a in range(many)
        for b in range(many)
        if a != b
    ]
    assert np.mean(wins) >= 0.9
