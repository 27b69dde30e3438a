"""How captions call the subject, and the lists of prompts."""

import pytest

from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.tasks.evaluate.subject import PLACE, Subject, common_words, read_list, shipped, subject_of


@pytest.mark.parametrize(
    ("captions", "phrase", "noun"),
    [
        (["a photo of sks dog"], "sks dog", "dog"),
        (["a sks toy on a cyan background", "a sks toy on a pink background"], "sks toy", "toy"),
        (["A close-up photo of a zwx teapot, on the table"], "zwx teapot", "teapot"),
        (["sks dog at the beach", "a picture of sks dog asleep", "my sks dog"], "sks dog", "dog"),
        (["ohwx red fox running", "the ohwx red fox in snow"], "ohwx red fox", "red fox"),
        (["sks"], "sks", "sks"),
    ],
)
def test_the_subject_is_what_captions_have_in_common(captions, phrase, noun):
    assert subject_of(captions) == Subject(phrase, noun)


def test_what_is_given_wins():
    assert subject_of(["a photo of sks dog"], "zwx cat") == Subject("zwx cat", "cat")
    assert subject_of(["a photo of sks dog"], noun="animal") == Subject("sks dog", "animal")


@pytest.mark.parametrize("captions", [["a dog", "the cat"], ["", ""], ["on the beach", "on the beach"]])
def test_captions_that_name_nothing_in_common_are_refused(captions):
    with pytest.raises(UserError, match="--subject"):
        subject_of(captions)
    with pytest.raises(UserError, match="--subject: is empty"):
        subject_of(captions, " ")


def test_common_words_are_whole_words():
    assert common_words(["a cat", "a catfish"]) == "a"
    assert common_words([]) == ""


def test_lists_that_ship_are_as_the_protocol_has_them():
    for name in ("objects", "living", "plain"):
        prompts = shipped(name)
        assert len(set(prompts)) == len(prompts) == (12 if name == "plain" else 25)
        assert all(prompt.count(PLACE) == 1 for prompt in prompts)
    for name in ("others", "others-plain"):
        assert len(set(shipped(name))) >= 8
        assert not any(PLACE in prompt for prompt in shipped(name))


def test_no_drift_prompt_is_one_that_training_preserves():
    from mlx_blockskip.engine import files
    from mlx_blockskip.tasks.checkpoint.resolve import bundled

    preserved = files.read_json(bundled("tiny-flux") / "defaults.json")["class_prompt"]
    things = {prompt.split(" on a ")[0] for prompt in preserved}
    assert not things & {prompt.split(" on a ")[0] for prompt in shipped("others-plain")}


def test_a_file_of_prompts(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("\ufeffa {} here\n\n a {} there \na {} here\n")
    assert read_list(str(path), names_subject=True, option="--prompts") == ["a {} here", "a {} there"]
    with pytest.raises(UserError, match="'a {} here': --drift-prompts are without {}"):
        read_list(str(path), names_subject=False, option="--drift-prompts")
    path.write_text("a dog\n")
    with pytest.raises(UserError, match="p.txt: 'a dog': write {} where the subject goes"):
        read_list(str(path), names_subject=True, option="--prompts")
    path.write_text("\n")
    with pytest.raises(UserError, match="holds no prompts"):
        read_list(str(path), names_subject=True, option="--prompts")
    with pytest.raises(UserError, match="missing.txt: no such file"):
        read_list(str(tmp_path / "missing.txt"), names_subject=True, option="--prompts")
