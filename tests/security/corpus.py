"""The malicious files, and for each the way by which a user would meet it.

A case builds its file below a folder that is its own, feeds it to the entry point, and says what came of it. A refusal
is an exception of the kinds that the entry point documents, or its documented way to pass a thing over.
"""

from __future__ import annotations

import bz2
import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from brainsynth import open_dataset
from brainsynth.bundle.spec import BUNDLE_FILE, DIFFUSION_FILE
from brainsynth.cohort.scan import ScanRejected, load_scan
from brainsynth.config.load import load_config
from brainsynth.config.schema import GenerateConfig
from brainsynth.errors import UserError
from brainsynth.storage.cells import read_cells
from brainsynth.storage.filesystem import open_store
from brainsynth.storage.verify import verify_dataset
from tests.conftest import GRID
from tests.security import payloads
from tests.security.material import nifti, reseal, sealed, small_state, write_small_dataset, zipped_zeros
from tests.storage.conftest import SCHEMA


@dataclass(frozen=True)
class Place:
    """Where a case may work: its own folder, the flag that no one may make, and a whole bundle to copy."""

    folder: Path
    flag: Path
    bundle: Path


Case = Callable[[Place], str]


class Accepted(AssertionError):
    """A malicious file went through."""


# Weights --------------------------------------------------------------------------------------------------------------


def _weights(data: Callable[[Place], bytes]) -> Case:
    """As the diffusion weights of a bundle whose record names them with the right digest."""

    def case(place: Place) -> str:
        import torch

        from brainsynth.bundle.files import read_bundle
        from brainsynth.models.loading import load_models

        folder = place.folder / "bundle"
        shutil.copytree(place.bundle, folder)
        content = data(place)
        (folder / DIFFUSION_FILE).write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        reseal(folder / BUNDLE_FILE, lambda body: body["weights"].update({DIFFUSION_FILE: digest}))
        try:
            load_models(folder, read_bundle(folder), torch.device("cpu"))
        except UserError as error:
            return str(error)
        raise Accepted

    return case


def _header(entry: dict[str, object]) -> bytes:
    return json.dumps({"weight": entry}).encode()


WEIGHTS: dict[str, Case] = {
    "pickle": _weights(lambda p: payloads.pickled(p.flag)),
    "torch-zip": _weights(lambda p: payloads.torch_saved(p.flag, True)),
    "torch-old": _weights(lambda p: payloads.torch_saved(p.flag, False)),
    "npy": _weights(lambda p: payloads.npy(p.flag)),
    "npz": _weights(lambda p: payloads.npz(p.flag)),
    "zip-slip": _weights(lambda p: payloads.slippery_zip("slipped")),
    "tar-link": _weights(lambda p: payloads.linked_tar("slipped")),
    "header-of-exabytes": _weights(lambda p: payloads.safetensors(b"{}", 2**63 - 1)),
    "header-beyond-the-file": _weights(lambda p: payloads.safetensors(b"{}", 90_000_000)),
    "header-depth-bomb": _weights(lambda p: payloads.safetensors(b'{"a":' * 100_000)),
    "header-with-pickle": _weights(lambda p: payloads.safetensors(payloads.pickled(p.flag))),
    "offsets-beyond-the-file": _weights(
        lambda p: payloads.safetensors(_header({"dtype": "F32", "shape": [250_000_000], "data_offsets": [0, 10**9]}))
    ),
    "shape-that-overflows": _weights(
        lambda p: payloads.safetensors(
            _header({"dtype": "F32", "shape": [2**62, 8], "data_offsets": [0, 8]}), data=bytes(8)
        )
    ),
    "dtype-object": _weights(
        lambda p: payloads.safetensors(_header({"dtype": "O", "shape": [1], "data_offsets": [0, 8]}), data=bytes(8))
    ),
}


# Bundles and checkpoints ----------------------------------------------------------------------------------------------


def _bundle_record(data: Callable[[Place], bytes]) -> Case:
    def case(place: Place) -> str:
        from brainsynth.bundle.files import read_bundle

        folder = place.folder / "bundle"
        shutil.copytree(place.bundle, folder)
        (folder / BUNDLE_FILE).write_bytes(data(place))
        try:
            read_bundle(folder)
        except UserError as error:
            return str(error)
        raise Accepted

    return case


