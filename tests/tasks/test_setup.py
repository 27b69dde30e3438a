"""How a run is set up: what its chunks hold, what of its captions is said, and what a resumed run has to share."""

from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import pytest

from mlx_blockskip.blockskip.patches import coverage
from mlx_blockskip.blockskip.plan import SkipPlan
from mlx_blockskip.engine import files
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.events import Note, PhaseEnd, Saved, Step, Warning
from mlx_blockskip.models.family import Encoded
from mlx_blockskip.settings import TrainSettings
from mlx_blockskip.tasks.train import checkpoints, setup
from mlx_blockskip.tasks.train import train as train_task
from support.models import HEDGEHOG, prepared
from support.tasks import drive


@pytest.fixture
def job(toy, tmp_path):
    """A short run of the toy, set up and not begun."""

    def made(**given):
        fixed = {"model": str(toy), "data": str(HEDGEHOG), "iters": 6, "rank": 2, "batch_size": 2, "class_images": 0}
        fixed |= {"resolution": 64, "train_resolution": 32, "adapter_path": str(tmp_path / "a")}
        return prepared(TrainSettings(**{**fixed, **given}))

    return made


def said(kind, events):
    return [event.message for event in events if isinstance(event, kind)]


@pytest.mark.parametrize(
    ("cache", "residuals", "refresh", "length"),
    [
        (300, "base", 1, 3),
        (599, "base", 1, 3),
        (600, "base", 1, 6),
        (1000, "fresh", 2, 6),
        (1000, "fresh", 50, 9),
        (1000, "none", 2, 9),
    ],
)
def test_a_chunk_holds_as_many_whole_steps_as_the_cache_and_no_more_than_are_fresh(cache, residuals, refresh, length):
    config = SimpleNamespace(
        grad_accumulation=3, cache_bytes=cache, cache_limit="its own", residuals=residuals, refresh=refresh
    )
    assert setup.chunk_length(config, SimpleNamespace(nbytes=100)) == length
    config.cache_bytes = 299
    with pytest.raises(UserError, match="--cache-limit its own"):
        setup.chunk_length(config, SimpleNamespace(nbytes=100))


def encoding(*lengths, limit=4):
    """A model that encodes captions to so many rows."""
    prompts = [{"text": mx.full((1, n, 2), float(i))} for i, n in enumerate(lengths)]

    def encode(captions, most):
        assert most == limit
        return Encoded(prompts, [len(caption) > limit for caption in captions])

    return SimpleNamespace(encode_prompts=encode)


def test_captions_are_stored_under_their_numbers_and_those_that_are_cut_are_said(tmp_path):
    model = encoding(3, 3, 3)
    config = SimpleNamespace(max_sequence_length=4, batch_size=2, grad_accumulation=1)
    _, events = drive(setup.encode_captions, config, model, ["a", "abcde", "abcd"], tmp_path / "prompts.safetensors")
    stored = files.MappedTensors(tmp_path / "prompts.safetensors")
    assert [float(stored.read(f"{i}.text")[0, 0, 0]) for i in range(3)] == [0.0, 1.0, 2.0]
    assert said(Warning, events) == ["the caption is longer than 4 tokens and was cut: abcde"]
    assert [event.done for event in events if isinstance(event, Step)] == [3]
    assert [event.phase for event in events if isinstance(event, PhaseEnd)] == ["encode prompts"]


def test_captions_of_two_lengths_do_not_go_into_one_micro_batch(tmp_path):
    model = encoding(3, 2)
    config = SimpleNamespace(max_sequence_length=4, batch_size=1, grad_accumulation=3)
    setup.encode_captions(config, model, ["a", "b"], tmp_path / "prompts.safetensors")
    config.batch_size = 2
    with pytest.raises(UserError, match="--batch-size 2: .* give --batch-size 1 --grad-accumulation 6"):
        setup.encode_captions(config, model, ["a", "b"], tmp_path / "prompts.safetensors")


@pytest.mark.parametrize(("batch_size", "batches", "found"), [(2, 20, [0]), (1, 20, [0, 2, 5]), (1, 3, [0, 2])])
def test_of_micro_batches_of_one_the_first_of_each_caption_is_looked_at(batch_size, batches, found):
    captions = [4, 4, 7, 4, 7, 9, 9, 4]
    samples = SimpleNamespace(captions=lambda batch: [captions[batch]], examples=range(4))
    config = SimpleNamespace(batch_size=batch_size, batches=batches)
    assert setup.first_of_each_caption(SimpleNamespace(config=config, samples=samples)) == found


