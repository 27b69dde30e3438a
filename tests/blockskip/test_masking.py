from mlx_blockskip.blockskip.masking import first, image_to_text, last
from mlx_blockskip.models.attention import IMAGE_TO_TEXT


def test_exactly_the_given_blocks_are_masked():
    assert image_to_text(range(2, 4)) == {2: IMAGE_TO_TEXT, 3: IMAGE_TO_TEXT}
    assert image_to_text(iter((7, 0, 7))) == {7: IMAGE_TO_TEXT, 0: IMAGE_TO_TEXT}


def test_no_block_is_no_mask():
    assert image_to_text(()) == first(0) == last(0, 9) == {}


def test_the_two_ends():
    assert first(2) == {0: IMAGE_TO_TEXT, 1: IMAGE_TO_TEXT}
    assert last(2, 9) == {7: IMAGE_TO_TEXT, 8: IMAGE_TO_TEXT}