def _monai_folder(place: Place) -> str:
    """The folder layout of a MONAI bundle."""
    from brainsynth.bundle.files import read_bundle

    for name, data in {
        "configs/inference.json": json.dumps(payloads.monai_config(place.flag)).encode(),
        "configs/metadata.json": b"{}",
        "models/model.pt": payloads.torch_saved(place.flag, True),
    }.items():
        (place.folder / name).parent.mkdir(exist_ok=True)
        (place.folder / name).write_bytes(data)
    try:
        read_bundle(place.folder)
    except UserError as error:
        return str(error)
    raise Accepted


def _architecture_by_name(place: Place) -> bytes:
    body = json.loads((place.bundle / BUNDLE_FILE).read_bytes())["record"]
    body["autoencoder"] |= payloads.monai_config(place.flag)["network"]
    return sealed(body)


def _checkpoint(files: Callable[[Place], dict[str, bytes]]) -> Case:
    """As the newest checkpoint of a training: it is passed over, and the training starts anew."""

    def case(place: Place) -> str:
        from brainsynth.training.checkpoint import restore_newest

        step = place.folder / "checkpoints" / "step-000009"
        step.mkdir(parents=True)
        for name, data in files(place).items():
            (step / name).write_bytes(data)
        try:
            steps = restore_newest(place.folder, small_state(), "config")
        except UserError as error:
            return str(error)
        if steps:
            raise Accepted
        return "passed over"

    return case


def _named_by_record(tensors: bytes) -> dict[str, bytes]:
    record = {
        "step": 9,
        "config_digest": "config",
        "tensors_sha256": hashlib.sha256(tensors).hexdigest(),
        "ema_updates": {"net": 1},
        "optimizer_groups": {"net": [{"lr": 1.0, "params": [0, 1]}]},
    }
    return {"checkpoint.json": sealed(record), "tensors.safetensors": tensors}


BUNDLES: dict[str, Case] = {
    "pickle": _bundle_record(lambda p: payloads.pickled(p.flag)),
    "depth-bomb": _bundle_record(lambda p: payloads.deep_json()),
    "wide-bomb": _bundle_record(lambda p: b'{"sha256": "0", "record": [' + b"[]," * 6_000_000 + b"0]}"),
    "monai-config": _bundle_record(lambda p: json.dumps(payloads.monai_config(p.flag)).encode()),
    "monai-config-sealed": _bundle_record(lambda p: sealed(payloads.monai_config(p.flag))),
    "target-in-the-architecture": _bundle_record(_architecture_by_name),
    "yaml": _bundle_record(lambda p: payloads.yaml_object(p.flag).encode()),
    "monai-folder": _monai_folder,
}
CHECKPOINTS: dict[str, Case] = {
    "dcp-metadata": _checkpoint(lambda p: {".metadata": payloads.pickled(p.flag), "__0_0.distcp": b""}),
    "record-is-a-pickle": _checkpoint(lambda p: {"checkpoint.json": payloads.pickled(p.flag)}),
    "record-depth-bomb": _checkpoint(lambda p: {"checkpoint.json": payloads.deep_json()}),
    "tensors-are-a-pickle": _checkpoint(lambda p: _named_by_record(payloads.pickled(p.flag))),
    "tensors-are-torch": _checkpoint(lambda p: _named_by_record(payloads.torch_saved(p.flag, True))),
    "tensors-lie": _checkpoint(lambda p: _named_by_record(payloads.safetensors(b"{}", 2**62))),
    "pt-file": _checkpoint(lambda p: {"checkpoint.pt": payloads.torch_saved(p.flag, True)}),
}


# Configs and tables ---------------------------------------------------------------------------------------------------


def _config(text: Callable[[Place], str], *overrides: str) -> Case:
    def case(place: Place) -> str:
        (place.folder / "config.yaml").write_text(text(place))
        try:
            load_config(place.folder / "config.yaml", GenerateConfig, overrides)
        except UserError as error:
            return str(error)
        raise Accepted

    return case


