"""The segmentation ruler: counting to a voxel, grids, flags, calibration, and real scans against reference volumes."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from scipy import ndimage

from brainsynth.config.evaluation import SegmentationConfig
from brainsynth.errors import UserError
from brainsynth.instruments.segmentation import (
    BRAIN,
    VENTRICLES,
    Calibration,
    SegmentationRuler,
    StructureVolumes,
    network_grid,
    structure_ml,
    table_line,
)
from brainsynth.metrics.agreement import agreement
from brainsynth.models.segmenter import STRUCTURES, Segmenter
from brainsynth.volume import VolumeSpec, resample

CPU = torch.device("cpu")
WHITE, CORTEX, LATERAL, THIRD = (
    STRUCTURES.index(n) for n in ("cerebral white matter", "cerebral cortex", "lateral ventricle", "3rd ventricle")
)
LEVELS = {0: 0.0, THIRD: 0.2, LATERAL: 0.4, CORTEX: 0.7, WHITE: 1.0}


class Bands:
    """Stands in for the network: the structure whose intensity is nearest."""

    def __init__(self, levels: dict[int, float] = LEVELS) -> None:
        self.levels = levels

    def labels(self, image: torch.Tensor) -> torch.Tensor:
        distance = torch.stack([(image - level).abs() for level in self.levels.values()])
        return torch.tensor(list(self.levels), dtype=torch.uint8)[distance.argmin(0)]


def grid(spacing: float = 1.0, shape: tuple[int, int, int] = (120, 130, 110)) -> VolumeSpec:
    return VolumeSpec(shape_xyz=shape, spacing_mm=(spacing,) * 3, origin_mm=(-60.5, 3.25, 17.0))


def boxes() -> np.ndarray:
    """White matter of 100 × 110 × 90 mm with a slab of cortex, a lateral and a third ventricle in it."""
    image = np.zeros((120, 130, 110), np.float32)
    image[10:110, 10:120, 10:100] = LEVELS[WHITE]
    image[10:110, 10:120, 10:30] = LEVELS[CORTEX]
    image[40:60, 50:81, 50:61] = LEVELS[LATERAL]
    image[70:75, 60:63, 50:57] = LEVELS[THIRD]
    return image


@pytest.fixture
def ruler() -> SegmentationRuler:
    return SegmentationRuler(segmenter=Bands())


def measured(ruler: SegmentationRuler, image: np.ndarray, on: VolumeSpec) -> StructureVolumes:
    return ruler.measure_labelled(image, on)[0]


def test_labels_are_counted_to_a_voxel() -> None:
    labels = np.zeros((9, 8, 7), np.uint8)
    labels[1:4, 2:5, 3:5] = 3
    labels[5:7, 0:1, 0:7] = 17
    found = structure_ml(labels, 0.008)
    assert set(found) == set(STRUCTURES[1:])
    assert found["lateral ventricle"] == pytest.approx(18 * 0.008, abs=1e-12)
    assert found["ventral DC"] == pytest.approx(14 * 0.008, abs=1e-12)
    assert sum(found.values()) == pytest.approx(32 * 0.008, abs=1e-12)
    with pytest.raises(ValueError, match="label 18"):
        structure_ml(np.full((2, 2, 2), 18, np.uint8), 1.0)


def test_every_structure_is_brain_or_ventricle_and_none_is_both() -> None:
    assert sorted([*BRAIN, *VENTRICLES]) == sorted(STRUCTURES[1:])


def test_boxes_are_measured_to_a_voxel(ruler: SegmentationRuler) -> None:
    found = measured(ruler, boxes(), grid())
    assert found.flags == ("landmarks missing",)
    lateral, third = 20 * 31 * 11, 5 * 3 * 7
    assert found.ml["lateral ventricle"] * 1000 == pytest.approx(lateral, abs=1e-6)
    assert found.ml["3rd ventricle"] * 1000 == pytest.approx(third, abs=1e-6)
    assert found.ventricles_ml * 1000 == pytest.approx(lateral + third, abs=1e-6)
    assert found.lateral_ventricles_ml * 1000 == pytest.approx(lateral, abs=1e-6)
    assert found.brain_ml * 1000 == pytest.approx(100 * 110 * 90 - lateral - third, abs=1e-6)


def level_network(folder: Path) -> SegmentationRuler:
    """The real network, with weights that pass intensities on, and scores best at the nearest level."""
    state = {name: torch.zeros_like(tensor) for name, tensor in Segmenter().state_dict().items()}
    for index in range(9):
        state[f"conv{index}.weight"][0, 0, 1, 1, 1] = 1
    state["conv9.bias"][:] = -9
    for label, level in LEVELS.items():
        state["conv9.weight"][label, 0], state["conv9.bias"][label] = level, -(level**2) / 2
    save_file(state, folder / "w.safetensors")
    config = SegmentationConfig(segmenter=str(folder / "w.safetensors"), precision="float32")
    return SegmentationRuler.load(config, CPU)


def test_the_real_network_class_counts_boxes_to_a_voxel(tmp_path: Path) -> None:
    """The same boxes through all ten layers."""
    loaded = level_network(tmp_path)
    assert len(loaded.weights_sha256) == 64
    small = boxes()[30:90, 40:100, 25:75]
    found = measured(loaded, small, grid(shape=small.shape))
    assert found.ml["lateral ventricle"] * 1000 == pytest.approx(20 * 31 * 11, abs=1e-6)
    assert found.ml["cerebral cortex"] * 1000 == pytest.approx(60 * 60 * 5, abs=1e-6)
    assert found.flags == ("landmarks missing", "implausible brain", "brain cut off")


def test_a_label_map_is_on_the_grid_of_its_image(tmp_path: Path) -> None:
    """Also where the brain reaches the edge of the grid; voxels at borders may be of either side."""
    image = boxes()[10:110:2, 0:130:2, 0:110:2]
    on = VolumeSpec(shape_xyz=image.shape, spacing_mm=(2.0,) * 3, origin_mm=(-60.0, 4.0, -17.0))
    labels = level_network(tmp_path).label_map(image, on)
    wanted = np.array(list(LEVELS))[np.abs(image[..., None] - list(LEVELS.values())).argmin(-1)]
    assert labels.shape == image.shape
    assert labels.dtype == np.uint8
    inner = ndimage.maximum_filter(wanted, 3) == ndimage.minimum_filter(wanted, 3, mode="constant", cval=-1)
    assert set(np.unique(wanted[inner])) == set(LEVELS) - {THIRD}
    assert np.array_equal(labels[inner], wanted[inner])
    with pytest.raises(ValueError, match="cannot be brought to voxels"):
        level_network(tmp_path).label_map(image, dataclasses.replace(on, spacing_mm=(2.5,) * 3))


def test_scale_place_and_neighbours_change_nothing(ruler: SegmentationRuler) -> None:
    image = boxes()
    plain = measured(ruler, image, grid())
    assert measured(ruler, image * 700, grid()) == plain
    moved = VolumeSpec(shape_xyz=image.shape, spacing_mm=(1.0,) * 3, origin_mm=(0.0, 0.0, 0.0))
    assert measured(ruler, image, moved) == plain
    blank = np.zeros_like(image)
    together = [measured(ruler, x, grid()) for x in (blank, image, np.full_like(image, np.nan))]
    assert together[1] == plain
    assert [found.flags for found in together] == [("blank",), plain.flags, ("not finite",)]


@pytest.mark.parametrize("spacing", [0.8, 2.0, 2.5, 4.0])
def test_other_grids_measure_the_same_box(spacing: float) -> None:
    """One tissue, so that blurred borders have no other level to pass through."""
    two = Bands({0: 0.0, WHITE: 1.0})
    shape = tuple(int(n / spacing) for n in (120, 130, 110))
    target = VolumeSpec(shape_xyz=shape, spacing_mm=(spacing,) * 3, origin_mm=grid().origin_mm)
    image = (boxes() > 0).astype(np.float32)
    found = measured(SegmentationRuler(segmenter=two), resample(image, grid().affine, target), target)
    assert found.brain_ml == pytest.approx(100 * 110 * 90 / 1000, rel=0.03)
    assert found.flags == ("no ventricles", "landmarks missing")


def test_the_network_grid_holds_the_brain_and_a_rim() -> None:
    coarse = VolumeSpec(shape_xyz=(10, 12, 9), spacing_mm=(4.0, 2.5, 1.0), origin_mm=(-3.0, 7.0, 0.25))
    kept = np.zeros(coarse.shape_xyz, bool)
    kept[2:5, 3:4, 0:9] = True
    fine = network_grid(kept, coarse)
    assert fine.spacing_mm == (1.0, 1.0, 1.0)
    assert fine.shape_xyz == (12 + 8, 3 + 8, 9 + 8)
    edges = [origin - 0.5 + 4 for origin in fine.origin_mm]
    assert edges == pytest.approx([-3 + 1.5 * 4, 7 + 2.5 * 2.5, 0.25 - 0.5])


def test_doubts_are_flagged(ruler: SegmentationRuler) -> None:
    image = boxes()
    filled = image.copy()
    filled[30:80, 40:90, 40:70] = 1
    assert measured(ruler, filled, grid()).flags == ("no ventricles", "landmarks missing")
    apart = image.copy()
    apart[70:90] = 0
    assert "brain in pieces" in measured(ruler, apart, grid()).flags
    cut = image[:, 30:]
    assert "brain cut off" in measured(ruler, cut, grid(shape=cut.shape)).flags
    rest = np.zeros_like(image)
    rest[50:65, 50:65, 50:65] = 1
    assert measured(ruler, rest, grid()).flags == ("no brain",)
    flooded = image.copy()
    flooded[15:105, 15:115, 35:95] = LEVELS[LATERAL]
    assert set(measured(ruler, flooded, grid()).flags) >= {"implausible brain", "implausible ventricles"}
    assert measured(ruler, -image, grid()).flags == ("blank",)
    assert math.isnan(measured(ruler, -image, grid()).ventricles_ml)
    with pytest.raises(UserError, match="not on the grid"):
        measured(ruler, image[1:], grid())


def test_a_line_of_a_table_holds_sums_structures_and_flags(ruler: SegmentationRuler) -> None:
    volumes = measured(ruler, boxes(), grid())
    line = table_line(volumes)
    assert (line["brain_ml"], line["ventricles_ml"]) == (volumes.brain_ml, volumes.ventricles_ml)
    assert {"lateral_ventricles_ml", "hippocampus_ml", "ventral_dc_ml"} <= set(line)
    assert line["flags"] == "landmarks missing"


def test_a_calibration_is_a_line() -> None:
    measured = np.arange(1.0, 13.0)
    line = Calibration.fit(measured, 2 * measured - 5)
    assert (line.ml_per_ml, line.offset_ml, line.n) == (pytest.approx(2), pytest.approx(-5), 12)
    np.testing.assert_allclose(line.apply([10.0, 1.0, math.nan]), [15.0, 0.0, math.nan], atol=1e-9)


@pytest.mark.parametrize(
    ("measured", "reference", "says"),
    [
        (range(7), range(7), "at least 8"),
        (range(9), range(8), "at least 8"),
        ([*range(8), math.nan], range(9), "not finite"),
        ([3] * 9, range(9), "all the same"),
        (range(9), range(9, 0, -1), "same order"),
    ],
)
def test_data_that_fix_no_calibration_are_refused(measured, reference, says: str) -> None:
    with pytest.raises(UserError, match=says):
        Calibration.fit([float(v) for v in measured], [float(v) for v in reference])


def test_absent_weights_are_the_users_to_mend(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no weights at"):
        SegmentationRuler.load(SegmentationConfig(segmenter=str(tmp_path / "absent")), CPU)


@pytest.mark.real
@pytest.mark.parametrize("places", [(0.9,), pytest.param((0.0, 0.5, 0.9, 0.985), marks=pytest.mark.slow)])
def test_real_ventricles_agree_with_the_reference(data_root: Path, places: tuple[float, ...]) -> None:
    """Scans from the smallest to large ventricles, at 2 mm; nothing is fitted here."""
    weights, folder = data_root / "instruments" / "meshnet18" / "model.safetensors", data_root / "ixi_2mm"
    if not weights.exists() or not (folder / "participants.tsv").exists():
        pytest.skip(f"the pretrained segmenter or the scans are not in {data_root}")
    ruler = SegmentationRuler.load(SegmentationConfig(segmenter=str(weights)), CPU)
    table = pd.read_csv(folder / "participants.tsv", sep="\t").sort_values("vent_ml")
    chosen = table.iloc[[int(place * len(table)) for place in places]]
    found = []
    for row in chosen.itertuples():
        scan, mask = (nib.load(folder / name) for name in (row.t1w, row.dseg))
        image = np.asarray(scan.dataobj, np.float32) * (np.asarray(mask.dataobj) > 0)
        spacing, origin = np.diag(scan.affine)[:3].tolist(), scan.affine[:3, 3].tolist()
        spec = VolumeSpec(shape_xyz=image.shape, spacing_mm=tuple(spacing), origin_mm=tuple(origin))
        found.append(measured(ruler, image, spec))
    assert [f.flags for f in found] == [()] * len(places)
    bias_ml = np.array([f.ventricles_ml for f in found]) - chosen.vent_ml.to_numpy()
    assert 0 < bias_ml.mean() < 8
    if len(places) > 2:
        assert "landmarks missing" in measured(ruler, image[:, :, ::-1], spec).flags  # the last head, upside down
        assert agreement([f.ventricles_ml for f in found], chosen.vent_ml).r > 0.98
    ratio = np.array([f.brain_ml for f in found]) / chosen.brain_ml.to_numpy()
    assert ((ratio > 0.78) & (ratio < 0.95)).all()
