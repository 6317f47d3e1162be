"""`brainsynth gc`: remove what dead attempts left."""

from __future__ import annotations

import argparse

from brainsynth.storage.filesystem import open_store, resolve_uri
from brainsynth.storage.repair import garbage


def command(arguments: argparse.Namespace) -> int:
    """Removes, or with --dry-run lists, every object that no commit record refers to."""
    store = open_store(resolve_uri(arguments.uri, "uri"))
    keys = garbage(store)
    for key in keys:
        print(f"{'would remove' if arguments.dry_run else 'removed'} {key}")
        if not arguments.dry_run:
            store.delete(key)
    print(f"{len(keys)} objects that no commit record refers to")
    return 0
