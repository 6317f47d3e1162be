"""`brainsynth release`: a folder to publish, of a dataset that verify and the audit pass (docs/publication.md)."""

from __future__ import annotations

import argparse
from typing import Any

from brainsynth.config.load import load_config
from brainsynth.config.release import ReleaseConfig


def add_release_verb(verbs: Any) -> None:
    """Its parser."""
    release = verbs.add_parser(
        "release", help="data, cards, Croissant, RO-Crate and checksums of a dataset that passed"
    )
    release.add_argument(
        "--config", required=True, metavar="FILE", help="YAML; its keys are in brainsynth/config/release.py"
    )
    release.add_argument("--set", action="append", default=[], metavar="KEY.SUB=VALUE", help="override one key")
    release.add_argument("--dry-run", action="store_true", help="check what can be checked without reading the data")
    release.set_defaults(run=_release)


def _release(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config, ReleaseConfig, arguments.set)
    from brainsynth.stages.release import describe_release, make_release

    if arguments.dry_run:
        print(describe_release(config))
        return 0
    done = make_release(config)
    print(
        f"{config.output}: {done.files} files, {done.size_bytes / 1e6:.1f} MB; check them with `sha256sum -c SHA256SUMS`"
    )
    return 0
