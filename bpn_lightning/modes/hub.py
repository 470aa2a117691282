"""Bundles on Hugging Face's hub: sent as one commit, and taken only when they are whole."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from bpn_lightning.errors import (
    BPNLightningError,
    CheckpointError,
    ConfigurationError,
    ResultsError,
)
from bpn_lightning.files.writing import flush
from bpn_lightning.modes.bundle import CONFIG, MAX_TASKS, explained, read_bundle
from bpn_lightning.modes.contents import contents, is_content, is_training_state, leads_out
from bpn_lightning.modes.training_state import (
    FOLDER,
    RECORD,
    check_training_state,
    has_training_state,
)
from bpn_lightning.nn.pretrained import import_extra

__all__ = ["MAX_BYTES", "pull", "push"]

MAX_BYTES = 2**34
"""Of all files of a bundle that is taken from a repository: 16 GiB."""

MAX_ENTRIES = 10 * MAX_TASKS
"""Files that a repository may list."""

_CHUNK = 2**20


def push(
    folder: str | os.PathLike[str],
    repository: str,
    *,
    revision: str | None = None,
    private: bool = True,
    message: str | None = None,
    training_state: bool = False,
) -> str:
    """Send a bundle to a model repository, which is made where there is none, as one commit.

    Only files of a bundle are sent. Those that are there and are not sent, as of tasks that the bundle does not have
    any more, are deleted there; files that are none of a bundle stay.

    Args:
        folder: of the bundle, whose files are compared with their hashes before.
        repository: ``OWNER/NAME``.
        revision: a branch, which has to exist; None: ``main``.
        private: whether a repository that is made is.
        message: of the commit.
        training_state: whether to send its training state, which may hold samples of the training data.

    Returns:
        The address of the commit.

    Raises:
        CheckpointError: it is no bundle, or a file is not the one that was written.
        ConfigurationError: there is no training state to send, huggingface_hub is not installed, or the hub refuses.
    """
    hub = import_extra("huggingface_hub", "hub", "Hugging Face's hub")
    root = Path(folder)
    with explained(root):
        bundle = read_bundle(root)
        if training_state:
            check_training_state(root, bundle)
        own = contents(root, training_state)
    if training_state and not has_training_state(root):
        raise ConfigurationError(
            f"Expected a training state in {root}, but there is none. Export it with bpn-export --training_state, or "
            "leave --training_state out."
        )
    with _explained_hub(repository, "write"):
        api = hub.HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        there = [
            one.path for one in api.list_repo_tree(repository, recursive=True, revision=revision)
        ]
        gone = [path for path in there if is_content(path) and path not in own]
        # The record last: it is what says that the others are complete.
        own.sort(key=lambda path: path == CONFIG)
        done = api.create_commit(
            repository,
            [
                *(hub.CommitOperationAdd(path, str(root / path)) for path in own),
                *(hub.CommitOperationDelete(path) for path in gone),
            ],
            commit_message=message or f"Bundle with {_number_of_tasks(own)} tasks",
            revision=revision,
        )
        return str(done.commit_url)


def _number_of_tasks(paths: list[str]) -> int:
    return len({path.split("/")[1] for path in paths if path.startswith("tasks/")})


def pull(
    repository: str,
    folder: str | os.PathLike[str],
    *,
    revision: str | None = None,
    max_bytes: int = MAX_BYTES,
    training_state: bool = False,
) -> tuple[Path, list[str]]:
    """Take a bundle from a model repository into a new folder, which appears when every file was checked.

    Args:
        repository: ``OWNER/NAME``.
        folder: a new one.
        revision: a branch, a tag or a commit; None: ``main``. All files are of one commit.
        max_bytes: of all files together.
        training_state: whether to take its training state, too.

    Returns:
        The folder, and the paths of files of the repository that were left there.

    Raises:
        CheckpointError: a path leads out of the folder, files are more or larger than what is said or allowed, or
            they are no bundle.
        ConfigurationError: huggingface_hub is not installed, or the hub refuses.
        ResultsError: the folder is there, or cannot be written.
    """
    hub = import_extra("huggingface_hub", "hub", "Hugging Face's hub")
    target = Path(folder)
    if target.exists() or target.is_symlink():
        raise ResultsError(
            f"Expected {target} to be a new folder, but it exists. Name another one, or remove it."
        )
    with _explained_hub(repository, "read"):
        api = hub.HfApi()
        commit = api.repo_info(repository, revision=revision).sha
        entries = list(_bounded(api.list_repo_tree(repository, recursive=True, revision=commit)))
    files = {one.path: one for one in entries if hasattr(one, "size")}
    wanted = _checked_paths(repository, files, max_bytes, training_state)
    with _landing(target) as place:
        for path in wanted:
            with _explained_hub(repository, "read"):
                url = hub.hf_hub_url(repository, path, revision=commit, endpoint=api.endpoint)
                _download(url, place / path, files[path])
        with explained(repository):
            check_training_state(place, read_bundle(place))
    return target, sorted(set(files) - set(wanted))


def _bounded(entries: Any) -> Iterator[Any]:
    for number, one in enumerate(entries):
        if number >= MAX_ENTRIES:
            raise CheckpointError(
                f"Expected a repository of at most {MAX_ENTRIES:,} files, but got more. Name that of a bundle."
            )
        yield one


def _checked_paths(
    repository: str, files: dict[str, Any], max_bytes: int, training_state: bool
) -> list[str]:
    """Those of a bundle, whose sizes are within what is allowed."""
    outside = next((path for path in files if leads_out(path)), None)
    if outside is not None:
        raise CheckpointError(
            f"Expected the files of {repository} to have names within its folder, but got {outside!r:.200}. "
            "Do not use this repository."
        )
    wanted = sorted(
        path
        for path in files
        if is_content(path) and (training_state or not is_training_state(path))
    )
    if CONFIG not in wanted:
        raise CheckpointError(
            f"Expected {repository} to hold a bundle, with {CONFIG}, but got {', '.join(sorted(files)[:5]) or 'no file'}. "
            "Name that of bpn-bundle push."
        )
    if training_state and f"{FOLDER}/{RECORD}" not in wanted:
        raise CheckpointError(
            f"Expected {repository} to hold a training state, but it has none. Leave --training_state out, or push it with "
            "--training_state."
        )
    odd = [path for path in wanted if type(files[path].size) is not int or files[path].size < 0]
    total = sum(files[path].size for path in wanted) if not odd else -1
    if not 0 <= total <= max_bytes:
        raise CheckpointError(
            f"Expected the bundle in {repository} to have at most {max_bytes:,} bytes, but got {total:,}. Raise "
            "--max_bytes if you trust it."
        )
    return wanted


def _download(url: str, path: Path, entry: Any) -> None:
    """One file, of as many bytes as the repository says, and with the hash where it says one."""
    utils = import_extra("huggingface_hub.utils", "hub", "Hugging Face's hub")
    path.parent.mkdir(parents=True, exist_ok=True)
    digest, size = sha256(), 0
    # Its own download takes as much as a server sends.
    with utils.http_stream_backoff(
        "GET", url, headers=utils.build_hf_headers(), timeout=30
    ) as response:
        utils.hf_raise_for_status(response)
        with open(path, "xb") as file:
            for part in response.iter_bytes(_CHUNK):
                size += len(part)
                if size > entry.size:
                    break
                digest.update(part)
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
    wanted = getattr(entry.lfs, "sha256", None)
    if size != entry.size or (wanted is not None and digest.hexdigest() != wanted):
        raise CheckpointError(
            f"Expected {entry.path} to be the file of {entry.size:,} bytes that the repository lists, but got "
            f"{'more' if size > entry.size else 'another one'}. Try again."
        )


@contextmanager
def _landing(target: Path) -> Iterator[Path]:
    """A folder next to the target, which takes its name at the end, if all went well."""
    place = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
        yield place
        place.chmod(0o755)
        place.rename(target)  # fails where somebody else made it meanwhile, with something in it
        flush(target.parent)
    except OSError as error:
        raise ResultsError(
            f"Expected to write {target}, but got: {error.strerror or error}. Free some space or grant write access."
        ) from error
    finally:
        if place is not None:
            shutil.rmtree(place, ignore_errors=True)


@contextmanager
def _explained_hub(repository: str, verb: str) -> Iterator[None]:
    """Say in one line what the hub, or the way to it, refuses."""
    try:
        yield
    except BPNLightningError:
        raise
    # Its HTTP client, which is another one in each major release, has exceptions of its own.
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:  # of this machine's disk
            raise
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300].rstrip(".")
        raise ConfigurationError(
            f"Expected {repository!r:.200} to be a repository of models to {verb}, but got {said}. Check its name "
            "and the network, and log in: hf auth login."
        ) from error