def test_a_resumed_run_may_have_more_steps_only_where_the_rate_does_not_depend_on_them(job):
    constant, cosine = job(lr_schedule="constant").identity, job(lr_schedule="cosine").identity
    assert "iters" not in constant
    assert cosine["iters"] == 6
    assert constant["prior"] is None
    assert {"seed", "rank", "learning_rate", "model", "data", "plan", "chunk_length", "records"} <= constant.keys()
    free = set(setup.FREE_TO_CHANGE) - {"model", "data"}
    assert not free & constant.keys()
    assert constant["model"] != job().config.model, "what it is, not where"


def test_what_the_crops_cover_is_their_mean_over_the_subjects_samples(job):
    own = job(iters=40)
    _, events = drive(train_task.describe, own)
    draws = [own.samples.draw(k) for k in range(80)]
    shares = [coverage([draw.patch], own.samples.image(draw.image).size) for draw in draws]
    assert f"a crop covers {sum(shares) / 80:.0%} of its image on average" in " ".join(said(Note, events))
    assert max(shares) - min(shares) > 0.1
    assert any(str(own.plan) in text for text in said(Note, events))
    assert not any("class images" in text for text in said(Note, events))


def test_fresh_residuals_that_are_never_made_anew_are_said(job):
    fits = job(residuals="fresh", skip_first=1, skip_last=1)
    fits.chunk_length = fits.config.batches
    longer, base, first = replace(fits), job(skip_first=1, skip_last=1), replace(fits)
    longer.chunk_length = fits.chunk_length - 1
    base.chunk_length = fits.chunk_length
    first.plan = SkipPlan(fits.plan.depth, ((0, 1),))
    for one, count in ((fits, 1), (longer, 0), (base, 0), (first, 0)):
        warnings = said(Warning, drive(train_task.describe, one)[1])
        assert sum("fits into one chunk" in text for text in warnings) == count


def test_moments_begin_in_memory_where_it_is_ample_and_else_in_files(job):
    own = job()
    assert train_task.first_state(replace(own, ample=True)).moments.directory is None
    assert train_task.first_state(replace(own, ample=False)).moments.directory == own.cache / "moments"


def test_a_run_goes_on_from_its_last_checkpoint_only_where_it_should_and_says_so(job):
    own = job(resume=True)
    first, events = drive(train_task.first_state, own)
    assert first.step == 0
    assert said(Note, events) == [f"{own.directory} has no checkpoint that is whole; the run starts at its first step"]
    for step in (2, 4):
        checkpoints.save(own.directory, replace(first, step=step), own.model.stack, own.identity)
    last, events = drive(train_task.first_state, own)
    assert (last.step, said(Note, events)) == (4, ["Going on from step-000004"])
    new, events = drive(train_task.first_state, replace(own, config=replace(own.config, resume=False)))
    assert (new.step, said(Note, events)) == (0, [])


def test_an_adapter_says_how_it_was_made_and_the_run_what_went_wrong(job):
    own = job(scale=0.5)
    given = TrainSettings(data="as given", prompt="a thing")
    for skipped in (0, 3):
        state = replace(train_task.first_state(own), step=6, skipped=skipped)
        _, events = drive(train_task.finish, own, state, given)
        assert len(said(Warning, events)) == bool(skipped)
        assert any(isinstance(event, Saved) and event.path == own.directory for event in events)
    found = files.read_json(own.directory / "adapter_config.json")
    assert (found["steps"], found["skipped_steps"], found["rank"], found["scale"]) == (6, 3, 2, 0.5)
    assert found["base_model_identity"] == own.model.identity
    assert found["settings"]["prompt"] == "a thing", "what the run itself does not need"
    assert found["settings"]["data"] == str(HEDGEHOG), "as it was taken"
    assert [path.name for path in checkpoints.found(own.directory)] == ["step-000006"]


def test_errors_about_class_images_name_their_own_option(job):
    with pytest.raises(UserError, match="nowhere: no such directory; --class-data takes"):
        job(class_data="nowhere")