CONFIGS: dict[str, Case] = {
    "object": _config(lambda p: payloads.yaml_object(p.flag)),
    "module": _config(lambda p: "output: !!python/name:os.system\n"),
    "alias-bomb": _config(lambda p: payloads.yaml_bomb()),
    "depth-bomb": _config(lambda p: "bundle: " + "[" * 200_000),
    "deep-blocks": _config(lambda p: "".join(f"{' ' * depth}a:\n" for depth in range(500))),
    "word-bomb": _config(lambda p: "a: [" + "1, " * 80_000 + "1]"),
    "number-bomb": _config(lambda p: "base_seed: 0x" + "9" * 200_000),
    "sixties-bomb": _config(lambda p: "base_seed: 1" + ":1" * 100_000),
    "size-bomb": _config(lambda p: "# " + "x" * (8 << 20)),
    "target": _config(lambda p: json.dumps(payloads.monai_config(p.flag))),
    "override": _config(lambda p: "output: here\n", "output=!!python/object/apply:os.getcwd []"),
}


def _table(name: str, data: Callable[[Place], bytes]) -> Case:
    """As the covariates of the rows to generate."""

    def case(place: Place) -> str:
        import ray.data  # noqa: F401  it teaches pyarrow its own extension types

        path = place.folder / name
        path.write_bytes(data(place))
        try:
            SCHEMA.validate(read_cells(str(path), "covariates.table"), str(path), allow_out_of_range=True)
        except UserError as error:
            return str(error)
        raise Accepted

    return case


def _pickled_column(place: Place) -> pa.Array:
    return pa.array([payloads.pickled(place.flag)] * 3, pa.binary())


def _extension(name: bytes, payload: Callable[[Place], bytes] = lambda p: b"") -> Case:
    return _table(
        "rows.parquet",
        lambda p: payloads.parquet(
            _pickled_column(p), {b"ARROW:extension:name": name, b"ARROW:extension:metadata": payload(p)}
        ),
    )


TABLES: dict[str, Case] = {
    "pickled-column": _table("rows.parquet", lambda p: payloads.parquet(_pickled_column(p), {})),
    "ray-objects": _extension(b"ray.data.arrow_pickled_object"),
    "ray-tensors": _extension(b"ray.data.arrow_tensor", lambda p: payloads.pickled(p.flag)),
    "ray-tensors-2": _extension(b"ray.data.arrow_tensor_v2", lambda p: payloads.pickled(p.flag)),
    "python-type": _extension(b"arrow.py_extension_type", lambda p: payloads.pickled(p.flag)),
    "pickle-as-parquet": _table("rows.parquet", lambda p: payloads.pickled(p.flag)),
    "pickle-as-csv": _table("rows.csv", lambda p: payloads.pickled(p.flag)),
    "pickle": _table("rows.pkl", lambda p: payloads.pickled(p.flag)),
    "pickle-in-gzip": _table("rows.pkl.gz", lambda p: payloads.pickled(p.flag)),
    "feather": _table("rows.feather", lambda p: payloads.pickled(p.flag)),
}


# Scans ----------------------------------------------------------------------------------------------------------------


def scan(data: Callable[[Place], bytes], name: str = "scan.nii.gz") -> Case:
    """As a scan of a cohort, and as the mask of one."""

    def case(place: Place) -> str:
        path = place.folder / name
        path.write_bytes(data(place))
        (place.folder / "good.nii").write_bytes(nifti())
        reasons = []
        for image, mask in ((path, ""), (place.folder / "good.nii", str(path))):
            try:
                load_scan(str(image), mask, GRID, "world", 512)
            except ScanRejected as rejected:
                reasons.append(str(rejected))
        if len(reasons) < 2:
            raise Accepted
        return reasons[0]

    return case


def _mgh(shape: tuple[int, ...]) -> bytes:
    return b"".join(n.to_bytes(4, "big") for n in (1, *shape, 1, 0)) + bytes(400)


def _billion_laughs() -> bytes:
    entities = "".join(f'<!ENTITY a{i + 1} "{f"&a{i};" * 10}">' for i in range(9))
    return f'<?xml version="1.0"?><!DOCTYPE GIFTI [<!ENTITY a0 "x">{entities}]><GIFTI>&a9;</GIFTI>'.encode()


