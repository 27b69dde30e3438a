import hashlib
import json
import struct
import zlib
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as how
from hypothesis import strategies as st
from PIL import Image

from mlx_blockskip import captioned, data, photos
from mlx_blockskip.data import load_dataset, load_image, to_image, to_pixels
from mlx_blockskip.engine.errors import UserError
from support import icc

COLOURS = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[255, 255, 255], [0, 0, 0], [200, 120, 40]]], np.uint8)


def picture(scale=8):
    """Six plain squares: 48 x 32 at scale 8 is 3 x 2 squares of 8 pixels."""
    return Image.fromarray(COLOURS.repeat(scale, 0).repeat(scale, 1))


def saved(path, image=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or picture()).save(path, **options)
    return path


def squares(image, scale=8):
    """The colour in the middle of each square."""
    assert image.mode == "RGB"
    return np.asarray(image, int)[scale // 2 :: scale, scale // 2 :: scale]


def difference(image, expected):
    return np.abs(np.asarray(image, int) - np.asarray(expected, int)).max()


# formats


@pytest.mark.parametrize(
    ("suffix", "options", "tolerance"),
    [
        ("png", {}, 0),
        ("bmp", {}, 0),
        ("tiff", {}, 0),
        ("webp", {"lossless": True}, 0),
        ("gif", {}, 0),
        ("jpg", {"quality": 100, "subsampling": 0}, 4),
        ("JPEG", {"quality": 100, "subsampling": 0}, 4),
    ],
)
def test_formats_keep_their_colours(tmp_path, suffix, options, tolerance):
    assert difference(squares(load_image(saved(tmp_path / f"a.{suffix}", **options))), COLOURS) <= tolerance


def heic(path):
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.from_pillow(picture(16)).save(path, quality=100, chroma=444)
    return path


@pytest.mark.parametrize("name", ["a.heic", "a.HEIF", "a.jpg", "a.png"])
def test_heic_is_known_by_its_content(tmp_path, name):
    heic(tmp_path / "made.heic").rename(tmp_path / name)
    assert difference(squares(load_image(tmp_path / name), 16), COLOURS) <= 6


def test_the_result_does_not_depend_on_the_file_any_more(tmp_path):
    image = load_image(saved(tmp_path / "a.png"))
    (tmp_path / "a.png").unlink()
    assert difference(squares(image), COLOURS) == 0


def stored_as(orientation, image):
    """The pixels a camera stores so that this EXIF orientation shows `image`."""
    turns = {
        1: (),
        2: (Image.Transpose.FLIP_LEFT_RIGHT,),
        3: (Image.Transpose.ROTATE_180,),
        4: (Image.Transpose.FLIP_TOP_BOTTOM,),
        5: (Image.Transpose.TRANSPOSE,),
        6: (Image.Transpose.ROTATE_90,),
        7: (Image.Transpose.TRANSVERSE,),
        8: (Image.Transpose.ROTATE_270,),
    }
    for turn in turns[orientation]:
        image = image.transpose(turn)
    return image


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_images_stand_upright(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100, "subsampling": 0} if suffix == "jpg" else {}
    path = saved(tmp_path / f"a.{suffix}", stored_as(orientation, picture()), exif=exif.tobytes(), **options)
    loaded = load_image(path)
    assert loaded.size == picture().size
    assert difference(squares(loaded), COLOURS) <= 4


# transparency


def test_alpha_is_laid_on_white(tmp_path):
    image = Image.new("RGBA", (3, 1))
    image.putdata([(255, 0, 0, 255), (255, 0, 0, 0), (0, 0, 0, 127)])
    loaded = np.asarray(load_image(saved(tmp_path / "a.png", image)), int)[0]
    assert loaded.tolist()[:2] == [[255, 0, 0], [255, 255, 255]]
    assert np.abs(loaded[2] - 128).max() <= 1


def test_gray_with_alpha_is_laid_on_white(tmp_path):
    image = Image.new("LA", (3, 1))
    image.putdata([(10, 255), (10, 0), (0, 127)])
    loaded = np.asarray(load_image(saved(tmp_path / "a.png", image)), int)[0]
    assert np.abs(loaded - np.array([[10] * 3, [255] * 3, [128] * 3])).max() <= 1


@pytest.mark.parametrize(
    ("mode", "colours", "transparency", "expected"),
    [
        ("P", [0, 1], 0, [[255, 255, 255], [0, 0, 255]]),
        ("P", [0, 1], bytes([255, 0]), [[255, 0, 0], [255, 255, 255]]),
        ("P", [0, 1], bytes([127, 255]), [[255, 128, 128], [0, 0, 255]]),
        ("L", [7, 90], 7, [[255, 255, 255], [90, 90, 90]]),
        ("1", [0, 255], 0, [[255, 255, 255], [255, 255, 255]]),
        ("RGB", [(1, 2, 3), (4, 5, 6)], (1, 2, 3), [[255, 255, 255], [4, 5, 6]]),
        ("I;16", [514, 25700], 514, [[255, 255, 255], [100, 100, 100]]),
    ],
)
def test_declared_transparency_is_white(tmp_path, mode, colours, transparency, expected):
    image = Image.new(mode, (2, 1))
    if mode == "P":
        image.putpalette([255, 0, 0, 0, 0, 255])
    for x, colour in enumerate(colours):
        image.putpixel((x, 0), colour)
    loaded = load_image(saved(tmp_path / "a.png", image, transparency=transparency))
    assert difference(loaded, [expected]) <= 1


@pytest.mark.parametrize("mode", ["RGBa", "La", "PA"])
def test_modes_that_only_arise_in_memory_are_laid_on_white(mode):
    image = Image.new("LA", (2, 1))
    image.putdata([(40, 255), (40, 0)])
    image = image if mode == "La" else image.convert("RGBA")
    result, applied = photos._to_srgb(image.convert(mode))
    assert applied
    assert difference(result, [[[40] * 3, [255] * 3]]) <= 1


# depth and colour spaces


def test_16_bit_gray_is_scaled_not_clipped(tmp_path):
    values = np.array([[0, 257, 128 * 257, 255 * 257]], np.uint16)
    for suffix in ("png", "tiff"):
        loaded = load_image(saved(tmp_path / f"a.{suffix}", Image.fromarray(values)))
        assert np.asarray(loaded)[0].tolist() == [[v] * 3 for v in (0, 1, 128, 255)]


def test_32_bit_gray_that_holds_16_bits_is_scaled_alike(tmp_path):
    values = np.array([[0, 257, 128 * 257, 255 * 257]], np.int32)
    assert np.asarray(load_image(saved(tmp_path / "a.tiff", Image.fromarray(values))))[0, :, 0].tolist() == [
        0,
        1,
        128,
        255,
    ]
    assert np.asarray(load_image(saved(tmp_path / "b.tiff", Image.fromarray(values * 4))))[0, :, 0].tolist()[-1] == 255


@pytest.mark.parametrize("scale", [1, 100])
def test_float_gray_is_scaled_and_what_is_no_number_is_black(tmp_path, scale):
    values = np.array([[0, 0.5, 1, np.nan]], np.float32) * scale
    loaded = np.asarray(load_image(saved(tmp_path / "a.tiff", Image.fromarray(values))))[0, :, 0]
    assert loaded.tolist() == [0, 128, 255, 0]


def test_1_bit_and_palette_images_are_rgb(tmp_path):
    bits = Image.fromarray(np.array([[0, 255], [255, 0]], np.uint8)).convert("1")
    assert np.asarray(load_image(saved(tmp_path / "a.png", bits)))[:, :, 1].tolist() == [[0, 255], [255, 0]]
    palette = picture().quantize(6)
    assert difference(squares(load_image(saved(tmp_path / "b.png", palette))), COLOURS) <= 1


@pytest.mark.parametrize("suffix", ["jpg", "tiff"])
def test_cmyk_without_a_profile(tmp_path, suffix):
    loaded = load_image(saved(tmp_path / f"a.{suffix}", picture().convert("CMYK")))
    assert difference(loaded.resize((3, 2), Image.Resampling.BOX), COLOURS) <= 25


def test_cmyk_with_a_profile_is_what_the_profile_says(tmp_path):
    inks = Image.new("CMYK", (3, 1))
    inks.putdata([(255, 0, 0, 0), (0, 255, 255, 0), (0, 0, 0, 255)])
    path = saved(tmp_path / "a.tiff", inks, icc_profile=icc.only_black_prints())
    assert difference(load_image(path), [[[255] * 3, [255] * 3, [0] * 3]]) <= 2
    assert not load_dataset(tmp_path, "p").warnings


def display_p3_in_srgb(colours):
    """By the definition: P3 light to XYZ to sRGB light to sRGB, clipped."""
    d50_to_srgb = np.array([[3.1339, -1.6169, -0.4906], [-0.9785, 1.9160, 0.0333], [0.0720, -0.2290, 1.4057]])
    light = np.clip((np.asarray(colours) / 255) ** 2.2 @ icc.DISPLAY_P3 @ d50_to_srgb.T, 0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("suffix", ["png", "tiff", "webp"])
def test_display_p3_becomes_srgb(tmp_path, suffix):
    colours = np.array([[[200, 60, 60], [60, 160, 90], [128, 128, 128], [230, 200, 150]]], np.uint8)
    options = {"lossless": True} if suffix == "webp" else {}
    path = saved(tmp_path / f"a.{suffix}", Image.fromarray(colours), icc_profile=icc.display_p3(), **options)
    expected = display_p3_in_srgb(colours)
    assert difference(colours, expected) > 10  # leaving the profile out would be seen
    assert difference(load_image(path), expected.round()) <= 3


def test_a_profile_survives_turning_transparency_and_heic(tmp_path):
    colour = np.array([[[200, 60, 60]]])
    expected = display_p3_in_srgb(colour).round()
    plain = Image.new("RGB", (32, 32), (200, 60, 60))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = saved(tmp_path / "a.png", plain, icc_profile=icc.display_p3(), exif=exif.tobytes())
    half = plain.convert("RGBA")
    half.paste((9, 9, 9, 0), (16, 0, 32, 32))
    clear = saved(tmp_path / "b.png", half, icc_profile=icc.display_p3())
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.from_pillow(plain).save(tmp_path / "c.heic", quality=100, chroma=444, icc_profile=icc.display_p3())
    for path in (turned, clear, tmp_path / "c.heic"):
        assert difference(np.asarray(load_image(path))[:1, :1], expected) <= 4, path
    assert load_image(clear).getpixel((20, 5)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_gray_takes_a_gray_profile(tmp_path, mode):
    image = Image.new(mode, (4, 4), {"L": 55, "LA": (55, 255), "I;16": 55 * 257}[mode])
    path = saved(tmp_path / "a.png", image, icc_profile=icc.gray(1.0))
    expected = 255 * (1.055 * (55 / 255) ** (1 / 2.4) - 0.055)  # linear light is shown much lighter
    assert difference(load_image(path), round(expected)) <= 2


def test_gray_takes_the_profile_of_a_colour_space(tmp_path):
    path = saved(tmp_path / "a.png", Image.new("L", (4, 4), 128), icc_profile=icc.display_p3(1.0))
    assert difference(load_image(path), 188) <= 2
    assert not load_dataset(tmp_path, "p").warnings


@pytest.mark.parametrize(
    "profile",
    [b"broken", icc.display_p3()[:140], icc.display_p3()[:128] + bytes(200), icc.gray(2.2), icc.only_black_prints()],
    ids=["text", "truncated", "no tags", "of gray", "of inks"],
)
def test_a_profile_that_cannot_be_used_is_a_warning(tmp_path, profile):
    path = saved(tmp_path / "a.png", icc_profile=profile)
    assert difference(squares(load_image(path)), COLOURS) == 0
    (warning,) = load_dataset(tmp_path, "p").warnings
    assert warning.startswith(f"{path}: its colour profile")


# files that are no images


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "tiff", "bmp"])
def test_a_truncated_image_is_one_sentence(tmp_path, suffix):
    path = saved(tmp_path / f"a.{suffix}", picture(40))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError) as caught:
        load_image(path)
    assert str(caught.value) == (f"{path}: not an image that Pillow can read (truncated file); remove it or replace it")


