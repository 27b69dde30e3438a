"""Files of a repo into the Hub's own cache: some side by side, one bar in bytes over all of them, and what a broken or
stopped download has fetched is kept and gone on from.
"""

import logging
import queue
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from mlx_blockskip.engine import files
from mlx_blockskip.events import Note, emit
from mlx_blockskip.tasks.checkpoint import hub_cache
from mlx_blockskip.tasks.checkpoint.hub_errors import speaking
from mlx_blockskip.tasks.phases import phase

T = TypeVar("T")

WORKERS = 4
INTERVAL = 0.2
"""Seconds between two looks at how far it is: as long as Ctrl-C waits."""
GRACE = 0.5
"""Seconds that workers have to stop in: one that waits for the server longer is left to itself."""


class StoppedError(Exception):
    """Raised in a worker whose work is not wanted any more."""


class Tally:
    """Bytes that are here of each file, and whether to go on."""

    def __init__(self) -> None:
        self._bytes: dict[str, int] = {}
        self.stopped = threading.Event()

    def put(self, name: str, count: int) -> None:
        self._bytes[name] = count
        if self.stopped.is_set():
            raise StoppedError

    @property
    def done(self) -> int:
        return sum(list(self._bytes.values()))


class Part:
    """A file under way, as `http_get` writes it: counts its bytes, and ends where it is stopped."""

    def __init__(self, file: Any, name: str, tally: Tally):
        self._file, self._name, self._tally = file, name, tally

    def write(self, data: bytes) -> int:
        count = self._file.write(data)
        self._tally.put(self._name, self._file.tell())
        return int(count)

    def truncate(self) -> int:
        return int(self._file.truncate())

    def seek(self, *place: int) -> int:
        return int(self._file.seek(*place))

    def tell(self) -> int:
        return int(self._file.tell())


def transfer(repo: str, commit: str, sizes: Mapping[str, int]) -> None:
    """Have these files of a commit in the Hub's cache. sizes: bytes of each, for the bar.

    Raises UserError with the Hub's reason. Ctrl-C stops it within a second; a later call goes on where it was.
    """
    tally, names = Tally(), queue.SimpleQueue[str]()
    failed: list[BaseException] = []
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        names.put(name)

    def work() -> None:
        try:
            while not tally.stopped.is_set():
                _fetch(repo, commit, names.get_nowait(), tally)
        except (queue.Empty, StoppedError):
            pass
        except BaseException as error:
            failed.append(error)
            tally.stopped.set()

    workers = [threading.Thread(target=work, daemon=True) for _ in range(min(WORKERS, len(sizes)))]
    with phase("download", sum(sizes.values()), "B") as track, quiet():
        try:
            for worker in workers:
                worker.start()
            for worker in workers:
                while worker.is_alive() and not failed:
                    worker.join(INTERVAL)
                    track.step(tally.done)
        except KeyboardInterrupt:
            _leave(workers, tally)
            emit(Note(f"{repo}: stopped; what was downloaded is kept, and the same command goes on from there"))
            raise
        except BaseException:
            _leave(workers, tally)
            raise
        if failed:
            _leave(workers, tally)
            with speaking(repo, commit):
                raise failed[0]


def get(repo: str, commit: str, names: Iterable[str]) -> None:
    """The same for small files, one after the other and with no bar."""
    with speaking(repo, commit), quiet():
        for name in names:
            _fetch(repo, commit, name, Tally())


def _leave(workers: list[threading.Thread], tally: Tally) -> None:
    tally.stopped.set()
    until = time.monotonic() + GRACE
    for worker in workers:
        worker.join(max(0.0, until - time.monotonic()))


def _fetch(repo: str, commit: str, name: str, tally: Tally) -> None:
    """One file: its blob first, in parts that are kept; then the client itself gives it its name in the snapshot."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.utils import WeakFileLock

    found = try_to_load_from_cache(repo, name, revision=commit)
    if not isinstance(found, str):
        url = hf_hub_url(repo, name, revision=commit)
        metadata = get_hf_file_metadata(url)
        etag, cache = metadata.etag, hub_cache.folder(repo)
        if etag and re.fullmatch(r"[\w.-]+", etag):  # else it is left to the client
            lock = hub_cache.root() / ".locks" / cache.name / f"{etag}.lock"
            for path in (lock.parent, cache / "blobs"):
                path.mkdir(parents=True, exist_ok=True)
            with WeakFileLock(str(lock)):
                _fetch_blob(url, cache / "blobs" / etag, metadata.size, name, tally)
        found = hf_hub_download(repo, name, revision=commit)
    tally.put(name, Path(found).stat().st_size)


def _fetch_blob(url: str, blob: Path, size: int | None, name: str, tally: Tally) -> None:
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    part = blob.with_name(f"{blob.name}.incomplete")
    if blob.exists():
        return
    checked = re.fullmatch(r"[0-9a-f]{64}", blob.name) is not None  # a small file's etag is git's
    if part.exists() and not (checked and size is not None and part.stat().st_size <= size):
        part.unlink()
    with part.open("ab", buffering=0) as file:
        here = file.tell()
        tally.put(name, here)
        # the redirect to where the bytes are is followed anew each time: its address is valid for an hour
        http_get(url, Part(file, name, tally), resume_size=here, headers=build_hf_headers(), expected_size=size)  # type: ignore[arg-type]
    if here and files.sha256(part) != blob.name:
        part.unlink()
        return _fetch_blob(url, blob, size, name, tally)
    part.replace(blob)


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, the client draws no bars and logs no warnings: what happens is said by the phase."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    logger = logging.getLogger("huggingface_hub")
    level, shown = logger.level, not are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        disable_progress_bars()
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)
            if shown:
                enable_progress_bars()


def attended(work: Callable[[], T], tick: Callable[[], None]) -> T:
    """What `work` returns or raises, done in a thread of its own while `tick` is called every now and then: it emits,
    so that Ctrl-C ends this although a library waits for the network.
    """
    result: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            result.append(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(INTERVAL)
        tick()
    if failed:
        raise failed[0]
    return result[0]
