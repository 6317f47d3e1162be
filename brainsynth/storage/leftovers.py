"""Which keys of a dataset no commit record can come to refer to. `brainsynth gc` removes them; verify only names them."""

from __future__ import annotations

import re

from brainsynth.storage import attempts
from brainsynth.storage.arrays import GROUP
from brainsynth.storage.keys import is_of_desktop
from brainsynth.storage.whole_file import TEMPORARY_PREFIX

COMMITS, REPAIRS = "commits", "repairs"
_OWNED = (GROUP, COMMITS, attempts.FOLDER, REPAIRS)


def is_garbage(key: str, done: set[int], num_shards: int) -> bool:
    """Of a key that no record refers to: whether none can come to refer to it. `done`: the shards that are committed.

    Of a shard that is not committed everything stays: it may be on its way. Outside of the folders that brainsynth owns
    nothing is ever garbage, and neither is a desktop's file anywhere.
    """
    if is_of_desktop(key):
        return False
    if is_temporary(key):
        # What is half-written next to a committed shard may belong to another one: it waits for the end.
        return len(done) == num_shards
    if key.split("/")[0] not in _OWNED:
        return False
    match = re.search(r"/c/(\d+)/", key) or re.search(r"shard-(\d+)", key)
    shard = int(match.group(1)) if match else None
    return len(done) == num_shards or shard in done or shard is None or shard >= num_shards


def is_temporary(key: str) -> bool:
    """True for what a writer has not finished, or left when it died."""
    return key.rsplit("/", 1)[-1].startswith(TEMPORARY_PREFIX)
