"""One volume, or some, in the file formats of others. Everything is written under a temporary name and then renamed.

Equal volumes give equal bytes: no file carries a time, a host or a user.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import tarfile
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import BloscCodec

from brainsynth.errors import UserError
from brainsynth.storage.filesystem import TEMPORARY_PREFIX, remove, sync
from brainsynth.volume import VolumeSpec

F32 = npt.NDArray[np.float32]
GZIP_LEVEL = 1
_OME_CHUNK = 64


def nifti_bytes(image: F32, volume: VolumeSpec, synthetic: bool) -> bytes:
    """(X, Y, Z) float32 → an uncompressed .nii: sform and qform are the affine (code 2, aligned), units mm."""
    nifti = nibabel.Nifti1Image(image, volume.affine)
    nifti.set_sform(volume.affine, code=2)
    nifti.set_qform(volume.affine, code=2)
    nifti.header.set_xyzt_units("mm")
    nifti.header["descrip"] = b"AI-generated, of no real person; brainsynth" if synthetic else b"brainsynth"
    nifti.header["cal_max"] = 1.0
    data: bytes = nifti.to_bytes()
    return data


def write_nifti(path: Path, image: F32, volume: VolumeSpec, synthetic: bool) -> None:
    """(X, Y, Z) float32 → .nii.gz, as `nifti_bytes` has it."""
    data = gzip.compress(nifti_bytes(image, volume, synthetic), GZIP_LEVEL, mtime=0)
    with whole(path) as temporary:
        temporary.write_bytes(data)
        sync(temporary)


def write_ome_zarr(path: Path, image: F32, volume: VolumeSpec, about: dict[str, Any]) -> None:
    """(X, Y, Z) float32 → an OME-Zarr 0.5 image: one level, axes z, y, x in mm, with scale and translation.

    0.5 has no orientation: the RAS+ affine of (x, y, z) and `about` are in `attributes.brainsynth`.
    """
    with whole(path) as temporary:
        group = zarr.open_group(str(temporary), mode="w", zarr_format=3)
        turned = np.ascontiguousarray(image.transpose(2, 1, 0))
        chunks = tuple(min(_OME_CHUNK, size) for size in turned.shape)
        array = group.create_array(
            "0",
            shape=turned.shape,
            chunks=chunks,
            shards=tuple(-(-size // chunk) * chunk for size, chunk in zip(turned.shape, chunks, strict=True)),
            dtype="float32",
            compressors=BloscCodec(typesize=4, cname="zstd", clevel=3, shuffle="shuffle"),
            dimension_names=("z", "y", "x"),
        )
        array[:] = turned
        axes = [{"name": name, "type": "space", "unit": "millimeter"} for name in "zyx"]
        placed = [
            {"type": "scale", "scale": [float(value) for value in volume.spacing_mm[::-1]]},
            {"type": "translation", "translation": [float(value) for value in volume.origin_mm[::-1]]},
        ]
        level = {"path": "0", "coordinateTransformations": placed}
        image_of = {"name": path.name.removesuffix(".ome.zarr"), "axes": axes, "datasets": [level]}
        group.attrs["ome"] = {"version": "0.5", "multiscales": [image_of]}
        group.attrs["brainsynth"] = {"affine": volume.affine.tolist(), "axes": "RAS+", **about}
        for file in temporary.rglob("*"):
            sync(file)


def write_tar(path: Path, samples: Iterable[tuple[str, npt.NDArray[Any], dict[str, Any]]]) -> None:
    """(id, array, facts) → a WebDataset shard: `id.t1w.npy` and `id.json` of each sample."""
    with whole(path) as temporary:
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
            for sample_id, image, facts in samples:
                buffer = io.BytesIO()
                np.save(buffer, image, allow_pickle=False)
                for name, data in (
                    (f"{sample_id}.t1w.npy", buffer.getvalue()),
                    (f"{sample_id}.json", json.dumps(facts, sort_keys=True).encode()),
                ):
                    member = tarfile.TarInfo(name)
                    member.size, member.mode = len(data), 0o644
                    tar.addfile(member, io.BytesIO(data))
        sync(temporary)


def tar_ids(path: Path) -> set[str]:
    """Ids of the samples in a shard that `write_tar` wrote."""
    with tarfile.open(path) as tar:
        return {name.removesuffix(".json") for name in tar.getnames() if name.endswith(".json")}


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that becomes `path` when all went well, and is removed otherwise."""
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.rename(temporary, path)
        sync(path.parent)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; mend the space or permissions, and the same command resumes"
        ) from error
    finally:
        remove(temporary)
