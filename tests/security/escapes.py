"""Names, keys and links that lead out of a folder, and for each the way by which one would get there.

Every case works in `outer/root`. It must neither make, change nor open anything else below `outer`, and must end in a
refusal, or do its work inside.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from brainsynth import open_dataset
from brainsynth.bundle.spec import BUNDLE_FILE, DIFFUSION_FILE
from brainsynth.cohort.prepare import cohort_samples
from brainsynth.cohort.source import read_source
from brainsynth.config.schema import PrepareConfig, SourceConfig
from brainsynth.errors import UserError
from brainsynth.storage.commit import write_plan
from brainsynth.storage.filesystem import open_store
from brainsynth.storage.verify import verify_dataset
from tests.conftest import GRID
from tests.security.material import nifti, reseal, small_state, write_small_dataset
from tests.storage.conftest import SCHEMA, commit, tiny_plan

SECRET = b"nobody may read this\n"
Case = Callable[[Path, Path], str]
"""(root, a whole bundle) → what came of it."""

NAMES = {
    "parent": "../secret",
    "grandparent": "../../secret",
    "in-and-out": "a/../../secret",
    "absolute": "{outer}/secret",
    "two-slashes": "/{outer}/secret",
    "dots": "..",
    "null": "../secret\0.json",
    "backslash": "..\\secret",
    "drive": "C:\\secret",
    "escaped": "%2e%2e/secret",
    "escaped-twice": "%252e%252e%252fsecret",
    "newline": "../secret\n",
    "late": "manifest/../../secret",
    "dot-folder": "./../secret",
}
# These only look like dots, or like a home: they are names of their own inside the folder.
LOOKALIKES = {"wide-dots": "．．/secret", "one-leader": "‥/secret", "home": "~/secret", "override": "\u202e../secret"}


class Escaped(AssertionError):
    """Something went through that should not have."""


class Watch:
    """What was opened below one folder but outside another, by Python code, while a block ran."""

    _active: Watch | None = None
    _installed = False

    def __init__(self, outer: Path, root: Path, allowed: tuple[Path, ...] = ()) -> None:
        self.outer, self.allowed = str(outer.resolve()), tuple(str(p.resolve()) for p in (root, *allowed))
        self.opened: list[str] = []

    def __enter__(self) -> Watch:
        if not Watch._installed:  # an audit hook stays for the life of the process
            sys.addaudithook(_hear)
            Watch._installed = True
        self.before = self._tree()
        self._around, Watch._active = Watch._active, self
        return self

    def __exit__(self, *_: object) -> None:
        Watch._active = self._around
        self.changed = sorted(set(self._tree().items()) ^ set(self.before.items()))

    def hear(self, path: object) -> None:
        if self._around is not None:
            self._around.hear(path)
        with contextlib.suppress(ValueError, TypeError, OSError):
            real = os.path.realpath(os.fsdecode(path))  # type: ignore[arg-type]
            if real.startswith(self.outer + os.sep) and not real.startswith(tuple(a + os.sep for a in self.allowed)):
                self.opened.append(real)

    def _tree(self) -> dict[str, tuple[int, int]]:
        found = {}
        for at, folders, files in os.walk(self.outer):
            folders[:] = [f for f in folders if os.path.join(at, f) not in self.allowed]
            for name in files:
                status = os.lstat(os.path.join(at, name))
                found[os.path.join(at, name)] = (status.st_mtime_ns, status.st_size)
        return found


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    # A number is a descriptor that was opened before, by its name.
    if Watch._active is not None and event == "open" and not isinstance(arguments[0], int | None):
        Watch._active.hear(arguments[0])


@contextlib.contextmanager
def outside(tmp: Path) -> Iterator[Path]:
    """`outer/root`, beside a secret file and a folder with one."""
    outer = tmp / "outer"
    root = outer / "root"
    root.mkdir(parents=True)
    for place in (outer, tmp):
        (place / "secret").write_bytes(SECRET)
    with open(outer / "vast", "wb") as vast:  # a hole: no room on the disk, and much in memory if it is read
        vast.truncate(1 << 30)
    (outer / "elsewhere").mkdir()
    (outer / "elsewhere" / "secret").write_bytes(SECRET)
    yield root


def _spell(name: str, root: Path) -> str:
    return name.replace("{outer}", str(root.parent))


def _refused(act: Callable[[], object]) -> str:
    try:
        result = act()
    except (UserError, FileNotFoundError, ValueError) as error:
        if SECRET.decode().strip() in str(error):
            raise Escaped("the refusal shows the secret") from None
        return str(error)
    raise Escaped(repr(result)[:200])


def _key(name: str) -> Case:
    """As the key of an object of a store: read, written, put if absent, deleted."""

    def case(root: Path, bundle: Path) -> str:
        store, key = open_store(str(root)), _spell(name, root)
        acts: list[Callable[[], object]] = [
            lambda: store.read(key),
            lambda: store.write(key, b"x"),
            lambda: store.write_new(key, b"x"),
            lambda: store.delete(key),
        ]
        told = [_refused(act) for act in acts]
        return told[0]

    return case


def _inside_key(name: str) -> Case:
    """A key that only looks like one of those is an object inside, or is refused."""

    def case(root: Path, bundle: Path) -> str:
        store = open_store(str(root))
        with contextlib.suppress(UserError):
            store.write(name, b"x")
            assert store.read(name) == b"x"
        return "inside"

    return case


def _sample_id(name: str) -> Case:
    """As the sample_id of a row to generate."""

    def case(root: Path, bundle: Path) -> str:
        from brainsynth.plan import generation_samples

        rows = pd.DataFrame({"sample_id": [_spell(name, root)], "age": [50.0], "sex": ["F"]})
        return _refused(lambda: generation_samples(rows, SCHEMA, 0, SCHEMA.out_of_range(rows)))

    return case


def _subject(name: str) -> Case:
    """As the participant of a BIDS folder that has a scan of that name outside; its own scan is not there."""

    def case(root: Path, bundle: Path) -> str:
        bids = root / "bids"
        (bids / "sub-x").mkdir(parents=True)
        spelt = _spell(name, root)
        if "\0" in spelt or "\n" in spelt:
            spelt = spelt.replace("\0", "").replace("\n", "")
        for label in (spelt, f"sub-x/../../{spelt}"):
            anat = root.parent / "secret-scans" / "anat"
            anat.mkdir(parents=True, exist_ok=True)
            (anat / "a_T1w.nii").write_bytes(nifti())
            label = label.replace("secret", "secret-scans")
            pd.DataFrame({"participant_id": [label], "age": [50.0], "sex": ["F"]}).to_csv(
                bids / "participants.tsv", sep="\t", index=False
            )
            config = PrepareConfig(
                source=SourceConfig(path=str(bids)), output=str(root / "cohort"), covariates=SCHEMA, volume=GRID
            )
            with contextlib.suppress(UserError):
                samples = cohort_samples(read_source(config.source), config)
                if any(samples["image"].astype(bool)) or not all(s.isalnum() for s in samples["sample_id"]):
                    raise Escaped(str(samples.iloc[0].to_dict()))
        return "no scan"

    return case


def _array_name(name: str) -> Case:
    """As the name of an array in plan.json and dataset.json, and as what a reader is asked for."""

    def case(root: Path, bundle: Path) -> str:
        data, spelt = write_small_dataset(root / "data"), _spell(name, root)
        _refused(lambda: open_dataset(str(data), array=spelt)[0])
        reseal(data / "dataset.json", lambda body: body.update(arrays=[spelt]))
        _refused(lambda: open_dataset(str(data))[0])
        reseal(data / "plan.json", lambda body: body["arrays"][0].update(name=spelt))
        return _refused(lambda: verify_dataset(open_store(str(data))))

    return case


def _not_ok(data: Path) -> str:
    def act() -> None:
        report = verify_dataset(open_store(str(data)))
        if not report.ok:
            raise UserError(report.summary())

    return _refused(act)


def _named_file(name: str) -> Case:
    """As a table that dataset.json names, with the secret's digest: verify must not even look."""

    def case(root: Path, bundle: Path) -> str:
        import hashlib

        data = write_small_dataset(root / "data")
        digest = hashlib.sha256(SECRET).hexdigest()
        reseal(data / "dataset.json", lambda body: body["files"].update({_spell(name, data): digest}))
        return _not_ok(data)

    return case


