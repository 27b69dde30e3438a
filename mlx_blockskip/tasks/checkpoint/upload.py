"""`upload`: an adapter or a converted model goes to the Hub, with a model card and nothing of this disk's own."""

import io
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image as PillowImage

from mlx_blockskip.engine import files, leftovers, listing
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.events import Note, Table, emit, unheard
from mlx_blockskip.options import PATHS
from mlx_blockskip.settings import ExportSettings, UploadSettings
from mlx_blockskip.tasks.checkpoint import card
from mlx_blockskip.tasks.checkpoint.adapter_names import CONFIG, PEFT_FILE, TENSORS
from mlx_blockskip.tasks.checkpoint.adapters import recorded
from mlx_blockskip.tasks.checkpoint.address import repo_named
from mlx_blockskip.tasks.checkpoint.base import README, base_model
from mlx_blockskip.tasks.checkpoint.export import export
from mlx_blockskip.tasks.checkpoint.hub_errors import HUB, LOGIN, speaking
from mlx_blockskip.tasks.checkpoint.recognise import is_converted
from mlx_blockskip.tasks.checkpoint.transfer import attended, quiet
from mlx_blockskip.tasks.phases import phase
from mlx_blockskip.tasks.sampling.pictures import PNG_KEY

MOST_PICTURES = 8

Content = bytes | Path


def upload(settings: UploadSettings) -> str:
    """Put what lies in `path` into `repo`, in one commit; returns the repo's address. Raises UserError with the Hub's
    reason.
    """
    path = Path(settings.path).expanduser()
    repo = repo_named(settings.repo)
    if repo is None or repo.revision:
        raise UserError(f"--repo {settings.repo}: give the repo to upload to, such as your-name/my-dog")
    with leftovers.scratch_directory() as scratch:
        content = contents(path, repo.name, scratch)
        if settings.dry_run:
            _show(content, repo.name)
        else:
            _send(content, repo.name, settings.private)
    return f"{HUB}/{repo.name}"


def contents(path: Path, repo: str, scratch: Path) -> dict[str, Content]:
    """What is uploaded, by its name in the repo. scratch: a directory for what is made for it. Raises UserError for a
    directory that is neither an adapter nor a model.
    """
    if (path / CONFIG).is_file():
        return _of_adapter(path, repo, scratch)
    if path.is_dir() and is_converted(path):
        return _of_model(path, repo)
    raise UserError(
        f"{path}: is no adapter directory and no MLX model directory; --path takes what train or convert wrote"
    )


def _of_adapter(path: Path, repo: str, scratch: Path) -> dict[str, Content]:
    config = recorded(path)
    base = base_model(str(config.get("base_model") or ""))
    with unheard():
        lora = export(ExportSettings(adapter_path=str(path), output=str(scratch / PEFT_FILE)))
    pictures = _pictures(path, config.get("settings", {}).get("sample_prompt") or [])
    shown = [card.Picture(name, prompt) for name, (prompt, _) in pictures.items()]
    text = card.adapter_card(repo, config, base, shown, card.means_of(path), PEFT_FILE)
    return {
        README: text.encode(),
        CONFIG: _as_json({**public(config), "base_model": base.name}),
        TENSORS: path / TENSORS,
        PEFT_FILE: lora,
        **{name: data for name, (_, data) in pictures.items()},
    }


def _of_model(path: Path, repo: str) -> dict[str, Content]:
    config = files.read_json(path / "config.json")
    base = card.base_of(str(config.get("source") or path.name), path)
    base = card.Base(base.name, base.repo, card.metadata_of(path / README))
    found: dict[str, Content] = {
        str(file.relative_to(path)): file for file in listing.visible(path, "**/*") if file.is_file()
    }
    text = card.model_card(repo, config, base)
    return {**found, README: text.encode(), "config.json": _as_json({**config, "source": base.name})}


