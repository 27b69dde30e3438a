"""`upload`, to a small Hub on the loopback with the real client."""

import json
import shutil

import pytest
from huggingface_hub import ModelCard, get_token
from PIL import Image, PngImagePlugin
from typer.testing import CliRunner

from mlx_blockskip.cli import app
from mlx_blockskip.engine import files
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.events import Note, Step, Table, listening
from mlx_blockskip.models.registry import open_model
from mlx_blockskip.settings import ExportSettings, UploadSettings
from mlx_blockskip.tasks.checkpoint import hub_cache
from mlx_blockskip.tasks.checkpoint.adapters import save_adapter
from mlx_blockskip.tasks.checkpoint.export import export
from mlx_blockskip.tasks.checkpoint.upload import upload
from support.hub_server import TOKEN, Failure
from support.models import random_tree
from support.tasks import drive

REPO = "someone/dog"
DEV = "black-forest-labs/FLUX.1-dev"
LICENSED = """---
license: other
license_name: flux-1-dev-non-commercial-license
license_link: LICENSE.md
---
# FLUX.1 [dev]
"""


@pytest.fixture
def logged_in(hub_server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub_server.token = TOKEN
    return hub_server


@pytest.fixture
def base(tiny_flux, tmp_path):
    """tiny-flux as if it had been converted from FLUX.1-dev."""
    path = shutil.copytree(tiny_flux, tmp_path / "private" / "flux-dev")
    config = files.read_json(path / "config.json")
    files.write_json(path / "config.json", {**config, "source": f"{DEV}@main"})
    (path / "README.md").write_text(LICENSED)
    return path


@pytest.fixture
def adapter(base, tmp_path):
    model, path = open_model(base), tmp_path / "private" / "dog-adapter"
    config = {
        "format": 1, "family": "flux1", "base_model": str(base), "rank": 2, "scale": 0.5, "targets": "all",
        "captions": ["a photo of sks dog"] * 4, "steps": 300,
        "plan": {"depth": 12, "runs": [[0, 3], [9, 12]]},
        "settings": {"model": str(base), "data": str(tmp_path / "private" / "photos"), "adapter_path": str(path),
                     "learning_rate": 1e-4, "sample_prompt": ["sks dog on a beach"], "trace_memory": None},
    }  # fmt: skip
    save_adapter(path, random_tree(model, [4, 5], 2), model, config)
    (path / "samples").mkdir()
    info = PngImagePlugin.PngInfo()
    info.add_itxt("mlx-blockskip", json.dumps({"prompt": ["sks dog in snow"], "model": str(base)}))
    Image.new("RGB", (8, 8)).save(path / "out.png", pnginfo=info)
    Image.new("RGB", (8, 8)).save(path / "samples" / "step-000100-1.png")
    files.write_json(path / "evaluation" / "evaluation.json", {"means": {"dino": 0.7, "clip_i": 0.8, "clip_t": 0.3}})
    (path / "checkpoints" / "step-000100").mkdir(parents=True)
    (path / "log.jsonl").write_text(str(base))
    return path


def uploaded(server, repo=REPO):
    return server.repos[repo].commits[server.repos[repo].refs["main"]]


def test_an_adapter_goes_up_with_its_card_and_its_lora_for_diffusers(logged_in, adapter, tmp_path):
    address, events = drive(upload, UploadSettings(path=str(adapter), repo=REPO, private=True))
    assert address == f"https://huggingface.co/{REPO}"
    found = uploaded(logged_in)
    assert set(found) == {
        ".gitattributes", "README.md", "adapter_config.json", "adapters.safetensors",
        "pytorch_lora_weights.safetensors", "samples/out.png", "samples/step-000100-1.png",
    }  # fmt: skip
    assert found["adapters.safetensors"] == (adapter / "adapters.safetensors").read_bytes()
    export(ExportSettings(adapter_path=str(adapter), output=str(tmp_path / "lora.safetensors")))
    assert found["pytorch_lora_weights.safetensors"] == (tmp_path / "lora.safetensors").read_bytes()
    (created,) = logged_in.created
    assert created["visibility"] == "private"
    steps = [event.done for event in events if isinstance(event, Step)]
    assert steps[-1] == sum(len(data) for name, data in found.items() if name != ".gitattributes")


def test_nothing_of_this_disk_and_no_token_goes_up(logged_in, adapter):
    upload(UploadSettings(path=str(adapter), repo=REPO))
    for name, data in uploaded(logged_in).items():
        assert b"private" not in data, name
        assert TOKEN.encode() not in data, name
    assert logged_in.tokens_elsewhere == []
    config = json.loads(uploaded(logged_in)["adapter_config.json"])
    assert config["base_model"] == DEV
    assert (config["settings"]["data"], config["rank"]) == ("photos", 2)


def test_the_card_says_what_it_is_and_how_it_is_used(logged_in, adapter):
    upload(UploadSettings(path=str(adapter), repo=REPO))
    content = uploaded(logged_in)["README.md"].decode()
    assert logged_in.cards == [content]  # what the client has the Hub validate
    metadata = ModelCard(content).data.to_dict()
    assert metadata["base_model"] == DEV
    assert metadata["base_model_relation"] == "adapter"
    assert metadata["license"] == "other"
    assert metadata["license_name"] == "flux-1-dev-non-commercial-license"
    assert metadata["license_link"] == f"https://huggingface.co/{DEV}/blob/main/LICENSE.md"
    assert metadata["instance_prompt"] == "a photo of sks dog"
    assert metadata["pipeline_tag"] == "text-to-image"
    assert {"lora", "diffusers", "mlx-blockskip"} <= set(metadata["tags"])
    prompts = {shown["output"]["url"]: shown["text"] for shown in metadata["widget"]}
    assert prompts == {"samples/out.png": "sks dog in snow", "samples/step-000100-1.png": "sks dog on a beach"}
    for said in (
        "| rank | 2 |", "| skipped blocks | 0 to 2, 9 to 11 of 12 |", "| DINO | 0.7000 |", "| CLIP-T | 0.3000 |",
        f'mlx-blockskip generate --model {DEV} --adapter-path dog --prompt "a photo of sks dog"',
        f'pipe.load_lora_weights("{REPO}", weight_name="pytorch_lora_weights.safetensors")', "ComfyUI", "4 photos",
    ):  # fmt: skip
        assert said in content, said
    assert "$" not in content


def test_a_dry_run_prints_what_would_go_up_and_asks_nobody(hub_server, adapter):
    before = sorted(adapter.rglob("*"))
    _, events = drive(upload, UploadSettings(path=str(adapter), repo=REPO, dry_run=True))
    (table,) = [event for event in events if isinstance(event, Table)]
    assert {row[0] for row in table.rows} >= {"README.md", "pytorch_lora_weights.safetensors"}
    assert any(isinstance(event, Note) and "license_name" in event.message for event in events)
    assert sorted(adapter.rglob("*")) == before
    assert hub_server.requests == []


def test_a_converted_model_goes_up_whole(logged_in, base):
    config = files.read_json(base / "config.json")
    quantized = {**config, "quantization": {"bits": 4, "group_size": 64, "modulation_bits": 0, "exceptions": {}}}
    files.write_json(base / "config.json", quantized)
    (base / ".DS_Store").write_text("x")
    upload(UploadSettings(path=str(base), repo="someone/flux-4bit"))
    found = uploaded(logged_in, "someone/flux-4bit")
    theirs = {str(p.relative_to(base)) for p in base.rglob("*") if p.is_file()} - {".DS_Store"}
    assert set(found) == theirs | {".gitattributes"}
    assert all(found[name] == (base / name).read_bytes() for name in theirs - {"README.md", "config.json"})
    metadata = ModelCard(found["README.md"].decode()).data.to_dict()
    assert (metadata["base_model"], metadata["base_model_relation"]) == (DEV, "quantized")
    assert metadata["license_name"] == "flux-1-dev-non-commercial-license"
    assert "4 bit in groups of 64, else float32" in found["README.md"].decode()
    assert json.loads(found["config.json"]) == {**quantized, "source": DEV}


@pytest.mark.parametrize("named", [DEV, "flux1-dev", "tiny-flux", "elsewhere/unknown"])
def test_the_base_may_be_called_by_any_name(logged_in, adapter, named):
    config = files.read_json(adapter / "adapter_config.json")
    files.write_json(adapter / "adapter_config.json", {**config, "base_model": named})
    readme = hub_cache.snapshot(DEV, "abc") / "README.md"
    files.write_text(readme, LICENSED)
    upload(UploadSettings(path=str(adapter), repo=REPO))
    metadata = ModelCard(uploaded(logged_in)["README.md"].decode()).data.to_dict()
    assert metadata.get("base_model") == {"flux1-dev": DEV, "tiny-flux": None}.get(named, named)
    assert ("license" in metadata) == (named in (DEV, "flux1-dev"))


def test_what_is_there_already_is_not_sent_again_and_a_foreign_card_stays(logged_in, adapter):
    upload(UploadSettings(path=str(adapter), repo=REPO))
    first = uploaded(logged_in)["README.md"]
    logged_in.forget()
    upload(UploadSettings(path=str(adapter), repo=REPO))
    assert not [path for method, path in logged_in.requests if path.startswith("lfs/")]
    assert uploaded(logged_in)["README.md"] == first
    logged_in.add(REPO, {**uploaded(logged_in), "README.md": b"---\nlicense: mit\n---\nmine"})
    _, events = drive(upload, UploadSettings(path=str(adapter), repo=REPO))
    assert uploaded(logged_in)["README.md"].endswith(b"mine")
    assert any("left as it is" in event.message for event in events if isinstance(event, Note))


def test_ctrl_c_stops_an_upload_and_says_how_to_go_on(logged_in, adapter):
    def stop(event):
        if isinstance(event, Step):
            raise KeyboardInterrupt

    told = []
    with pytest.raises(KeyboardInterrupt), listening(told.append), listening(stop):
        upload(UploadSettings(path=str(adapter), repo=REPO))
    assert "the same command goes on from there" in told[-1].message
    assert set(uploaded(logged_in)) == {".gitattributes"}


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (Failure(403, "You don't have the rights", where="repos/create"), "not let you write there .*rights"),
        (Failure(401, "Invalid credentials"), "does not take your token"),
        (Failure(503, "Service Unavailable", where="/commit/"), "trouble of its own"),
    ],
)
def test_a_refusal_is_one_sentence(logged_in, adapter, monkeypatch, failure, said):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    logged_in.failures.append(failure)
    with pytest.raises(UserError, match=said):
        upload(UploadSettings(path=str(adapter), repo=REPO))


def test_what_cannot_be_uploaded_is_named(hub_server, adapter, tmp_path):
    assert get_token() is None
    with pytest.raises(UserError, match="not logged in to the Hub; run `hf auth login`"):
        upload(UploadSettings(path=str(adapter), repo=REPO))
    with pytest.raises(UserError, match="is no adapter directory and no MLX model directory"):
        upload(UploadSettings(path=str(tmp_path), repo=REPO))
    for repo in ("", "dog", f"{REPO}@main"):
        with pytest.raises(UserError, match="--repo .*give the repo to upload to"):
            upload(UploadSettings(path=str(adapter), repo=repo))
    result = CliRunner().invoke(app, ["upload", "--path", str(adapter), "--repo", REPO, "--dry-run"])
    assert result.exit_code == 0
    assert "pytorch_lora_weights.safetensors" in result.output