@pytest.mark.parametrize("suffix", ["webp", "heic"])
def test_a_truncated_image_of_a_foreign_decoder_is_one_sentence(tmp_path, suffix):
    path = heic(tmp_path / "a.heic") if suffix == "heic" else saved(tmp_path / "a.webp", picture(40))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"a\.\w+: not an image that Pillow can read \(.*\); remove it") as caught:
        load_image(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n broken", b"\0\0\0\x18ftypheic" + bytes(40)])
@pytest.mark.parametrize("suffix", ["jpg", "heic"])
def test_a_file_that_is_no_image_is_one_sentence(tmp_path, content, suffix):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"not an image that Pillow can read.*; remove it or replace it$"):
        load_image(path)


def test_every_cut_and_every_broken_byte_is_an_image_or_one_sentence(tmp_path, recwarn):
    messages = []
    for suffix in ("png", "jpg", "gif", "webp", "tiff"):
        path = saved(tmp_path / f"a.{suffix}", picture(2))
        whole = path.read_bytes()
        rng = np.random.default_rng(0)
        for _ in range(60):
            broken = bytearray(whole)
            broken[rng.integers(len(whole))] ^= int(rng.integers(1, 256))
            path.write_bytes(bytes(broken[: int(rng.integers(len(whole) // 2, len(whole) + 1))]))
            try:
                assert load_image(path).mode == "RGB"
            except UserError as error:
                messages.append(str(error))
    assert len(messages) > 50
    assert not recwarn.list
    assert all(message.startswith(f"{tmp_path}/a.") and "\n" not in message for message in messages)


def test_a_missing_image_is_said_to_be_missing(tmp_path):
    with pytest.raises(UserError, match=r"a\.png: no such file"):
        load_image(tmp_path / "a.png")


def test_a_bomb_is_refused_without_decoding_it(tmp_path):
    path = saved(tmp_path / "a.png", Image.new("1", (8, 8)))
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", 40000, 40000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(bytes(content))
    with pytest.raises(UserError, match="too many pixels to be a photo"):
        load_image(path)


# data sets


def listing(directory):
    return [(e.path.relative_to(directory).as_posix(), e.caption) for e in load_dataset(directory, "p").examples]


def test_captions_stand_beside_the_images_and_the_prompt_is_for_the_rest(tmp_path):
    for name in ("b.png", "a.jpg", "c.PNG", "d.png"):
        saved(tmp_path / name)
    (tmp_path / "a.txt").write_text("a cat\n")
    (tmp_path / "b.txt").write_text("\ufeff  a  dog\r\non a mat ", encoding="utf-8")
    (tmp_path / "d.txt").write_text(" \n")
    assert listing(tmp_path) == [("a.jpg", "a cat"), ("b.png", "a dog on a mat"), ("c.PNG", "p"), ("d.png", "p")]


def test_hidden_files_directories_and_other_files_are_passed_over(tmp_path):
    saved(tmp_path / "a.png")
    saved(tmp_path / "more" / "b.png")
    (tmp_path / "c.png").mkdir()
    for name in (".DS_Store", "._a.png", ".b.png", "notes.md", "movie.mov", "a.json", "Thumbs.db"):
        (tmp_path / name).write_bytes(b"not an image")
    assert listing(tmp_path) == [("a.png", "p")]


@pytest.mark.parametrize(("name", "image", "text"), captioned.LISTS[:2])
def test_a_list_names_the_images_and_their_captions(tmp_path, name, image, text):
    for path in ("b.png", "a.png", "more/a.png", "unlisted.png"):
        saved(tmp_path / path)
    (tmp_path / "a.txt").write_text("not this one")
    rows = [
        ("b.png", "two"),
        ("./more/../a.png", "ein Würfel\u2028one"),
        ("more/a.png", "three"),
        ("a.png", "again"),
        ("b.png", ""),
    ]
    lines = [json.dumps({image: path, text: caption}, ensure_ascii=False) for path, caption in rows]
    (tmp_path / name).write_text("\ufeff" + "\r\n".join(lines) + "\n\n", encoding="utf-8", newline="")
    assert listing(tmp_path) == [
        ("a.png", "again"),
        ("a.png", "ein Würfel\u2028one"),
        ("b.png", "p"),
        ("b.png", "two"),
        ("more/a.png", "three"),
    ]
    (warning,) = load_dataset(tmp_path, "p").warnings
    assert name in warning
    assert "1 images beside it are not listed" in warning


def test_a_caption_may_be_spelled_otherwise_than_its_image(tmp_path):
    for name in ("Foto.jpg", "Caf\u00e9.png", "b.png", "B.jpg"):
        saved(tmp_path / name)
    for name in ("Foto.TXT", "cafe\u0301.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    captions = {e.path.name: e.caption for e in load_dataset(tmp_path, "the prompt").examples}
    assert captions == {
        "B.jpg": "b.txt" if (tmp_path / "B.txt").is_file() else "the prompt",  # the same file on most Macs
        "Caf\u00e9.png": "cafe\u0301.txt",
        "Foto.jpg": "Foto.TXT",
        "b.png": "b.txt",
    }


def test_a_listed_image_may_be_spelled_otherwise_than_its_file(tmp_path):
    for name in ("cafe\u0301.png", "IMG_1.JPG", "more/IMG_2.JPG", "other.png"):
        saved(tmp_path / name)
    lines = [data.metadata_line(name, name) for name in ("caf\u00e9.png", "img_1.jpg", "more/img_2.jpg")]
    (tmp_path / "metadata.jsonl").write_text("".join(lines))
    dataset = load_dataset(tmp_path)
    assert {str(e.path.relative_to(tmp_path)): e.caption for e in dataset.examples} == {
        "IMG_1.JPG": "img_1.jpg", "cafe\u0301.png": "caf\u00e9.png", "more/IMG_2.JPG": "more/img_2.jpg",
    }  # fmt: skip
    assert dataset.warnings == (f"{tmp_path / 'metadata.jsonl'}: 1 images beside it are not listed and not used",)


@pytest.mark.parametrize("away", ["b.jpg", "a.txt", "metadata.jsonl", "train.jsonl"])
def test_what_is_still_in_icloud_is_named_and_how_to_get_it(tmp_path, away):
    place = tmp_path / "my photos"
    saved(place / "a.png")
    (place / f".{away}.icloud").touch()
    (place / ".notes.pdf.icloud").touch()
    with pytest.raises(UserError, match=f"{away}: is in iCloud and not downloaded to this Mac; choose") as caught:
        load_dataset(place, "p")
    assert str(caught.value).endswith(f"choose Download Now in Finder, or run: brctl download '{place}'")
    (place / ".c.heic.icloud").touch()
    if not away.endswith("jsonl"):
        with pytest.raises(UserError, match="not downloaded to this Mac, and 1 more like it; choose"):
            load_dataset(place, "p")


def test_an_image_that_is_not_listed_may_stay_in_icloud_and_one_that_is_may_not(tmp_path):
    saved(tmp_path / "a.png")
    (tmp_path / ".b.jpg.icloud").touch()
    line = data.metadata_line("a.png", "x")
    (tmp_path / "metadata.jsonl").write_text(line)
    assert len(load_dataset(tmp_path).examples) == 1
    (tmp_path / "metadata.jsonl").write_text(line + data.metadata_line("b.jpg", "x"))
    with pytest.raises(UserError, match=r"b\.jpg: is in iCloud"):
        load_dataset(tmp_path)


def test_metadata_goes_before_train(tmp_path):
    saved(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "this"}')
    (tmp_path / "train.jsonl").write_text('{"image": "a.png", "prompt": "not this"}')
    assert listing(tmp_path) == [("a.png", "this")]


def test_a_listed_image_may_be_a_link_to_elsewhere(tmp_path):
    stored = saved(tmp_path / "blobs" / "0.png")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.png").symlink_to(stored)
    (tmp_path / "set" / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "this"}')
    assert listing(tmp_path / "set") == [("a.png", "this")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file_name": "no.png", "text": "x"}', r"no\.png does not exist; correct or remove the line"),
        ('{"file_name": "..", "text": "x"}', "is outside of"),
        ('{"file_name": "../outside.png", "text": "x"}', "is outside of"),
        ('{"file_name": "more/../../outside.png", "text": "x"}', "is outside of"),
        ('{"file_name": "/etc/passwd", "text": "x"}', "is outside of"),
        ('{"file_name": "", "text": "x"}', "does not exist"),
        ('{"file_name": "more", "text": "x"}', "does not exist"),
        ('{"file_name": "a.png", "text": " "}', '"text" is empty'),
        ('{"image": "a.png", "prompt": "x"}', "should be"),
        ('{"file_name": "a.png", "text": null}', "should be"),
        ('{"file_name": 3, "text": "x"}', "should be"),
        ('{"file_name": "a\\u0000.png", "text": "x"}', "should be"),
        ('{"file_name": "a.png", "text": "x"', "should be"),
        ("a.png", "should be"),
        ('["a.png", "x"]', "should be"),
        ("null", "should be"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path, line, message):
    saved(tmp_path / "outside.png")
    saved(tmp_path / "set" / "more" / "a.png")
    saved(tmp_path / "set" / "a.png")
    path = tmp_path / "set" / "metadata.jsonl"
    path.write_text('{"file_name": "a.png", "text": "fine"}\n\n' + line + "\n")
    with pytest.raises(UserError, match=message) as caught:
        load_dataset(tmp_path / "set")
    assert str(caught.value).startswith(f"{path}:3: ")


@how(max_examples=60)
@given(
    st.sampled_from([name for name, _, _ in captioned.LISTS]),
    st.one_of(st.binary(max_size=40), st.text('{}[]":,;\n\0 \\afile_nmtx.pg', max_size=40).map(str.encode)),
)
def test_whatever_a_list_holds_is_captions_or_one_sentence(tmp_path_factory, name, content):
    place = tmp_path_factory.getbasetemp() / f"of {name}"
    place.mkdir(exist_ok=True)
    if not (place / "a.png").exists():
        saved(place / "a.png")
    (place / name).write_bytes(content)
    try:
        assert load_dataset(place).examples
    except UserError as error:
        assert str(error).startswith(str(place / name))
        assert "\n" not in str(error) or b"\n" in content


def test_lists_and_captions_that_are_no_text_are_named(tmp_path):
    saved(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"a\.txt: not UTF-8 text"):
        load_dataset(tmp_path)
    (tmp_path / "metadata.jsonl").write_bytes(b'{"file_name": "a.png", "text": "caf\xe9"}')
    with pytest.raises(UserError, match=r"metadata\.jsonl: not UTF-8 text"):
        load_dataset(tmp_path)
    (tmp_path / "metadata.jsonl").write_bytes(b"\n\n")
    with pytest.raises(UserError, match=r"metadata\.jsonl: lists no images"):
        load_dataset(tmp_path)


def test_directories_that_hold_nothing_to_learn_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        load_dataset(tmp_path / "nowhere", "p")
    with pytest.raises(UserError, match="holds no images"):
        load_dataset(tmp_path, "p")
    (tmp_path / ".DS_Store").write_bytes(b"")
    (tmp_path / "a.txt").write_text("a caption of nothing")
    with pytest.raises(UserError, match="holds no images"):
        load_dataset(tmp_path, "p")
    with pytest.raises(UserError, match=r"a\.txt: not a directory"):
        load_dataset(tmp_path / "a.txt", "p")


def test_an_image_without_caption_needs_a_prompt(tmp_path):
    saved(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a\.png: has no caption; write one into a\.txt beside it, or give --prompt"):
        load_dataset(tmp_path)
    (tmp_path / "a.txt").write_text("\n")
    with pytest.raises(UserError, match="has no caption"):
        load_dataset(tmp_path)


def test_a_broken_image_is_found_before_anything_else_is_done(tmp_path):
    saved(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"b\.png: not an image"):
        load_dataset(tmp_path, "p")


def test_the_identity_is_of_bytes_captions_and_order_but_not_of_place(tmp_path):
    def identity(directory, prompt="p"):
        return load_dataset(directory, prompt).identity

    for place in ("one", "two"):
        saved(tmp_path / place / "a.png")
        saved(tmp_path / place / "b.png", picture(4))
    first = identity(tmp_path / "one")
    assert first == identity(tmp_path / "two")
    assert len(first) == len(hashlib.sha256().hexdigest())
    assert first != identity(tmp_path / "one", "q")
    (tmp_path / "two" / "b.txt").write_text("p")
    assert first == identity(tmp_path / "two")
    (tmp_path / "two" / "b.txt").write_text("other")
    changed = identity(tmp_path / "two")
    assert changed != first
    with (tmp_path / "two" / "b.png").open("ab") as file:
        file.write(b"\0")
    assert identity(tmp_path / "two") not in (first, changed)
    (tmp_path / "one" / "a.png").rename(tmp_path / "one" / "c.png")
    assert identity(tmp_path / "one") != first


def test_the_bundled_subjects_are_whole():
    places = [
        Path(str(resources.files("mlx_blockskip"))) / "assets" / "subjects" / "hedgehog",
        Path(__file__).parent / "subjects" / "teapot",
    ]
    for place in places:
        dataset = load_dataset(place)
        assert [e.path.name for e in dataset.examples] == [f"0{i}.png" for i in range(1, 6)]
        assert all(e.caption == (place / f"{e.path.stem}.txt").read_text().strip() for e in dataset.examples)
        assert not dataset.warnings


# what people hand in


def test_jpegs_are_read_by_any_name(tmp_path):
    for name in ("a.jfif", "b.jpe", "c.jif", "d.JPG", "e", "f.photo"):
        saved(tmp_path / name, Image.new("RGB", (8, 8), (ord(name[0]) % 8 * 30, 9, 200)), format="JPEG", quality=100)
    assert [name for name, _ in listing(tmp_path)] == ["a.jfif", "b.jpe", "c.jif", "d.JPG", "e", "f.photo"]
    assert not load_dataset(tmp_path, "p").warnings


def test_of_a_picture_in_two_views_the_first_is_read(tmp_path):
    path = saved(
        tmp_path / "a.mpo", format="MPO", save_all=True, append_images=[Image.new("RGB", (24, 16))], quality=100
    )
    assert Image.open(path).format == "MPO"
    assert load_image(path).size == picture().size
    assert difference(squares(load_image(path)), COLOURS) <= 20
    assert [name for name, _ in listing(tmp_path)] == ["a.mpo"]


def test_what_is_passed_over_is_counted_and_named(tmp_path):
    saved(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "gone.png")
    for name in ("c.DNG", "d.jxl", "orphan.txt", "clip.mov", "z.pdf"):
        (tmp_path / name).write_bytes(b"II*\0")
    saved(tmp_path / "more" / "e.png")
    for name in ("Thumbs.db", ".DS_Store"):
        (tmp_path / name).write_bytes(b"")
    (warning,) = load_dataset(tmp_path, "p").warnings
    assert warning == (f"{tmp_path}: 7 files are passed over: b.png (a broken link), c.DNG, clip.mov, d.jxl and 3 more")
    for name in ("c.DNG", "d.jxl", "clip.mov", "z.pdf", "b.png", "a.png"):
        (tmp_path / name).unlink()
    with pytest.raises(
        UserError, match=r"holds no images \(.*\); 2 files are passed over: more \(a directory\), orphan"
    ):
        load_dataset(tmp_path, "p")


@pytest.mark.parametrize("name", ["a.txt", "a.caption", "a.png.txt", "a.png.caption", "A.CAPTION", "A.PNG.TXT"])
def test_captions_stand_beside_under_all_names_that_trainers_give_them(tmp_path, name):
    saved(tmp_path / "a.png")
    (tmp_path / name).write_text("a cat")
    assert listing(tmp_path) == [("a.png", "a cat")]
    assert not load_dataset(tmp_path, "p").warnings


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_captions_are_read_in_the_encodings_that_editors_write(tmp_path, encoding):
    saved(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes("ein W\u00fcrfel\r\n".encode(encoding))
    assert listing(tmp_path) == [("a.png", "ein W\u00fcrfel")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{\\rtf1\\ansi a dog}", "is rich text; save it again as plain text"),
        ("ein Hund".encode("utf-16-le"), "not UTF-8 text"),
        (b"caf\xe9", "not UTF-8 text"),
        (b"a" * 100_000, "is larger than 64 KB"),
    ],
)
def test_a_caption_that_is_no_text_is_named(tmp_path, content, message):
    saved(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.txt: {message}"):
        load_dataset(tmp_path, "p")


@pytest.mark.parametrize("key", ["text", "caption"])
@pytest.mark.parametrize("delimiter", [",", ";"])
def test_metadata_may_be_a_table(tmp_path, key, delimiter):
    saved(tmp_path / "a.png")
    rows = [["file_name", key], ["a.png", '"a dog, ""sks"""']]
    (tmp_path / "metadata.csv").write_text(
        "\ufeff" + "\r\n".join(delimiter.join(row) for row in rows), encoding="utf-8"
    )
    assert listing(tmp_path) == [("a.png", 'a dog, "sks"')]
    (tmp_path / "metadata.csv").write_text("a.png,a dog\nb.png,another\n")
    with pytest.raises(UserError, match=r"metadata\.csv:2: should have the columns file_name and text"):
        load_dataset(tmp_path)


@pytest.mark.parametrize("name", ["metadata.jsonl", "train.jsonl"])
def test_a_list_may_call_the_text_a_caption(tmp_path, name):
    saved(tmp_path / "a.png")
    (tmp_path / name).write_text(json.dumps({"file_name": "a.png", "image": "a.png", "caption": "a dog"}))
    assert listing(tmp_path) == [("a.png", "a dog")]


def test_a_listed_path_may_be_absolute_within_the_directory(tmp_path, monkeypatch):
    saved(tmp_path / "set" / "a.png")
    (tmp_path / "link").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "metadata.jsonl").write_text(data.metadata_line(str(tmp_path / "set" / "a.png"), "x"))
    for place in (tmp_path / "set", tmp_path / "link"):
        assert listing(place) == [("a.png", "x")]
    (tmp_path / "set" / "metadata.jsonl").write_text(data.metadata_line(str(tmp_path / "link" / "a.png"), "x"))
    assert listing(tmp_path / "link") == [("a.png", "x")]
    (tmp_path / "set" / "metadata.jsonl").write_text(data.metadata_line(str(tmp_path / "set" / "a.png"), "x"))
    monkeypatch.chdir(tmp_path)
    assert len(load_dataset(Path("set")).examples) == 1


def test_folders_of_sd_scripts_are_read_and_called_by_their_names(tmp_path):
    for name in ("10_sks dog/a.png", "10_sks dog/b.png", "1_a_dog/c.png"):
        saved(tmp_path / name, Image.new("RGB", (8, 8), (ord(name[-5]), 0, 0)))
    (tmp_path / "10_sks dog" / "b.caption").write_text("a sks dog at night")
    dataset = load_dataset(tmp_path)
    assert [(e.path.name, e.caption) for e in dataset.examples] == [
        ("a.png", "sks dog"), ("b.png", "a sks dog at night"), ("c.png", "a dog"),
    ]  # fmt: skip
    assert dataset.warnings == (f"{tmp_path}: its folders are to be used 10, 1 times; here every image counts once",)
    assert load_dataset(tmp_path, "p").examples[0].caption == "p", "which was given"
    saved(tmp_path / "own.png")
    (warning,) = load_dataset(tmp_path, "p").warnings
    assert "2 files are passed over: 10_sks dog (a directory), 1_a_dog (a directory)" in warning


def test_the_same_picture_twice_is_said(tmp_path):
    for name in ("IMG_1.JPG", "IMG_1.webp"):
        saved(tmp_path / name, quality=95)
    for name in ("b.png", "copy of b.png"):
        saved(tmp_path / name, Image.new("RGB", (8, 8), "red"))
    saved(tmp_path / "c.png", Image.new("RGB", (8, 8), "white"))
    saved(tmp_path / "c.jpg", Image.new("RGB", (8, 8), "black"))
    assert load_dataset(tmp_path, "p").warnings == (
        f"{tmp_path}: the same picture is there twice, and counts twice: "
        "IMG_1.JPG and IMG_1.webp, b.png and copy of b.png; remove one",
    )


def test_both_unicode_forms_of_a_name_are_one_name(tmp_path):
    saved(tmp_path / "Caf\u00e9.jpg")
    saved(tmp_path / "Cafe\u0301.webp")
    (tmp_path / "cafe\u0301.caption").write_text("coffee")
    assert {caption for _, caption in listing(tmp_path)} == {"coffee"}
    (warning,) = load_dataset(tmp_path, "p").warnings
    assert "the same picture is there twice" in warning


def test_a_photo_of_200_megapixels_is_made_smaller_while_it_is_decoded(tmp_path, monkeypatch):
    seen = []
    apply = photos._to_srgb
    monkeypatch.setattr(photos, "_to_srgb", lambda image: (seen.append(image.size), apply(image))[1])
    whole = Image.new("L", (16320, 12240), 40)
    whole.paste(200, (0, 0, 16320, 6120))
    exif = Image.Exif()
    exif[0x0112] = 6
    loaded = load_image(saved(tmp_path / "a.jpg", whole, quality=30, exif=exif.tobytes()))
    assert seen == [(6120, 8160)] == [loaded.size]
    assert [loaded.getpixel((x, 4000))[0] for x in (1000, 5000)] == pytest.approx([40, 200], abs=3), "turned upright"
    assert Image.MAX_IMAGE_PIXELS is not None


def test_another_large_photo_is_made_smaller_when_it_is_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(photos, "LARGE", 24 * 16 - 1)
    assert load_image(saved(tmp_path / "a.png")).size == (12, 8)
    assert difference(squares(load_image(tmp_path / "a.png"), 4), COLOURS) <= 1


def test_a_heic_is_turned_upright(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = stored_as(6, picture(16))
    pillow_heif.from_pillow(stored).save(tmp_path / "a.heic", quality=100, chroma=444, exif=exif.tobytes())
    loaded = load_image(tmp_path / "a.heic")
    assert loaded.size == picture(16).size
    assert difference(squares(loaded, 16), COLOURS) <= 6


# pixels


def test_pixels_and_back_are_the_same_image():
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.merge("RGB", [Image.fromarray(c) for c in (ramp, ramp.T.copy(), 255 - ramp)])
    pixels = to_pixels(image)
    assert (pixels.dtype, pixels.shape) == (np.float32, (16, 16, 3))
    assert (pixels.min(), pixels.max()) == (-1, 1)
    assert np.array_equal(np.asarray(to_image(pixels)), np.asarray(image))


def test_pixels_are_clipped_and_rounded():
    pixels = np.array([[[-7, 9, 0.004], [-0.9961, -0.9960, 0.9960]]], np.float32)
    assert np.asarray(to_image(pixels)).tolist() == [[[0, 255, 128], [0, 1, 254]]]


def test_pixels_are_those_of_diffusers():
    torch = pytest.importorskip("torch")
    image_processor = pytest.importorskip("diffusers.image_processor")
    processor = image_processor.VaeImageProcessor(vae_scale_factor=8)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8))
    theirs = processor.preprocess(image)[0].permute(1, 2, 0).numpy()
    assert np.abs(to_pixels(image) - theirs).max() <= 1e-6
    wild = np.random.default_rng(1).normal(size=(16, 24, 3)).astype(np.float32)
    (expected,) = processor.postprocess(torch.from_numpy(wild).permute(2, 0, 1)[None], output_type="pil")
    assert np.array_equal(np.asarray(to_image(wild)), np.asarray(expected))


def test_a_grid_holds_every_image_below_its_rows_label():
    red, blue = (Image.new("RGB", (30, 20), colour) for colour in ("red", "blue"))
    plain = data.grid([[red, blue], [blue]])
    assert plain.size == (2 * 34 + 4, 2 * 24 + 4)
    assert plain.getpixel((10, 10)) == (255, 0, 0)
    assert plain.getpixel((44, 10)) == plain.getpixel((10, 34)) == (0, 0, 255)
    labelled = data.grid([[red, blue], [blue]], ["before", "after"])
    assert labelled.size == (plain.size[0], plain.size[1] + 2 * 22)
    assert labelled.getpixel((10, 32)) == (255, 0, 0)
