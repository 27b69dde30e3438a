from mlx_blockskip.blockskip.masking import image_to_text
from mlx_blockskip.models.attention import IMAGE_TO_TEXT


def test_exactly_the_given_blocks_are_masked():
    assert image_to_text(range(2, 4)) == {2: IMAGE_TO_TEXT, 3: IMAGE_TO_TEXT}
    assert image_to_text(iter((7, 0, 7))) == {7: IMAGE_TO_TEXT, 0: IMAGE_TO_TEXT}


def test_no_block_is_no_mask():
    assert image_to_text(()) == {}
