"""`brainsynth push`: a release to a dataset repository of the Hugging Face hub.

A commit takes at most 100 files; the last one has `release.json`, so a repository that has it is whole. The repository
itself says what is there already, so a push that was killed is resumed on any machine.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from brainsynth.errors import UserError, problems_error
from brainsynth.stages.released import SIGNATURE_KEY, SUMS, changed, read_release, sums
from brainsynth.stages.verify import RELEASE_KEY
from brainsynth.storage.filesystem import local_folder
from brainsynth.storage.whole_file import file_sha256

if TYPE_CHECKING:
    from huggingface_hub import HfApi

log = logging.getLogger(__name__)
FILES, BYTES = 100, 8 << 30
"""Of a commit, at most."""
OF_THE_HUB = {".gitattributes"}


def command(arguments: argparse.Namespace) -> int:
    """Exit code 0: all of it is there."""
    folder, repo = local_folder(arguments.release, "release"), arguments.to
    released = read_release(folder)
    wanted = sums(folder, released)
    if problems := changed(folder, wanted):
        raise problems_error(f"{folder} is not as it was released", problems)
    files = [*wanted, SUMS, *([SIGNATURE_KEY] if (folder / SIGNATURE_KEY).is_file() else []), RELEASE_KEY]
    size = sum((folder / name).stat().st_size for name in files)
    if arguments.dry_run:
        print(f"{len(files)} files, {size / 1e6:.1f} MB → datasets/{repo}; nothing was sent")
        return 0
    try:
        from huggingface_hub import HfApi
    except ModuleNotFoundError:
        raise UserError(
            "brainsynth push needs huggingface_hub, which is not installed: pip install 'brainsynth[publish]'"
        ) from None
    try:
        sent = push(HfApi(), folder, repo, files)
    except UserError:
        raise
    except Exception as error:  # of the library, of its HTTP client, or a RuntimeError around one of a file
        raise _refused(repo, error) from error
    print(f"{repo}: {len(files)} files, {size / 1e6:.1f} MB, of which {sent} were sent now")
    return 0


def push(api: HfApi, folder: Path, repo: str, files: list[str]) -> int:
    """Send what is not there yet, in order; returns how many files that were. Raises UserError for files of others."""
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.hf_api import RepoFile

    api.auth_check(repo, repo_type="dataset", write=True)
    there = {
        entry.path: (entry.lfs.sha256 if entry.lfs else None, entry.blob_id)
        for entry in api.list_repo_tree(repo, recursive=True, repo_type="dataset")
        if isinstance(entry, RepoFile)
    }
    if foreign := sorted(there.keys() - {*files} - OF_THE_HUB):
        raise UserError(
            f"--to: {repo} holds {len(foreign)} files that are not of this release, such as {foreign[0]}: give an empty "
            "repository, or delete them there"
        )
    todo = [name for name in files if name not in there or not _same(folder / name, *there[name])]
    for part in _commits(folder, todo):
        operations = [CommitOperationAdd(name, str(folder / name)) for name in part]
        api.create_commit(repo, operations, commit_message=f"{part[0]} and {len(part) - 1} more", repo_type="dataset")
        log.info("%s: %s", repo, part[-1])
    return len(todo)


def _commits(folder: Path, names: list[str]) -> Iterator[list[str]]:
    """Names by commit; `release.json` is in the last."""
    part: list[str] = []
    size = 0
    for name in names:
        if part and (len(part) == FILES or size > BYTES):
            yield part
            part, size = [], 0
        part.append(name)
        size += (folder / name).stat().st_size
    if part:
        yield part


def _same(path: Path, sha256: str | None, blob: str) -> bool:
    """Whether the hub's file is this one, by its sha256 or, of a small one, by git's digest."""
    if sha256 is not None:
        return file_sha256(path) == sha256
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest() == blob


def _refused(repo: str, error: Exception) -> UserError:
    """What the hub, or the way to it, answered."""
    cause: BaseException | None = error
    while cause is not None and getattr(cause, "response", None) is None:
        cause = cause.__cause__
    status = getattr(getattr(cause, "response", None), "status_code", None)
    why = {
        401: "the token is missing or not valid: set HF_TOKEN, or run `hf auth login`, with a token that may write",
        403: "the token may not write there",
        404: "there is no such dataset repository, or the token does not see it: create it on the hub first",
    }.get(status or 0, f"{type(error).__name__}: {error}; run the same command again to resume")
    return UserError(f"--to: {repo} at {os.environ.get('HF_ENDPOINT', 'https://huggingface.co')}: {why}")
