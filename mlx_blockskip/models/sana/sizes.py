"""The sizes that SANA was trained in, by ratio. Source: diffusers ASPECT_RATIO_512_BIN to ASPECT_RATIO_4096_BIN."""

COMMON = (
    *((16, 64), (16, 58), (18, 56), (18, 54), (18, 52), (20, 50), (20, 48), (22, 46), (22, 44), (22, 42), (24, 42)),
    *((24, 40), (26, 38), (26, 36), (28, 36), (28, 34), (30, 34), (30, 32), (32, 32), (32, 30), (34, 30), (34, 28)),
    *((36, 28), (36, 26), (38, 26), (40, 24), (42, 24), (44, 22), (46, 22), (48, 20), (50, 20), (54, 18), (64, 16)),
)
"""Heights and widths in units of `sample_size` pixels: 32 x 32 is the square that the model is named after."""

LARGE = (*COMMON, (16, 62), (16, 60), (52, 18), (56, 18), (58, 16), (60, 16), (62, 16))
"""Those of models for 2048 pixels and more."""

TABLES = {16: COMMON, 32: COMMON, 64: LARGE, 128: LARGE}
"""By the transformer's `sample_size`; other models have no such sizes."""


def binned(width: int, height: int, sample_size: int) -> tuple[int, int]:
    """Width and height in pixels of the nearest ratio, both as `height / width` to two digits; the given ones where the
    model has no table. Source: PixArtImageProcessor.classify_height_width_bin.
    """
    if sample_size not in TABLES or width < 1 or height < 1:
        return width, height
    ratio = height / width
    rows, columns = min(sorted(TABLES[sample_size], key=_ratio), key=lambda size: abs(_ratio(size) - ratio))
    return columns * sample_size, rows * sample_size


def _ratio(size: tuple[int, int]) -> float:
    return round(size[0] / size[1], 2)