def _object_key(name: str) -> Case:
    """As the key of a shard's object in its commit record."""

    def case(root: Path, bundle: Path) -> str:
        data = write_small_dataset(root / "data")
        change = lambda body: body["objects"][0].update(key=_spell(name, data))  # noqa: E731
        reseal(data / "commits" / "shard-000000.json", change)
        return _not_ok(data)

    return case


def _weights_name(name: str) -> Case:
    """As the name of a bundle's weight file."""

    def case(root: Path, bundle: Path) -> str:
        import hashlib

        from brainsynth.bundle.files import check_bundle_files, read_bundle

        folder = root / "bundle"
        shutil.copytree(bundle, folder)
        digest = hashlib.sha256(SECRET).hexdigest()
        reseal(folder / BUNDLE_FILE, lambda body: body["weights"].update({_spell(name, folder): digest}))
        return _refused(lambda: check_bundle_files(folder, read_bundle(folder)))

    return case


def _link(path: Path, target: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def _linked_dataset(key: str, target: str, reader: bool) -> Case:
    """A dataset of which one file or folder is a link that leads out."""

    def case(root: Path, bundle: Path) -> str:
        data = write_small_dataset(root / "data")
        copy = root.parent / "elsewhere" / "copy"
        if target == "copy":  # the true content, but outside
            copied = shutil.copytree if (data / key).is_dir() else shutil.copy
            copied(data / key, copy)
        _link(data / key, copy if target == "copy" else root.parent / target)
        with Watch(root.parent, root) as watch:
            found = _refused(lambda: open_dataset(str(data))[0]) if reader else _not_ok(data)
        if watch.opened:
            raise Escaped(str(watch.opened))
        return found

    return case


def _written_through(key: str) -> Case:
    """A folder to write a dataset into, in which a part is a link that leads out."""

    def case(root: Path, bundle: Path) -> str:
        plan, samples = tiny_plan()
        store = open_store(str(root / "data"))
        if key == "commits":
            write_plan(store, plan, samples)
        (root / "data").mkdir(exist_ok=True)
        _link(root / "data" / key, root.parent / "elsewhere")

        def act() -> None:
            write_plan(store, plan, samples)
            commit(store, plan, samples, 0)

        return _refused(act)

    return case


def _linked_bundle(name: str) -> Case:
    def case(root: Path, bundle: Path) -> str:
        from brainsynth.bundle.files import check_bundle_files, read_bundle

        folder = root / "bundle"
        shutil.copytree(bundle, folder)
        shutil.copy(folder / name, root.parent / "elsewhere" / name)
        _link(folder / name, root.parent / "elsewhere" / name)
        with Watch(root.parent, root) as watch:
            found = _refused(lambda: check_bundle_files(folder, read_bundle(folder)))
        if watch.opened:
            raise Escaped(str(watch.opened))
        return found

    return case


def _linked_checkpoint(root: Path, bundle: Path) -> str:
    from brainsynth.training.checkpoint import restore_newest, save_checkpoint

    save_checkpoint(root.parent / "elsewhere", small_state(), 3, "config", 3)
    (root / "checkpoints").mkdir()
    _link(root / "checkpoints" / "step-000003", root.parent / "elsewhere" / "checkpoints" / "step-000003")
    with Watch(root.parent, root) as watch:
        if restore_newest(root, small_state(), "config") or watch.opened:
            raise Escaped
    return "passed over"


CASES: dict[str, Case] = {
    **{f"key/{k}": _key(v) for k, v in NAMES.items()},
    **{f"key/{k}": _inside_key(v) for k, v in LOOKALIKES.items()},
    **{f"sample-id/{k}": _sample_id(v) for k, v in {**NAMES, **LOOKALIKES}.items()},
    **{f"subject/{k}": _subject(v) for k, v in {**NAMES, **LOOKALIKES}.items()},
    **{f"array/{k}": _array_name(v) for k, v in NAMES.items()},
    **{f"named-file/{k}": _named_file(v) for k, v in NAMES.items()},
    **{f"object/{k}": _object_key(v) for k, v in NAMES.items()},
    **{f"weights/{k}": _weights_name(v) for k, v in NAMES.items()},
    "link/participants": _linked_dataset("participants.tsv", "copy", reader=True),
    "link/manifest": _linked_dataset("dataset.json", "copy", reader=True),
    "link/array": _linked_dataset("dataset.zarr/t1w", "copy", reader=True),
    "link/metadata": _linked_dataset("dataset.zarr/t1w/zarr.json", "copy", reader=True),
    "link/shard": _linked_dataset("dataset.zarr/t1w/c/0/0/0/0", "copy", reader=True),
    "link/vast": _linked_dataset("participants.tsv", "vast", reader=True),
    "link/verify-shard": _linked_dataset("dataset.zarr/t1w/c/0/0/0/0", "copy", reader=False),
    "link/verify-commits": _linked_dataset("commits", "copy", reader=False),
    "link/verify-plan": _linked_dataset("plan.json", "copy", reader=False),
    "link/verify-secret": _linked_dataset("participants.tsv", "secret", reader=False),
    "link/verify-vast": _linked_dataset("plan.json", "vast", reader=False),
    "link/write-commits": _written_through("commits"),
    "link/write-arrays": _written_through("dataset.zarr"),
    "link/bundle-record": _linked_bundle(BUNDLE_FILE),
    "link/bundle-weights": _linked_bundle(DIFFUSION_FILE),
    "link/checkpoint": _linked_checkpoint,
}


def attempt(case: Case, tmp: Path, bundle: Path) -> str:
    """Run a case; raises Escaped when anything beside its root was opened, made or changed."""
    with (
        outside(tmp) as root,
        Watch(tmp, root, allowed=(root.parent / "elsewhere", root.parent / "secret-scans")) as watch,
    ):
        result = case(root, bundle)
    secrets = [path for path in watch.opened if path.endswith("secret")]
    if secrets or watch.changed:
        raise Escaped(f"opened {secrets}, changed {watch.changed}")
    if sorted(p.name for p in (root.parent / "elsewhere").iterdir() if p.name.startswith(("shard-", "t1w", "zarr"))):
        raise Escaped("written through a link")
    return result
