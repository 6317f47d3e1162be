"""Which keys of a dataset no commit record can come to refer to. `brainsynth gc` removes them; verify only names them."""

from __future__ import annotations

import re
from pathlib import Path

from brainsynth.storage import attempts
from brainsynth.storage.arrays import GROUP
from brainsynth.storage.whole_file import TEMPORARY_PREFIX

COMMITS, REPAIRS = "commits", "repairs"
_OF_DESKTOP = re.compile(
    r"\._.*|\.DS_Store|\.localized|Icon\r|\.(Spotlight-V100|Trashes|fseventsd|TemporaryItems|DocumentRevisions-V100)"
    r"|\.apdisk|__MACOSX|Thumbs\.db(:encryptable)?|ehthumbs(_vista)?\.db|[Dd]esktop\.ini|\$RECYCLE\.BIN"
    r"|System Volume Information|\.directory|\.Trash-\d+|\.nfs[0-9a-f]{16,}|@eaDir|\.snapshot|lost\+found",
)
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


def is_of_desktop(key: str) -> bool:
    """True for what macOS, Windows, Linux desktops and file servers leave in folders that they show: it is harmless."""
    return any(_OF_DESKTOP.fullmatch(part) for part in key.split("/"))


def only_of_desktop(folder: Path) -> list[str]:
    """Such names in a folder that holds nothing else; [] of one that holds more, or nothing."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return names if all(map(is_of_desktop, names)) else []


def is_temporary(key: str) -> bool:
    """True for what a writer has not finished, or left when it died."""
    return key.rsplit("/", 1)[-1].startswith(TEMPORARY_PREFIX)