def public(config: Mapping[str, Any]) -> dict[str, Any]:
    """An adapter's description without the paths of this disk: of each its last name is left."""

    def last(value: Any) -> Any:
        if isinstance(value, list):
            return [last(item) for item in value]
        return Path(value).name if isinstance(value, str) and value.startswith(("/", "~", ".")) else value

    settings = {key: last(value) if key in PATHS else value for key, value in config.get("settings", {}).items()}
    return {**config, "settings": settings}


def _pictures(path: Path, prompts: Sequence[str]) -> dict[str, tuple[str, bytes]]:
    """Sample images of an adapter directory by their names in the repo, the last ones: their prompts, and the images
    without the settings that their files hold. prompts: of `step-000100-1.png` and so on.
    """
    found = [*listing.visible(path, "*.png"), *listing.visible(path, "samples/*.png")]
    pictures = {}
    for file in sorted(found, key=lambda file: file.stat().st_mtime)[-MOST_PICTURES:]:
        try:
            with PillowImage.open(file) as image:
                prompt, buffer = _prompt(image.info.get(PNG_KEY)) or _of_step(file.stem, prompts), io.BytesIO()
                image.convert("RGB").save(buffer, "PNG")
        except OSError:  # no image, whatever it is called
            continue
        pictures[f"samples/{file.name}"] = (prompt or file.stem, buffer.getvalue())
    return pictures


def _prompt(kept: str | None) -> str:
    try:
        prompt = json.loads(kept or "{}").get("prompt") or ""
    except ValueError:
        return ""
    return str(prompt[0] if isinstance(prompt, list) and prompt else prompt)


def _of_step(stem: str, prompts: Sequence[str]) -> str:
    number = stem.rpartition("-")[2]
    known = stem.startswith("step-") and number.isdecimal() and 1 <= int(number) <= len(prompts)
    return prompts[int(number) - 1] if known else ""


def _as_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def size_of(content: Content) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _show(content: Mapping[str, Content], repo: str) -> None:
    rows = tuple((name, f"{size_of(data) / 2**20:.2f} MiB") for name, data in content.items())
    emit(Table(f"Would be uploaded to {HUB}/{repo}", ("file", "size"), rows))
    readme = content[README]
    assert isinstance(readme, bytes)
    emit(Note(readme.decode()))


def _send(content: Mapping[str, Content], repo: str, private: bool) -> None:
    """One commit; large files go ahead of it, one after the other, and those that are there already are passed over: a
    stopped upload goes on from there.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    if get_token() is None:
        raise UserError(f"{repo}: you are not logged in to the Hub; {LOGIN} with a token that may write")
    api = HfApi()
    content = dict(content)
    with speaking(repo, writing=True), quiet():
        api.create_repo(repo, private=private or None, exist_ok=True)
        if not _may_write_card(api, repo):
            del content[README]
            emit(Note(f"{repo}: has a {README} of another make, which is left as it is"))
        added = [
            CommitOperationAdd(name, data if isinstance(data, bytes) else str(data)) for name, data in content.items()
        ]
        try:
            _commit(api, repo, added)
        except KeyboardInterrupt:
            emit(Note(f"{repo}: stopped, and nothing is changed there yet; the same command goes on from there"))
            raise
    emit(Note(f"uploaded: {HUB}/{repo}"))


def _commit(api: Any, repo: str, added: Sequence[Any]) -> None:
    sizes = [one.upload_info.size for one in added]
    with phase("upload", sum(sizes), "B") as track:
        for i, one in enumerate(added):
            attended(partial(api.preupload_lfs_files, repo, [one]), partial(track.step, sum(sizes[:i])))
        commit = partial(api.create_commit, repo, added, commit_message="Upload by mlx-blockskip")
        attended(commit, partial(track.step, sum(sizes)))


def _may_write_card(api: Any, repo: str) -> bool:
    """Whether the repo has no card yet, or one that this tool wrote."""
    if not api.file_exists(repo, README):
        return True
    place = api.hf_hub_download(repo, README)
    return card.TAG in (card.metadata_of(Path(place)).get("tags") or [])