BOMBS: dict[str, Case] = {
    "eight-gigavoxels-in-448-bytes": scan(lambda p: nifti((2000, 2000, 2000), vox_offset=352)[:448], "s.nii"),
    "declares-1000-cubed": scan(lambda p: nifti((1000, 1000, 1000)), "s.nii"),
    "declares-500-cubed": scan(lambda p: nifti((500, 500, 500)), "s.nii"),
    "declares-512-cubed-in-gzip": scan(lambda p: zipped_zeros(8, nifti((512, 512, 512)))),
    "256-mib-of-zeros-as-declared": scan(lambda p: zipped_zeros(264, nifti((512, 512, 512)))),
    "1-gib-of-zeros-after-a-small-scan": scan(lambda p: zipped_zeros(1024, nifti())),
    "1-gib-of-zeros-and-no-header": scan(lambda p: zipped_zeros(1024)),
    "zeros-before-the-voxels": scan(lambda p: zipped_zeros(1024, nifti(vox_offset=2.0**30)[:352])),
    "bzip2": scan(lambda p: bz2.compress(nifti()) + bz2.compress(bytes(8 << 20)) * 32, "s.nii.bz2"),
    "extension-of-gigabytes": scan(
        lambda p: zipped_zeros(1024, _with_extension(2**31 - 16, 6, vox_offset=2.0**31, body=b""))
    ),
    "mgh-of-terabytes": scan(lambda p: _mgh((100_000, 100_000, 1000)), "s.mgh"),
    "billion-laughs": scan(lambda p: _billion_laughs(), "s.gii"),
}


def _with_extension(size: int, code: int, vox_offset: float, body: bytes) -> bytes:
    head = bytearray(nifti(vox_offset=vox_offset)[:352])
    head[348] = 1
    return bytes(head) + size.to_bytes(4, "little") + code.to_bytes(4, "little") + body


SCANS: dict[str, Case] = {
    "negative-dimensions": scan(lambda p: nifti((-20, 26, 20)), "s.nii"),
    "zero-dimensions": scan(lambda p: nifti((0, 26, 20)), "s.nii"),
    "nan-affine": scan(lambda p: nifti(srow_x=[np.nan] * 4), "s.nii"),
    "infinite-scale": scan(lambda p: nifti(scl_slope=np.inf), "s.nii"),
    "infinite-intercept": scan(lambda p: nifti(scl_slope=1, scl_inter=np.inf), "s.nii"),
    "no-such-type": scan(lambda p: nifti(datatype=9999), "s.nii"),
    "type-of-1-bit": scan(lambda p: nifti(datatype=1), "s.nii"),
    "nan-offset": scan(lambda p: nifti(vox_offset=np.nan), "s.nii"),
    "negative-offset": scan(lambda p: nifti(vox_offset=-352), "s.nii"),
    "npy": scan(lambda p: payloads.npy(p.flag)),
    "pickle": scan(lambda p: payloads.pickled(p.flag), "s.nii"),
    "torch": scan(lambda p: payloads.torch_saved(p.flag, True), "s.nii"),
    "zip-slip": scan(lambda p: payloads.slippery_zip("slipped")),
    "tar-link": scan(lambda p: payloads.linked_tar("slipped")),
    "hdf5": scan(lambda p: b"\x89HDF\r\n\x1a\n" + bytes(4096), "s.mnc"),
}


# Datasets -------------------------------------------------------------------------------------------------------------


def _opened(change: Callable[[Path, Place], None]) -> Case:
    """A dataset from elsewhere is opened, and its first volume read."""

    def case(place: Place) -> str:
        root = write_small_dataset(place.folder / "dataset")
        change(root, place)
        try:
            open_dataset(str(root))[0]
        except (ValueError, FileNotFoundError) as error:
            return str(error)
        raise Accepted

    return case


def _verified(change: Callable[[Path, Place], None]) -> Case:
    """A dataset from elsewhere is verified."""

    def case(place: Place) -> str:
        root = write_small_dataset(place.folder / "dataset")
        change(root, place)
        try:
            report = verify_dataset(open_store(str(root)))
        except UserError as error:
            return str(error)
        if report.ok:
            raise Accepted
        return report.summary()

    return case


