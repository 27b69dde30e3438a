"""`convert --stream`: a repo's weights are converted as they come, a part of a tensor at a time, and never kept. The
disk holds the converted model alone, and a stopped conversion goes on with the shard that it was at.
"""

import bisect
import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from mlx_blockskip.converters import run, write
from mlx_blockskip.converters.write import Precision
from mlx_blockskip.engine import disk, files, owned
from mlx_blockskip.engine.elsewhere import elsewhere
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.engine.header import MAX_HEADER
from mlx_blockskip.events import Note, emit
from mlx_blockskip.tasks.alone import alone
from mlx_blockskip.tasks.checkpoint import hub
from mlx_blockskip.tasks.checkpoint.address import Repo
from mlx_blockskip.tasks.checkpoint.hub_errors import UnreachableError, speaking
from mlx_blockskip.tasks.checkpoint.transfer import attended, get, quiet
from mlx_blockskip.tasks.phases import phase

WINDOW = 256 << 10
"""Bytes that are fetched at once at least: small tensors lie side by side."""

AHEAD = 64 << 20
"""Bytes of one tensor that are fetched at once at most, where less is asked for."""

OURS = ("source", "model")
"""What the working directory holds: the checkpoint without its weights, and what is converted of it."""


class OnHub:
    """A file of a commit on the Hub. The last part of it that was read is kept. tick: called while the Hub is waited
    for.
    """

    def __init__(self, repo: str, commit: str, name: str, size: int, tick: Callable[[], None]):
        self.repo, self.commit, self.name, self.size, self.tick = repo, commit, name, size, tick
        self._start, self._held, self._ends = 0, b"", [0]

    def ends_of_tensors(self, ends: Iterable[int]) -> None:
        """Say where tensors end, so that no more of one is fetched ahead than there is."""
        self._ends = sorted(ends)

    def read(self, offset: int, count: int) -> bytes:
        """Bytes from `offset` on. Raises UserError with the Hub's reason."""
        begin = offset - self._start
        if not 0 <= begin <= begin + count <= len(self._held):
            following = bisect.bisect_right(self._ends, offset)
            tensor = self._ends[following] - offset if following < len(self._ends) else 0
            end = min(self.size, offset + max(count, WINDOW, min(tensor, AHEAD)))
            with speaking(self.repo, self.commit), quiet():
                self._held = attended(lambda: self._fetch(offset, end), self.tick)
            self._start, begin = offset, 0
        return self._held[begin : begin + count]

    def _fetch(self, start: int, end: int) -> bytes:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        into = io.BytesIO()
        headers = {**build_hf_headers(), "Range": f"bytes={start}-{end - 1}"}
        url = hf_hub_url(self.repo, self.name, revision=self.commit)
        http_get(url, into, headers=headers, expected_size=end - start)
        return into.getvalue()


def convert_streaming(repo: Repo, target: Path, precision: Precision, origin: str) -> None:
    """Convert a pipeline's repo into the new directory `target`, which appears when it is whole.

    The bytes are those of a conversion of the downloaded repo. Raises UserError.
    """
    work = target.with_name(f"{target.name}.streaming")
    info = hub.look_up(repo)
    plan = hub.plan(repo, info, (hub.PIPELINE,), precision)
    precision = hub.in_full(precision, hub.PIPELINE)
    weights = [name for name in plan.names if name.endswith(".safetensors") and not (plan.top / name).exists()]
    get(repo.name, info.sha, [name for name in plan.names if name not in weights])
    with alone(target.with_name(f"{work.name}.lock")), _going_on(repo.name):
        made_from = {"repo": repo.name, "commit": info.sha, "precision": asdict(precision)}
        owned.begin(work, OURS, made_from)
        made, source = work / "model", work / "source"
        shards = [(c, shard) for c in plan.needs.components for shard in write.plan_shards(c, precision)]
        missing = [(c, shard) for c, shard in shards if not (made / c.folder / shard.file).is_file()]
        through, need = sum(plan.sizes[name] for name in weights), _bytes(missing, precision)
        if need > files.free_space(work):
            free = hub.gib(files.free_space(work))
            raise UserError(f"{target}: {hub.gib(need)} are needed and {free} are free; choose another disk")
        emit(Note(f"Streaming {repo.name} ({hub.gib(through)} in all), which takes {hub.gib(need)} of disk"))
        made.mkdir(exist_ok=True)
        with phase("convert", len(shards), "shards") as track:
            done = 0

            def tick() -> None:
                track.step(done)

            remotes = {name: OnHub(repo.name, info.sha, name, plan.sizes[name], tick) for name in weights}
            _lay_out(source, plan, remotes)
            with elsewhere({source / name: remote for name, remote in remotes.items()}):
                for name, remote in remotes.items():
                    entries = files.read_header(source / name).entries.values()
                    remote.ends_of_tensors(entry.start + entry.nbytes for entry in entries)
                for _ in _converted(source, made, precision, origin):
                    done += 1
                    tick()
        disk.flush_tree(made)
        made.replace(target)
        disk.flush_directory(target.parent)
        owned.clear(work, OURS)


def finish(repo: Repo, target: Path, precision: Precision) -> bool:
    """Whether `target` is this conversion, which was killed when it had its name; what is left beside it goes."""
    work = target.with_name(f"{target.name}.streaming")
    wanted = {"repo": repo.name, "precision": asdict(hub.in_full(precision, hub.PIPELINE))}
    made_from = owned.recorded(work) or {}
    if (work / "model").exists() or any(made_from.get(key) != value for key, value in wanted.items()):
        return False
    with alone(target.with_name(f"{work.name}.lock")):
        owned.clear(work, OURS)
    return True


def _converted(source: Path, made: Path, precision: Precision, origin: str) -> Iterator[tuple[str, str]]:
    family = hub.family_of(source)
    return write.write_model(source, made, family, precision, run.open_checkpoint(source, family), origin)


def _bytes(shards: list, precision: Precision) -> int:
    return sum(
        entry.nbytes for component, shard in shards for entry in write.shard_entries(component, shard, precision)
    )


def _lay_out(source: Path, plan: hub.Plan, remotes: dict[str, OnHub]) -> None:
    """The checkpoint in a directory of its own: links to what is here, and of other weights their headers."""
    for name in plan.names:
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name in remotes and path.is_file():
            continue
        if name in remotes:
            length = int.from_bytes(remotes[name].read(0, 8), "little")
            with files.atomic_file(path, durable=False) as temporary:
                temporary.write_bytes(remotes[name].read(0, 8 + min(length, MAX_HEADER)))
        else:
            path.unlink(missing_ok=True)
            path.symlink_to((plan.top / name).resolve())


@contextmanager
def _going_on(repo: str) -> Iterator[None]:
    """Say what is left where it is stopped, by the user or by the network."""
    told = "what is converted is kept, and the same command goes on from there"
    try:
        yield
    except KeyboardInterrupt:
        emit(Note(f"{repo}: stopped; {told}"))
        raise
    except UnreachableError as error:
        raise UnreachableError(f"{error}; {told}") from error
