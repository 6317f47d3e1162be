"""Open a dataset and hand it to other libraries. Each is imported when its method is called.

Workers of a torch DataLoader open files themselves, so fork, forkserver and spawn all work; on an object store, whose client
does not survive a fork, forkserver and spawn. Credentials of one come from the environment, as for writing.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

from brainsynth.errors import UserError
from brainsynth.reading.volumes import Volumes

RECIPE = ".recipe"
"""Of files that hold plan, manifest and bundle of a dataset instead of its volumes (docs/recipe.md)."""


class SyntheticDataset(Volumes):
    """The committed volumes of a dataset; rejected and failed rows are left out.

    `dataset[i]` is a dict: `image` float32 (X, Y, Z) in [0, 1] (for latents: the first array, (C, X, Y, Z)), `sample_id`,
    `affine` float64 (4, 4) voxel → world in mm (RAS+), and one entry per covariate (float or str; NaN or "" if missing).
    A slice, a list of numbers or a mask gives a list of such dicts. Of a dataset with label maps they also have `labels`,
    uint8 (X, Y, Z): 0 is background, the other integers are those of `label_table` (docs/labels.md).
    """

    def torch(
        self, patch: Sequence[int] | int | None = None, transform: Callable[[dict[str, Any]], Any] | None = None
    ) -> Any:
        """A `torch.utils.data.Dataset` of the same samples; `image` is a float32 tensor (1, X, Y, Z), `labels` a uint8 one.

        Args:
            patch: voxels of a random box (one number: a cube), another on each access; `start` then says where it lies,
                and `affine` is its own.
            transform: applied to each sample.
        """
        from brainsynth.reading.torch import TorchDataset

        return TorchDataset(self, patch, transform)

    def monai(self, transform: Callable[[Any], Any] | None = None, patch: Sequence[int] | int | None = None) -> Any:
        """A `monai.data.Dataset`: dicts with `image`, a MetaTensor (1, X, Y, Z) with the affine; then `transform`.

        Of a dataset with label maps also `label`, uint8 with the same affine; with `patch`, of the same box.
        """
        from brainsynth.reading.monai import monai_dataset

        return monai_dataset(self, transform, patch)

    def torchio(self, transform: Any = None) -> Any:
        """A `torchio.SubjectsDataset`; images are read when a subject's data is asked for. Needs torchio."""
        from brainsynth.reading.torchio import subjects_dataset

        return subjects_dataset(self, transform)

    def xarray(self, labels: bool = False) -> Any:
        """An `xarray.DataArray` (subject, x, y, z), lazy, with mm and covariates as coordinates. Needs xarray and dask.

        Args:
            labels: an `xarray.Dataset` of images and label maps (`dseg`, uint8) instead.
        """
        from brainsynth.reading.xarray import labelled_array, labelled_pair

        return labelled_pair(self) if labels else labelled_array(self)

    def _repr_html_(self) -> str:
        """What a notebook shows: slices of the first volumes, with their covariates."""
        from brainsynth.reading.html import dataset_html

        return dataset_html(self)


def open_dataset(
    uri: str,
    split: str | None = None,
    array: str | None = None,
    measured: str | bool = False,
    where: str | None = None,
    partial: bool = False,
    labels: bool = True,
    cache: str | None = None,
) -> SyntheticDataset:
    """Open a dataset (generated, prepared or latents) at a path, in a bucket (s3://, gs://, az://), or on a web server.

    Args:
        uri: the dataset's root folder: a path, `s3://…`, `gs://…`, `az://…`, `https://…`, or `hf://datasets/OWNER/NAME`.
            Or a file `….recipe`, whose volumes are made when they are first read.
        split: `train`, `validation` or `test`; all by default. A prepared cohort has its own, without `test`; of others, it
            follows from the subject's id (80, 10 and 10 %).
        array: which array; the first (`t1w`) by default.
        measured: also measured values that `brainsynth evaluate` published, in `.table`: True for the only table, or the
            start of one's digest.
        where: only subjects whose covariates fulfil it: `age > 60 and sex == 'F'`; of a dataset with label maps also whose
            volumes of structures in ml do: `label_volume_ventricles > 40`.
        partial: of a dataset that is still being made, what is committed now.
        labels: False leaves the label maps of a dataset that has them unread: samples then have no `labels`.
        cache: a local folder that keeps what is read over the network, for this program and later ones.

    Raises:
        FileNotFoundError: there is no finished dataset at `uri`.
        ValueError: its manifest is damaged, or there is not exactly one such table of measured values.
        UserError: `where` is not a condition; an object store refuses access, has no such bucket or does not answer. A
            ValueError, too.
    """
    if str(uri).endswith(RECIPE):
        return _of_recipe(str(uri), cache, split=split, measured=measured, where=where, labels=labels)
    return SyntheticDataset(str(uri), split, array, measured, where, partial, labels, cache)


def _of_recipe(path: str, cache: str | None, **options: Any) -> SyntheticDataset:
    try:  # by its name: reading alone needs no networks
        stage = importlib.import_module("brainsynth.stages.recipe")
    except ModuleNotFoundError as error:
        raise UserError(
            f"{path} is a recipe: its volumes are made here, which needs {error.name}; pip install 'brainsynth[generate]'"
        ) from None
    opened: SyntheticDataset = stage.RecipeDataset(path, cache, **options)
    return opened


def open_input(uri: str, where: str, split: str | None = None, array: str | None = None) -> SyntheticDataset:
    """`open_dataset` for what a config names. Raises UserError, naming its key `where`, if it cannot be opened."""
    try:
        return open_dataset(uri, split=split, array=array)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"{where}: {error}") from None