def _v2(compressor: dict[str, str] | None, filters: list[dict[str, str]] | None) -> Callable[[Path, Place], None]:
    """The array as Zarr v2, of pickled objects."""

    def change(root: Path, place: Place) -> None:
        folder = root / "dataset.zarr" / "t1w"
        shutil.rmtree(folder)
        folder.mkdir()
        metadata = {"zarr_format": 2, "shape": [7, 4, 5, 6], "chunks": [1, 4, 5, 6], "dtype": "|O", "order": "C"}
        metadata |= {"fill_value": None, "compressor": compressor, "filters": filters}  # type: ignore[dict-item]
        (folder / ".zarray").write_text(json.dumps(metadata))
        (folder / "0.0.0.0").write_bytes(pickle.dumps([payloads.Trap(place.flag)] * 120))  # noqa: S104  no address

    return change


def _metadata(**fields: object) -> Callable[[Path, Place], None]:
    def change(root: Path, place: Place) -> None:
        file = root / "dataset.zarr" / "t1w" / "zarr.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))
        shard = root / "dataset.zarr" / "t1w" / "c" / "0" / "0" / "0" / "0"
        shard.write_bytes(payloads.pickled(place.flag))

    return change


def _file(name: str, data: Callable[[Place], bytes]) -> Callable[[Path, Place], None]:
    return lambda root, place: (root / name).write_bytes(data(place)) and None


_PICKLE_CODEC = {"name": "numcodecs.pickle", "configuration": {}}
_GRID_OF_ONE = {"name": "regular", "configuration": {"chunk_shape": [7, 60_000, 60_000, 60_000]}}
DATASETS: dict[str, Case] = {
    "zarr-v2-pickle-filter": _opened(_v2(None, [{"id": "pickle"}])),
    "zarr-v2-pickle-compressor": _opened(_v2({"id": "pickle"}, None)),
    "zarr-v3-pickle-codec": _opened(_metadata(codecs=[_PICKLE_CODEC])),
    "zarr-v3-unknown-codec": _opened(_metadata(codecs=[{"name": "os.system", "configuration": {"command": "true"}}])),
    "zarr-v3-object-type": _opened(_metadata(data_type={"name": "numpy.object", "configuration": {}})),
    "zarr-v3-of-terabytes": _opened(_metadata(shape=[7, 60_000, 60_000, 60_000], chunk_grid=_GRID_OF_ONE)),
    "zarr-metadata-depth-bomb": _opened(_file("dataset.zarr/t1w/zarr.json", lambda p: payloads.deep_json())),
    "zarr-metadata-pickle": _opened(_file("dataset.zarr/t1w/zarr.json", lambda p: payloads.pickled(p.flag))),
    "manifest-depth-bomb": _opened(_file("dataset.json", lambda p: payloads.deep_json())),
    "manifest-pickle": _opened(_file("dataset.json", lambda p: payloads.pickled(p.flag))),
    "manifest-is-a-list": _opened(_file("dataset.json", lambda p: sealed([1]))),
    "verify-manifest-depth-bomb": _verified(_file("dataset.json", lambda p: payloads.deep_json())),
    "verify-plan-depth-bomb": _verified(_file("plan.json", lambda p: payloads.deep_json())),
    "verify-plan-pickle": _verified(_file("plan.json", lambda p: payloads.pickled(p.flag))),
    "verify-commit-depth-bomb": _verified(_file("commits/shard-000001.json", lambda p: payloads.deep_json())),
    "verify-commit-pickle": _verified(_file("commits/shard-000001.json", lambda p: payloads.pickled(p.flag))),
    "verify-shard-pickle": _verified(_file("dataset.zarr/t1w/c/0/0/0/0", lambda p: payloads.pickled(p.flag))),
    "verify-samples-pickle": _verified(_file("samples.parquet", lambda p: payloads.pickled(p.flag))),
    "verify-zarr-v2": _verified(_v2({"id": "pickle"}, None)),
}

CORPUS: dict[str, Case] = {
    f"{kind}/{name}": case
    for kind, cases in {
        "weights": WEIGHTS,
        "bundle": BUNDLES,
        "checkpoint": CHECKPOINTS,
        "config": CONFIGS,
        "table": TABLES,
        "bomb": BOMBS,
        "scan": SCANS,
        "dataset": DATASETS,
    }.items()
    for name, case in cases.items()
}


def flags_below(folder: Path) -> list[str]:
    """Flags that were made anywhere below a folder."""
    return [os.path.join(at, name) for at, names, _ in os.walk(folder) for name in names if name.startswith("flag")]
