"""Commands as people mistype them: each is one sentence that says what is wrong, and status 1 or 2; never a traceback.

The commands run in a folder of wrong files (support/wrong.py) in which `flux` is a model.
"""

import os
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mlx_blockskip import generate, load, train
from mlx_blockskip.cli import app
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.settings import TrainSettings
from mlx_blockskip.tasks.checkpoint.adapters import scale_of
from support import wrong

DRAW = "generate --model flux --prompt a --memory-budget any"
TRAIN = "train --model flux --data photos --memory-budget any"
RANGE = {
    "side": "must be at least 1 and at most 8192",
    "steps": "must be at least 1 and at most 1000",
    "seed": "must be at least 0 and at most 18446744073709551615",
    "size": "is not a size; write it as 2GB or 512MB",
}

WRONG = [
    # what typer says
    ("tarin", "No such command"),
    ("train --modle x", "No such option"),
    ("train --iters many", "Invalid value for '--iters'"),
    ("train --rank 1.5", "Invalid value for '--rank'"),
    ("train --scale big", "Invalid value for '--scale'"),
    ("train --data", "requires an argument"),
    ("train photos", "unexpected extra argument"),
    ("generate --prompt", "requires an argument"),
    ("cache list --older-than week", "Invalid value for '--older-than'"),
    # generate: numbers
    (f"{DRAW} --steps 0", f"--steps 0: {RANGE['steps']}"),
    (f"{DRAW} --steps -4", f"--steps -4: {RANGE['steps']}"),
    (f"{DRAW} --steps 1000000", f"--steps 1000000: {RANGE['steps']}"),
    (f"{DRAW} --width 0", f"--width 0: {RANGE['side']}"),
    (f"{DRAW} --width 65536", f"--width 65536: {RANGE['side']}"),
    (f"{DRAW} --height -8", f"--height -8: {RANGE['side']}"),
    (f"{DRAW} --width 33", "the sides must be multiples of 16; the nearest is 32 x 128"),
    (f"{DRAW} --width 1 --height 1", "the nearest is 16 x 16"),
    (f"{DRAW} --cfg-scale inf", "--cfg-scale inf: must be at least 0 and at most 100"),
    (f"{DRAW} --cfg-scale nan", "--cfg-scale nan: must be"),
    (f"{DRAW} --cfg-scale -1", "--cfg-scale -1.0: must be"),
    (f"{DRAW} --guidance inf", "--guidance inf: must be at least 0 and at most 100"),
    (f"{DRAW} --guidance nan", "--guidance nan"),
    (f"{DRAW} --n-images 0", "--n-images 0: must be at least 1 and at most 10000"),
    (f"{DRAW} --n-images 100000000", "--n-images 100000000: must be"),
    (f"{DRAW} --seed -1", f"--seed -1: {RANGE['seed']}"),
    (f"{DRAW} --seed 18446744073709551616", f"--seed 18446744073709551616: {RANGE['seed']}"),
    (f"{DRAW} --seed 18446744073709551615 --n-images 2", "2 images have seeds from it on"),
    (f"{DRAW} --max-sequence-length 0", "--max-sequence-length 0: must be at least 1 and at most 4096"),
    (f"{DRAW} --max-sequence-length 100000", "--max-sequence-length 100000"),
    (f"{DRAW} --lora-scale nan", "--lora-scale nan: must be at least -100 and at most 100"),
    (f"{DRAW} --lora-scale 1 --lora-scale inf", "--lora-scale inf"),
    (f"{DRAW} --lora-scale 0.5", "--lora-scale is given 1 times for 0 adapters"),
    # generate: sizes
    ("generate --model flux --prompt a --memory-budget 1MB", "too small, the largest block alone takes 3MB"),
    ("generate --model flux --prompt a --memory-budget 1", "too small, the largest block alone"),
    ("generate --model flux --prompt a --memory-budget -1GB", "--memory-budget -1GB: must be at least 0"),
    ("generate --model flux --prompt a --memory-budget 999999999TB", "and at most 1024TB"),
    ("generate --model flux --prompt a --memory-budget lots", f"'lots' {RANGE['size']}"),
    ("generate --model flux --prompt a --memory-budget 2XB", f"'2XB' {RANGE['size']}"),
    ("generate --model flux --prompt a --memory-budget nan", f"'nan' {RANGE['size']}"),
    ("generate --model flux --prompt a --memory-budget 1.2.3GB", RANGE["size"]),
    ("generate --model flux --prompt a --memory-budget ''", RANGE["size"]),
    # generate: prompts and files
    ("generate --model flux", "--prompt: say what to show"),
    ("generate --model flux --prompt-file gone.txt", "gone.txt: no such file; --prompt-file takes a text file"),
    ("generate --model flux --prompt-file photos", "photos: not readable as text (Is a directory)"),
    ("generate --model flux --prompt-file latin.txt", "latin.txt: not readable as text"),
    ("generate --model flux --prompt-file empty.txt", "--prompt: say what to show"),
    ("generate --model flux --prompt-file ''", "--prompt-file: is empty"),
    (f"{DRAW} --output out.jpg", "images are written as PNG; let --output end in .png"),
    (f"{DRAW} --output ''", "--output: is empty; name a file or directory, or leave it out"),
    (f"{DRAW} --trace-memory ..", "--trace-memory ..: name a file"),
    (f"{DRAW} --trace-memory ''", "--trace-memory: is empty"),
    (f"{DRAW} --noise gone.safetensors --width 64 --height 64", "gone.safetensors: no such file"),
    (f"{DRAW} --noise plain.txt --width 64 --height 64", "plain.txt: not a whole safetensors file"),
    (f"{DRAW} --noise other.safetensors --width 64 --height 64", "has no tensor `noise`"),
    (
        f"{DRAW} --noise small.safetensors --width 64 --height 64",
        "has noise [1, 16, 2, 8], and [1, 16, 8, 8] is needed",
    ),
    (f"{DRAW} --noise nan.safetensors --width 64 --height 64", "its noise holds numbers that are not finite"),
    (f"{DRAW} --adapter-path gone", "gone: no such adapter"),
    (f"{DRAW} --adapter-path ''", "--adapter-path: is empty"),
    (f"{DRAW} --adapter-path empty", "no such adapter; give an adapter directory, a LoRA"),
    (f"{DRAW} --adapter-path plain.txt", "plain.txt: not a whole safetensors file"),
    (f"{DRAW} --adapter-path adapter-array", "and an object is needed"),
    # models
    ("generate --prompt a --model ''", "--model: is empty"),
    ("generate --prompt a --model gone", "gone: no such model; give a directory, a repo id"),
    ("generate --prompt a --model tiny-flx", "did you mean tiny-flux?"),
    ("generate --prompt a --model plain.txt", "plain.txt: is a file; make a model of it"),
    ("generate --prompt a --model photos", "config.json: no such file"),
    ("generate --prompt a --model model-wide", "its default width is 1000000000, and must be at least 1"),
    ("generate --prompt a --model model-text", "its default width is '64', and should be a int"),
    ("generate --prompt a --model model-rankless", "its default rank is 0, and must be at least 1 and at most 1024"),
    ("generate --prompt a --model model-nan", "its default learning_rate is nan, and must be above 0"),
    ("generate --prompt a --model model-listed", "its defaults are no object"),
    ("generate --prompt a --model model-classes", "its default class_prompt is [1]"),
    ("generate --prompt a --model model-family", "the family 'none' is not installed"),
    ("generate --prompt a --model model-format", "has format 9, and this version reads format 1"),
    ("generate --prompt a --model model-array", "and an object is needed"),
    # generate: pictures
    ("generate --from-image gone.png", "gone.png: no such file; --from-image takes a PNG"),
    ("generate --from-image photos", "photos: not an image that Pillow can read"),
    ("generate --from-image ''", "--from-image: is empty"),
    ("generate --from-image of-bytes.png", "of-bytes.png: not an image that Pillow can read"),
    ("generate --from-image of-nothing.png", "holds no settings; only PNG files made by mlx-blockskip do"),
    ("generate --from-image of-jpeg.jpg", "holds no settings"),
    ("generate --from-image of-words.png", "its settings are damaged; give --prompt"),
    ("generate --from-image of-deep.png", "its settings are damaged"),
    ("generate --from-image of-array.png", "its settings are damaged"),
    ("generate --from-image of-bomb.png", "of-bomb.png: not an image that Pillow can read"),
    ("generate --from-image of-none.png", "its prompt is not one text; give --prompt"),
    ("generate --from-image of-prompts.png", "its prompt is not one text; give --prompt"),
    ("generate --from-image of-steps.png", "of-steps.png: --steps 1000000000: must be"),
    ("generate --from-image of-width.png", "width: '64' is not a whole number"),
    ("generate --from-image of-cfg.png", "of-cfg.png: --cfg-scale inf: must be"),
    ("generate --from-image of-model.png", "was drawn with the model owner/name, and a picture may not choose"),
    ("generate --from-image of-adapter.png", "give --adapter-path /etc/dog, or your own"),
    ("generate --from-image of-noise.png", "give --noise /etc/noise, or your own"),
    ("generate --from-image of-good.png --output out.jpg", "let --output end in .png"),
    # YAML
    ("train -c gone.yaml", "gone.yaml: no such file"),
    ("train -c photos", "photos: not readable as YAML (Is a directory)"),
    ("train -c list.yaml", "list.yaml: should hold `setting: value` lines"),
    ("train -c text.yaml", "should hold `setting: value` lines"),
    ("train -c open.yaml", "open.yaml: not readable as YAML"),
    ("train -c bomb.yaml", "aliases (*name) are not read"),
    ("train -c deep.yaml", "is nested too deeply"),
    ("train -c large.yaml", "is larger than 64 KB"),
    ("train -c twice.yaml", "rank stands there twice"),
    ("train -c both.yaml", "max_sequence_length stands there twice"),
    ("train -c date.yaml", "--iters: '2024-01-01' is not a whole number"),
    ("train -c noday.yaml", "--iters: '2024-13-45' is not a whole number"),
    ("train -c nan.yaml", "--learning-rate nan: must be above 0"),
    ("train -c unknown.yaml", "learning_rat: is not a setting; did you mean learning_rate?"),
    ("train -c object.yaml", "--rank: {'a': 1} is not a whole number"),
    ("train -c python.yaml", "python.yaml: not readable as YAML"),
    ("train -c digits.yaml", "digits.yaml: not readable as YAML"),
    ("train -c latin.yaml", "latin.yaml: not readable as YAML"),
    ("train -c nul.yaml", "--data: holds a NUL character"),
    # train: numbers
    ("train --rank 0 --data photos", "--rank 0: must be at least 1 and at most 1024"),
    ("train --rank 100000000 --data photos", "--rank 100000000: must be"),
    ("train --iters -1", "--iters -1: must be at least 1 and at most 1000000"),
    ("train --iters 0", "--iters 0"),
    ("train --learning-rate nan", "--learning-rate nan: must be above 0 and at most 1000000"),
    ("train --learning-rate 0", "--learning-rate 0.0: must be above 0"),
    ("train --learning-rate -0.1", "--learning-rate -0.1"),
    ("train --learning-rate inf", "--learning-rate inf"),
    ("train --timestep-std nan", "--timestep-std nan: must be above 0 and at most 10"),
    ("train --timestep-std 0", "--timestep-std 0.0: must be above 0"),
    ("train --timestep-mean inf", "--timestep-mean inf: must be at least -10 and at most 10"),
    ("train --scale nan", "--scale nan: must be above 0 and at most 1000"),
    ("train --scale 0", "--scale 0.0"),
    ("train --clip nan", "--clip nan: must be at least 0"),
    ("train --weight-decay -1", "--weight-decay -1.0: must be at least 0 and at most 100"),
    ("train --warmup -1", "--warmup -1: must be at least 0"),
    ("train --refresh 0", "--refresh 0: must be at least 1"),
    ("train --batch-size 0", "--batch-size 0: must be at least 1 and at most 1024"),
    ("train --batch-size 1000000", "--batch-size 1000000"),
    ("train --grad-accumulation 0", "--grad-accumulation 0"),
    ("train --steps-per-save -1", "--steps-per-save -1: must be at least 0"),
    ("train --steps-per-sample -1", "--steps-per-sample -1"),
    ("train --class-images -1", "--class-images -1: must be at least 0 and at most 10000"),
    ("train --prior-weight nan", "--prior-weight nan: must be at least 0 and at most 1000"),
    ("train --skip-ratio 1", "--skip-ratio 1.0: must be at least 0 and below 1"),
    ("train --skip-ratio -0.5", "--skip-ratio -0.5"),
    ("train --skip-first -1", "--skip-first -1: must be at least 0 and at most 1000"),
    ("train --skip-last 1000000", "--skip-last 1000000"),
    ("train --resolution 0", f"--resolution 0: {RANGE['side']}"),
    ("train --train-resolution 99999", f"--train-resolution 99999: {RANGE['side']}"),
    ("train --max-sequence-length 0", "--max-sequence-length 0"),
    ("train --cache-limit 0", "--cache-limit 0: must be at least 1 and at most 1024TB"),
    ("train --cache-limit much", f"'much' {RANGE['size']}"),
    # train: the rest
    ("train", "--data: give a directory of images"),
    ("train --data ''", "--data: is empty"),
    ("train --data gone", "gone: no such directory; --data takes a directory of images"),
    ("train --data plain.txt", "plain.txt: not a directory"),
    ("train --data empty", "empty: holds no images"),
    ("train --data broken --prompt a", "a.png: not an image that Pillow can read; remove it"),
    ("train --data nocaption", "has no caption; write one into a.txt beside it, or give --prompt"),
    ("train --data icloud --prompt a", "a.jpg: is in iCloud and not downloaded to this Mac"),
    ("train --data rtf", "a.txt: is rich text; save it again as plain text"),
    ("train --data listed", "metadata.jsonl:1: /etc/passwd is outside of"),
    ("train --data photos --adapter-path ''", "--adapter-path: is empty"),
    ("train --patch-mode spiral", "'spiral' is not one of dynamic"),
    ("train --residuals stale", "is not one of base, fresh, none"),
    ("train --lr-schedule round", "is not one of constant"),
    ("train --lora-targets some", "is not one of attention, all"),
    (f"{TRAIN} --resolution 100", "--resolution 100: must be a multiple of 16; the nearest is 96"),
    (f"{TRAIN} --resolution 64", "--train-resolution 128: must not be above --resolution 64"),
    (f"{TRAIN} --skip-first 12", "n = 12 and m = 0 do not leave a block of 12 to train"),
    (f"{TRAIN} --skip-ratio 0.3 --skip-first 1", "give only one of them"),
    (f"{TRAIN} --plan gone.json", "gone.json: no such file"),
    (f"{TRAIN} --plan array.json", "array.json: "),
    (f"{TRAIN} --plan number.json", "number.json: "),
    (f"{TRAIN} --plan deep.json", "deep.json: not readable as JSON"),
    (f"{TRAIN} --plan plan.json", "plan.json: "),
    (f"{TRAIN} --class-data photos --class-images 4", "give one of them"),
    ("train --model flux --data photos --memory-budget 1MB", "the largest block alone takes 3MB"),
    ("train --model model-plans --data photos --memory-budget any", "the model's plan for 0.5"),
    ("train --model model-planless --data photos --memory-budget any", "its default plans is [3, 3]"),
    ("train --model model-patches --data photos --memory-budget any", "spiral: is not one of dynamic"),
    # select
    ("select", "--data: give a directory"),
    ("select --data gone", "gone: no such directory"),
    ("select --skip-ratio 0", "--skip-ratio 0.0: must be above 0 and below 1"),
    ("select --skip-ratio nan", "--skip-ratio nan"),
    ("select --stride 0", "--stride 0: must be at least 1 and at most 1000"),
    ("select --noise-levels 0", "--noise-levels 0"),
    ("select --probe-images -3", "--probe-images -3"),
    ("select --window 0", "--window 0"),
    ("select --n-images 0", "--n-images 0"),
    ("select --method guess", "is not one of generate, probe, sliding"),
    ("select --distance far", "is not one of dino, clip"),
    ("select --data photos --output plan.txt", "let --output end in .json"),
    ("select --model flux --data photos --skip-ratio 0.01 --memory-budget any", "skips none of 12 blocks"),
    ("select --model flux --data photos --resolution 33 --memory-budget any", "33 x 33: the sides must be multiples"),
    ("select --model flux --method sliding --window 99 --memory-budget any", "--window 99: the model has 12 blocks"),
    # estimate
    ("estimate --rank 0", "--rank 0: must be"),
    ("estimate --steps 0", f"--steps 0: {RANGE['steps']}"),
    ("estimate --iters -1", "--iters -1: must be"),
    ("estimate --batch-size 0", "--batch-size 0"),
    ("estimate --memory 0", "--memory 0: must be at least 1 and at most 1024TB"),
    ("estimate --memory lots", RANGE["size"]),
    ("estimate --memory any", f"'any' {RANGE['size']}"),
    ("estimate --model gone", "--model gone: no such directory, and not one of"),
    ("estimate --model photos", "has no model_index.json"),
    ("estimate --model model-rankless", "its default rank is 0"),
    ("estimate --model model-array", "and an object is needed"),
    # evaluate
    ("evaluate --adapter-path gone", "gone: no such adapter; --adapter-path takes"),
    ("evaluate --adapter-path adapter-array", "and an object is needed"),
    ("evaluate --adapter-path adapter-settings", "its settings: --rank: 'many' is not a whole number"),
    ("evaluate --adapter-path adapter-range", "its settings: --learning-rate -1.0: must be above 0"),
    ("evaluate --adapter-path adapter-captions", "its captions are not all text"),
    ("evaluate --adapter-path adapter-base", "its base_model is 3; get the directory again"),
    ("evaluate --adapter-path photos", "is no adapter directory that records it; give it"),
    ("evaluate --adapter-path adapter-named --data gone", "gone: no such directory"),
    ("evaluate --adapter-path adapter-named --prompts gone.txt", "gone.txt: no such file; --prompts takes"),
    ("evaluate --adapter-path adapter-named --prompts plain.txt", "write {} where the subject goes"),
    ("evaluate --adapter-path adapter-named --prompts empty.txt", "empty.txt: holds no prompts"),
    ("evaluate --adapter-path adapter-named --drift-prompts named.txt", "--drift-prompts are without {}"),
    ("evaluate --adapter-path adapter-named --prompts named.txt --subject-kind living", "give one of them"),
    ("evaluate --adapter-path adapter-named --subject ' '", "--subject: is empty"),
    ("evaluate --adapter-path adapter-named --output plain.txt", "plain.txt: is a file; --output takes a directory"),
    ("evaluate --lora-scale inf", "--lora-scale inf"),
    ("evaluate --drift-images -1", "--drift-images -1: must be at least 0 and at most 10000"),
    ("evaluate --n-images 0", "--n-images 0"),
    ("evaluate --subject-kind ghost", "is not one of object, living, plain"),
    # convert, export, fuse, verify, upload, cache, doctor
    ("convert", "--hf-path: give a Hugging Face directory"),
    ("convert --hf-path ''", "--hf-path: is empty"),
    ("convert --hf-path gone", "gone: no such file or directory, and not a repo id"),
    ("convert --hf-path photos --mlx-path photos", "photos: already exists; choose another --mlx-path"),
    ("convert --hf-path photos", "photos: "),
    ("convert --hf-path flux", "is an MLX model directory already"),
    ("convert --hf-path plain.txt", "plain.txt: "),
    ("convert --hf-path flux --to hf --stream", "--stream: does not go with --to hf"),
    ("convert --hf-path photos --to hf", "is not an MLX model directory, which --to hf takes"),
    ("convert --hf-path gone --to hf", "gone: no such directory"),
    ("convert --hf-path photos --base flux", "--base: is for single files"),
    ("convert --q-bits 5", "--q-bits: 5 is not one of 4, 6, 8"),
    ("convert --q-group-size 7", "is not one of 32, 64, 128"),
    ("convert --dtype int8", "is not one of float32, bfloat16, float16"),
    ("export --adapter-path gone", "adapter_config.json: no such file"),
    ("export --adapter-path adapter-array", "and an object is needed"),
    ("export --adapter-path adapter-named --output photos", "photos: already exists"),
    ("export --format zip", "is not one of diffusers"),
    ("fuse", "adapters: does not say which model it is for; give --model"),
    ("fuse --adapter-path adapter-array", "and an object is needed"),
    ("fuse --adapter-path adapter-named --save-path photos", "photos: already exists"),
    ("fuse --adapter-path adapter-named --lora-scale 1 --lora-scale 1", "given 2 times for 1 adapters"),
    ("fuse --lora-scale nan", "--lora-scale nan"),
    ("fuse --adapter-path gone --model flux", "gone: no such adapter"),
    ("verify", "directory"),
    ("verify gone", "gone: "),
    ("verify ''", "--path: is empty"),
    ("verify photos", "photos: "),
    ("upload --path gone --repo a/b --dry-run", "gone: is no adapter directory"),
    ("upload --path adapter-array --repo a/b --dry-run", "and an object is needed"),
    ("upload --path photos", "--repo"),
    ("cache burn", "ACTION: 'burn' is not one of list, clear"),
    ("cache list gone", "gone: is no conversion in"),
    ("cache list --older-than -1", "--older-than -1.0: must be at least 0 and at most 100000"),
    ("cache list --older-than nan", "--older-than nan"),
    ("cache clear --older-than inf", "--older-than inf"),
    ("doctor --slow", "No such option"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_flux):
    place = tmp_path_factory.mktemp("wrong")
    wrong.fill(place, tiny_flux)
    return place


@pytest.fixture(autouse=True)
def _there(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def said(words):
    """(status, what is printed in one line) of a command."""
    result = CliRunner().invoke(app, words, env={"COLUMNS": "400", "TERM": "dumb"})
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    return result.exit_code, " ".join(result.output.split())


def test_there_are_many():
    assert len({line for line, _ in WRONG}) == len(WRONG) >= 150
    assert {line.split()[0] for line, _ in WRONG} >= {command.name for command in app.registered_commands}


@pytest.mark.parametrize(("line", "sentence"), WRONG)
def test_a_wrong_invocation_is_one_sentence(line, sentence, folder):
    before = sorted(os.listdir(folder))
    status, text = said(shlex.split(line))
    assert status in (1, 2), text
    assert sentence in text
    assert "Traceback" not in text
    assert sorted(os.listdir(folder)) == before, "and nothing is written"


def test_from_python_they_are_the_same_sentences():
    with pytest.raises(UserError, match="--rank 0: must be at least 1"):
        train(rank=0)
    with pytest.raises(UserError, match="--rank 0: must be at least 1"):
        TrainSettings(rank=0)
    with pytest.raises(UserError, match="train: 'photos' is not TrainSettings; give options by name: train"):
        train("photos")
    with pytest.raises(UserError, match="--iters nan|iters: nan is not a whole number"):
        train(TrainSettings(data="photos"), iters=float("nan"))
    with pytest.raises(UserError, match="memory_budget -5: must be at least 0"):
        load("flux", memory_budget=-5)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "big", None, [1], 10**400])
def test_a_recorded_scale_is_a_number_that_is_finite(scale):
    with pytest.raises(UserError, match=r"adapter_config\.json: scale is .* and has to be a number"):
        scale_of({"scale": scale}, Path("dog") / "adapters.safetensors")
    assert (scale_of({"scale": 2}, Path("a")), scale_of({}, Path("a"))) == (2.0, 1.0)


def test_a_text_is_a_prompt_and_an_opened_model_a_model(tmp_path):
    how = {"steps": 1, "width": 32, "height": 32, "memory_budget": "any"}
    (by_name,) = generate("a dog", model="flux", output=str(tmp_path / "a.png"), **how)
    (opened,) = generate("a dog", model=load("flux"), output=str(tmp_path / "b.png"), **how)
    assert by_name.stat().st_size > 0
    assert opened.stat().st_size > 0
