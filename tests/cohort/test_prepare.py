"""Real scans → prepared cohort: every broken one becomes one reject with its reason, and geometry is kept."""

from __future__ import annotations

import gzip
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from scipy import ndimage

from brainsynth import open_dataset
from brainsynth.cohort.intensity import scale_intensities
from brainsynth.cohort.prepare import plan_cohort, split_of
from brainsynth.cohort.scan import ScanRejected, load_scan
from brainsynth.config.schema import PrepareConfig, RuntimeConfig, SourceConfig
from brainsynth.covariates.schema import Covariate, CovariateSchema
from brainsynth.errors import UserError
from brainsynth.executors.dataset import dry_run, make_dataset
from brainsynth.manifest import DatasetManifest
from brainsynth.storage.filesystem import open_store
from brainsynth.storage.verify import verify_dataset
from brainsynth.volume import VolumeSpec, resample
from tests.conftest import GRID, SCHEMA

IN_PROCESS = RuntimeConfig(workers=0)


def config_of(source: Path | SourceConfig, output: Path, **changes: Any) -> PrepareConfig:
    config = PrepareConfig(
        source=source if isinstance(source, SourceConfig) else SourceConfig(path=str(source)),
        output=str(output),
        covariates=SCHEMA,
        volume=GRID,
        samples_per_shard=4,
        runtime=IN_PROCESS,
    )
    return replace(config, **changes)


def prepare(source: Path | SourceConfig, output: Path, **changes: Any) -> DatasetManifest:
    config = config_of(source, output, **changes)
    return make_dataset(plan_cohort(config), config.runtime)


def rejects(root: Path) -> dict[str, str]:
    """Reason by sample id."""
    if not (root / "rejects.tsv").exists():
        return {}
    table = pd.read_csv(root / "rejects.tsv", sep="\t", dtype=str, keep_default_na=False)
    assert not table["sample_id"].duplicated().any()
    return dict(zip(table["sample_id"], table["reason"], strict=True))


def scan_of(folder: Path, number: int) -> Path:
    return folder / f"sub-phantom{number:04d}" / "anat" / f"sub-phantom{number:04d}_T1w.nii.gz"


def rows_of(folder: Path) -> pd.DataFrame:
    """The phantoms as a table with absolute paths."""
    table = pd.read_csv(folder / "participants.tsv", sep="\t")
    table["image"] = [str(scan_of(folder, number + 1)) for number in range(len(table))]
    return table


def save(image: np.ndarray[Any, Any], path: Path, affine: np.ndarray[Any, Any] | None = None) -> str:
    nib.save(nib.Nifti1Image(image, GRID.affine if affine is None else affine), path)
    return str(path)


def test_a_bids_folder(prepared_cohort: Path, phantom_folder: Path) -> None:
    opened = open_dataset(str(prepared_cohort))
    assert rejects(prepared_cohort) == {}
    assert opened.sample_ids == [f"phantom{number:04d}" for number in range(1, 13)]
    original = np.asarray(nib.load(scan_of(phantom_folder, 5)).dataobj, dtype=np.float32)
    image = opened[4]["image"]
    assert np.corrcoef(image.ravel(), original.ravel())[0, 1] > 0.999
    assert image.min() == 0.0
    assert image.max() == 1.0
    truth = pd.read_csv(phantom_folder / "participants.tsv", sep="\t")
    np.testing.assert_allclose(opened.table["age"], truth["age"])
    assert list(opened.table["sex"]) == list(truth["sex"])
    assert verify_dataset(open_store(str(prepared_cohort))).ok


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_a_table_gives_the_same_volumes(phantom_folder: Path, tmp_path: Path, suffix: str) -> None:
    table = rows_of(phantom_folder).iloc[:3].rename(columns={"participant_id": "who", "image": "file", "age": "years"})
    path = tmp_path / f"scans{suffix}"
    if suffix == ".parquet":
        table.to_parquet(path, index=False)
    else:
        table.to_csv(path, sep="\t" if suffix == ".tsv" else ",", index=False)
    source = SourceConfig(path=str(path), image_column="file", subject_column="who", columns={"age": "years"})
    prepare(source, tmp_path / "cohort")
    opened = open_dataset(str(tmp_path / "cohort"))
    assert opened.sample_ids == ["phantom0001", "phantom0002", "phantom0003"]
    np.testing.assert_allclose(opened.table["age"], table["years"])
    prepare(phantom_folder, tmp_path / "bids")
    np.testing.assert_array_equal(opened.volumes(), open_dataset(str(tmp_path / "bids")).volumes(range(3)))


def test_paths_in_a_table_are_relative_to_it(phantom_folder: Path, tmp_path: Path) -> None:
    shutil.copy(scan_of(phantom_folder, 1), tmp_path / "scan.nii.gz")
    rows_of(phantom_folder).iloc[:1].assign(image="scan.nii.gz").to_csv(tmp_path / "scans.csv", index=False)
    assert prepare(tmp_path / "scans.csv", tmp_path / "cohort").num_ok == 1


BAD = {
    "truncated": "unreadable",
    "flipped": "unreadable",
    "empty": "unreadable",
    "text": "unreadable",
    "gifti": "not a volume: GiftiImage",
    "fourD": "not 3D: shape (20, 26, 20, 2)",
    "flat": "implausible shape (1, 26, 20)",
    "rgb": "unsupported voxel type",
    "holes": "NaN or infinite voxels",
    "spacing": "zero or non-finite spacing",
    "singular": "singular affine",
    "constant": "constant image",
    "elsewhere": "nothing of the image lies on the configured grid",
    "big": "file larger than 1 MiB",
    "gone": "missing file",
    "folder": "not a file: a folder",
    "unnamed": "missing file",
    "noage": "missing covariate: age",
    "nothing": "missing covariate: age, sex",
    "old": "age = 300 years is outside the training support [18, 95]",
    "words": "age = 'forty' is not a finite number",
    "sex": "sex = 'X' is not one of F, M",
    "qc": "excluded: qc = fail",
}


def bad_image(kind: str, good: Path, folder: Path) -> str:
    """A file that is broken in this way."""
    path = folder / f"{kind}.nii.gz"
    voxels = np.asarray(nib.load(good).dataobj)
    data = bytearray(good.read_bytes())
    if kind == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "flipped":
        data[len(data) // 2] ^= 0x55
        path.write_bytes(data)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("this was meant to be a scan\n" * 100)
    elif kind == "gifti":
        path = folder / "surface.gii"
        nib.save(nib.gifti.GiftiImage(), path)
    elif kind == "fourD":
        save(np.stack([voxels, voxels], axis=-1), path)
    elif kind == "flat":
        save(voxels[:1], path)
    elif kind == "rgb":
        save(np.zeros(voxels.shape, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")]), path)
    elif kind == "holes":
        save(np.where(voxels == voxels.max(), np.nan, voxels).astype(np.float32), path)
    elif kind in ("spacing", "singular"):
        raw = bytearray(gzip.decompress(good.read_bytes()))
        # pixdim[1] is at byte 80 of a NIfTI-1 header, the first row of the sform at 280.
        start, count = (80, 4) if kind == "spacing" else (280, 16)
        raw[start : start + count] = bytes(count)
        path.write_bytes(gzip.compress(bytes(raw)))
    elif kind == "constant":
        save(np.full(voxels.shape, 7, np.uint8), path)
    elif kind == "elsewhere":
        far = GRID.affine.copy()
        far[0, 3] += 10_000
        save(voxels, path, far)
    elif kind == "big":
        path = folder / "big.nii"
        save(np.zeros((80, 80, 90), np.float32), path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "unnamed":
        return ""
    elif kind != "gone":  # a file of its own: a scan is in one row only
        shutil.copy(good, path)
    return str(path)


@pytest.fixture(scope="module")
def battered(phantom_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cohort of one good scan, everything in BAD, and another good scan."""
    folder = tmp_path_factory.mktemp("battered")
    rows = rows_of(phantom_folder).astype({"age": object})
    template = rows.iloc[0]
    lines = [dict(rows.iloc[1], qc="ok")]
    for kind in BAD:
        line = dict(template, participant_id=kind, qc="ok", image=bad_image(kind, Path(template["image"]), folder))
        line |= {"noage": {"age": None}, "nothing": {"age": None, "sex": None}, "old": {"age": 300.0}}.get(kind, {})
        line |= {"words": {"age": "forty"}, "sex": {"sex": "X"}, "qc": {"qc": "fail"}}.get(kind, {})
        lines.append(line)
    lines.append(dict(rows.iloc[2], qc="ok"))
    pd.DataFrame(lines).to_csv(folder / "scans.csv", index=False)
    source = SourceConfig(path=str(folder / "scans.csv"), exclude={"qc": ("fail",)})
    prepare(source, folder / "cohort", max_file_mib=1)
    return folder / "cohort"


@pytest.mark.parametrize("kind", BAD)
def test_a_broken_scan_is_one_reject_with_its_reason(battered: Path, kind: str) -> None:
    assert rejects(battered)[kind].startswith(BAD[kind])


def test_and_the_rest_goes_on(battered: Path, phantom_folder: Path, tmp_path: Path) -> None:
    assert set(rejects(battered)) == set(BAD)
    opened = open_dataset(str(battered))
    assert opened.sample_ids == ["phantom0002", "phantom0003"]
    assert opened.manifest["num_samples"] == len(BAD) + 2
    assert (opened.manifest["num_ok"], opened.manifest["num_rejected"]) == (2, len(BAD))
    prepare(phantom_folder, tmp_path / "alone")
    alone = open_dataset(str(tmp_path / "alone"))
    np.testing.assert_array_equal(opened.volumes(), alone.volumes([1, 2]))
    assert verify_dataset(open_store(str(battered))).ok


def test_damaged_headers_are_rejects_or_scans_but_never_a_crash(phantom_folder: Path, tmp_path: Path) -> None:
    raw = gzip.decompress(scan_of(phantom_folder, 1).read_bytes())
    rng = np.random.default_rng(7)
    outcomes: list[str] = []
    # Bytes 40-55 are the shape: a flip there may ask for gigabytes, which is another story.
    places = [p for p in range(348) if not 40 <= p < 56]
    for place in rng.choice(places, 150):
        damaged = bytearray(raw)
        damaged[place] ^= 1 << int(rng.integers(8))
        (tmp_path / "scan.nii").write_bytes(damaged)
        try:
            image, _ = load_scan(str(tmp_path / "scan.nii"), "", GRID, "world", 512)
            assert image.shape == GRID.shape_xyz
            assert np.isfinite(image).all()
            outcomes.append("scan")
        except ScanRejected as rejected:
            assert str(rejected)
            outcomes.append("reject")
    assert {"scan", "reject"} == set(outcomes)


def test_masks(phantom_folder: Path, tmp_path: Path) -> None:
    rows = rows_of(phantom_folder).iloc[:4].copy()
    voxels = np.asarray(nib.load(rows["image"][0]).dataobj)
    left = np.zeros(voxels.shape, np.uint8)
    left[:10] = 3
    shifted = GRID.affine.copy()
    shifted[0, 3] += 8
    rows["mask"] = [
        save(left, tmp_path / "left.nii.gz"),
        save(left, tmp_path / "shifted.nii.gz", shifted),
        str(tmp_path / "nowhere.nii.gz"),
        None,
    ]
    rows.to_csv(tmp_path / "scans.csv", index=False)
    source = SourceConfig(path=str(tmp_path / "scans.csv"), mask_column="mask")
    prepare(source, tmp_path / "cohort")
    assert rejects(tmp_path / "cohort") == {
        "phantom0002": "mask is on another grid than the image",
        "phantom0003": "missing mask file",
        "phantom0004": "missing mask file",
    }
    (sample,) = open_dataset(str(tmp_path / "cohort"))
    assert sample["image"][10:].max() == 0.0
    assert sample["image"][:10].max() == 1.0
    with pytest.raises(UserError, match="mask_column needs a table"):
        plan_cohort(config_of(SourceConfig(path=str(phantom_folder), mask_column="mask"), tmp_path / "other"))


@pytest.mark.parametrize("axes", ["PSR", "LAS", "LPI", "SAL", "IRP"])
def test_the_same_brain_in_another_axis_order_is_the_same_volume(
    phantom_folder: Path, tmp_path: Path, axes: str
) -> None:
    image = nib.load(scan_of(phantom_folder, 1))
    wanted = nib.orientations.axcodes2ornt(tuple(axes))
    turned = image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(image.affine), wanted))
    assert "".join(nib.aff2axcodes(turned.affine)) == axes
    nib.save(turned, tmp_path / "turned.nii.gz")
    upright, _ = load_scan(str(scan_of(phantom_folder, 1)), "", GRID, "world", 512)
    found, _ = load_scan(str(tmp_path / "turned.nii.gz"), "", GRID, "world", 512)
    np.testing.assert_allclose(found, upright, atol=1e-3)
    assert np.abs(upright - upright[:, ::-1]).max() > 50  # a mirrored one would be noticed
    assert np.abs(upright - upright[::-1]).max() > 20


def blob(shape: tuple[int, int, int], affine: np.ndarray[Any, Any], world_mm: np.ndarray[Any, Any]) -> Any:
    """A Gaussian of 10 mm at a world position."""
    voxels = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    distance = voxels @ affine[:3, :3].T + affine[:3, 3] - world_mm
    return (100 * np.exp(-(distance**2).sum(-1) / (2 * 10.0**2))).astype(np.float32)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.0, 1.5, 3.0), (6.0, 5.0, 4.0)])
@pytest.mark.parametrize("degrees", [0, 12])
def test_resampling_keeps_world_positions(spacing: tuple[float, float, float], degrees: float) -> None:
    shape = tuple(int(180 / mm) for mm in spacing)
    turn = np.eye(3)
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turn[:2, :2] = [[c, -s], [s, c]]
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag(spacing)
    affine[:3, 3] = -affine[:3, :3] @ (np.array(shape) / 2) + [3.0, -4.0, 5.0]
    world = np.array([14.0, -21.0, 9.0])
    source = blob(shape, affine, world)  # type: ignore[arg-type]
    target = VolumeSpec(shape_xyz=(40, 48, 40), spacing_mm=(4.0, 4.0, 4.0), origin_mm=(-78.0, -94.0, -78.0))
    found = resample(source, affine, target)
    centre = target.affine @ [*ndimage.center_of_mass(found), 1.0]
    assert np.abs(centre[:3] - world).max() < 0.1 * 4.0
    mass = [float(image.sum()) * np.prod(mm) for image, mm in ((source, spacing), (found, target.spacing_mm))]
    assert mass[1] == pytest.approx(mass[0], rel=0.02)


def test_a_coarser_grid_does_not_alias() -> None:
    fine = VolumeSpec(shape_xyz=(96, 96, 96), spacing_mm=(1.0, 1.0, 1.0), origin_mm=(0.0, 0.0, 0.0))
    coarse = VolumeSpec(shape_xyz=(24, 24, 24), spacing_mm=(4.0, 4.0, 4.0), origin_mm=(0.0, 0.0, 0.0))
    noise = np.random.default_rng(0).standard_normal(fine.shape_xyz).astype(np.float32)
    assert resample(noise, fine.affine, coarse)[2:-2, 2:-2, 2:-2].std() < 0.25
    assert noise[::4, ::4, ::4].std() > 0.9


def test_intensity_rule() -> None:
    image = np.zeros((10, 10, 10), np.float32)
    image[:5] = np.linspace(100, 1100, 500).reshape(5, 10, 10)
    scaled = scale_intensities(image, (0.0, 90.0))
    top = np.percentile(image[:5], 90.0)
    np.testing.assert_allclose(scaled, np.clip(image / top, 0, 1), atol=1e-6)
    assert (scaled == 1.0).sum() == 50
    np.testing.assert_allclose(scale_intensities(image * 40 + 7, (0.0, 90.0)), scaled, atol=1e-5)
    low = scale_intensities(image, (75.0, 100.0))
    assert (low == 0).sum() == 750
    with pytest.raises(ScanRejected, match="constant image"):
        scale_intensities(np.full((4, 4, 4), 3.0, np.float32), (0.0, 99.8))


def test_centre_on_the_foreground_undoes_a_shift(phantom_folder: Path, tmp_path: Path) -> None:
    image = nib.load(scan_of(phantom_folder, 1))
    moved = GRID.affine.copy()
    moved[:3, 3] += [37.0, -21.0, 55.0]
    save(np.asarray(image.dataobj), tmp_path / "moved.nii.gz", moved)
    place, elsewhere = str(scan_of(phantom_folder, 1)), str(tmp_path / "moved.nii.gz")
    centred = [load_scan(path, "", GRID, "foreground", 512)[0] for path in (place, elsewhere)]
    np.testing.assert_allclose(centred[0], centred[1], atol=0.1)
    world = [load_scan(path, "", GRID, "world", 512)[0] for path in (place, elsewhere)]
    assert np.corrcoef(world[0].ravel(), world[1].ravel())[0, 1] < 0.7
    middle = ndimage.center_of_mass(centred[0] > centred[0].mean())
    np.testing.assert_allclose(middle, (np.array(GRID.shape_xyz) - 1) / 2, atol=0.6)


@pytest.fixture
def sessions(phantom_folder: Path, tmp_path: Path) -> Path:
    """A BIDS folder of subjects 01 … 06 with two sessions each, 07 with none and 08 without a scan."""
    folder = tmp_path / "sessions"
    for number in range(1, 7):
        for session in ("ses-1", "ses-2"):
            anat = folder / f"sub-{number:02d}" / session / "anat"
            anat.mkdir(parents=True)
            shutil.copy(scan_of(phantom_folder, number), anat / f"sub-{number:02d}_{session}_T1w.nii.gz")
    (folder / "sub-07" / "anat").mkdir(parents=True)
    shutil.copy(scan_of(phantom_folder, 7), folder / "sub-07" / "anat" / "sub-07_T1w.nii.gz")
    (folder / "sub-07" / "anat" / "sub-07_T1w.json").write_text("{}")
    table = rows_of(phantom_folder).iloc[:8].drop(columns="image")
    table["participant_id"] = [f"{number:02d}" for number in range(1, 9)]
    table.to_csv(folder / "participants.tsv", sep="\t", index=False)
    return folder


def test_sessions_of_a_subject_are_never_split(sessions: Path, tmp_path: Path) -> None:
    samples = plan_cohort(config_of(sessions, tmp_path / "cohort", validation_fraction=0.5)).samples
    assert list(samples["sample_id"])[:3] == ["01ses1", "01ses2", "02ses1"]
    assert list(samples["sample_id"])[-2:] == ["07", "08"]
    assert samples.groupby("subject")["split"].nunique().max() == 1
    assert set(samples["split"]) == {"train", "validation"}
    manifest = prepare(sessions, tmp_path / "cohort", validation_fraction=0.5)
    assert (manifest.num_ok, manifest.num_rejected) == (13, 1)
    assert rejects(tmp_path / "cohort") == {"08": "missing file"}


def table_of(folder: Path, subjects: list[str]) -> Path:
    path = folder / "scans.csv"
    rows = {"participant_id": subjects, "image": "none.nii.gz", "age": 40.0, "sex": "F", "ventricular_volume": 20.0}
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


def test_adding_subjects_moves_nobody(tmp_path: Path) -> None:
    subjects = [f"S{number:04d}" for number in range(1000)]
    few = plan_cohort(config_of(table_of(tmp_path, subjects[500:600]), tmp_path / "cohort")).samples
    many = plan_cohort(config_of(table_of(tmp_path, subjects), tmp_path / "cohort")).samples
    both = few.merge(many, on="subject", suffixes=("_few", "_many"))
    assert len(both) == 100
    assert (both["split_few"] == both["split_many"]).all()
    assert 0.16 < (many["split"] == "validation").mean() < 0.24
    other = plan_cohort(config_of(table_of(tmp_path, subjects), tmp_path / "cohort", split_seed=1)).samples
    assert (other["split"] != many["split"]).sum() > 100
    assert [split_of("S0001", 0, fraction) for fraction in (1e-9, 1 - 1e-9)] == ["train", "validation"]


def test_sample_ids_are_unique_letters_and_digits(tmp_path: Path) -> None:
    subjects = ["007", "0.07", "007x2", "sub-a_1", "a1", "###", "Ünal"]
    samples = plan_cohort(config_of(table_of(tmp_path, subjects), tmp_path / "cohort")).samples
    assert list(samples["sample_id"]) == ["007", "007x2", "007x2x2", "a1", "a1x2", "x2", "nal"]
    assert list(samples["subject"][:2]) == ["007", "0.07"]


def test_categories_that_are_numbers_survive_a_gap(phantom_folder: Path, tmp_path: Path) -> None:
    rows = rows_of(phantom_folder).iloc[:3].copy()
    rows["sex"] = [1, 2, None]
    rows.to_csv(tmp_path / "scans.csv", index=False)
    sex = Covariate(name="sex", kind="binary", categories=("1", "2"))
    schema = CovariateSchema(covariates=(SCHEMA.covariates[0], sex))
    prepare(tmp_path / "scans.csv", tmp_path / "cohort", covariates=schema, missing_covariates="keep")
    opened = open_dataset(str(tmp_path / "cohort"))
    assert [sample["sex"] for sample in opened] == ["1", "2", ""]
    np.testing.assert_array_equal(schema.encode(opened.table)[:, [1, 3]], [[0, 1], [1, 1], [0, 0]])


def test_a_dry_run_writes_nothing(phantom_folder: Path, tmp_path: Path) -> None:
    told = dry_run(plan_cohort(config_of(phantom_folder, tmp_path / "cohort")), IN_PROCESS)
    assert "12 rows in 3 shards of 4, 0 already committed" in told
    assert "train" in told
    assert list(tmp_path.iterdir()) == []


def test_the_same_cohort_twice_is_the_same_data(phantom_folder: Path, tmp_path: Path) -> None:
    one = prepare(phantom_folder, tmp_path / "one")
    two = prepare(phantom_folder, tmp_path / "two")
    assert one.shards_digest == two.shards_digest
    assert prepare(phantom_folder, tmp_path / "two") == two


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"path": "nowhere.csv"}, "there is no table at"),
        ({"image_column": "file"}, "there is no column 'file'; it has participant_id"),
        ({"subject_column": "who"}, "there is no column 'who'"),
        ({"columns": {"age": "years"}}, r"missing column\(s\) years"),
        ({"exclude": {"qc": ("fail",)}}, r"missing column\(s\) qc"),
    ],
)
def test_a_table_that_does_not_fit_is_a_users_mistake(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    path = table_of(tmp_path, ["a", "b"])
    source = SourceConfig(**{"path": str(path), **changes})
    with pytest.raises(UserError, match=told):
        plan_cohort(config_of(source, tmp_path / "cohort"))


def test_tables_without_rows_or_names_are_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="rows without participant_id: lines 3, 4"):
        plan_cohort(config_of(table_of(tmp_path, ["a", "", "n/a"]), tmp_path / "cohort"))
    with pytest.raises(UserError, match="the table has no rows"):
        plan_cohort(config_of(table_of(tmp_path, []), tmp_path / "cohort"))
    (tmp_path / "bids").mkdir()
    with pytest.raises(UserError, match="there is no table at .*participants.tsv"):
        plan_cohort(config_of(tmp_path / "bids", tmp_path / "cohort"))


REAL_GRID = VolumeSpec(shape_xyz=(40, 56, 40), spacing_mm=(4.0, 4.0, 4.0), origin_mm=(-79.0, -127.0, -71.0))
REAL_SCHEMA = CovariateSchema(
    covariates=(
        Covariate(name="age", kind="continuous", unit="years", low=18.0, high=90.0),
        Covariate(name="sex", kind="binary", categories=("F", "M")),
    )
)


def real_cohort(table: pd.DataFrame, folder: Path, center: str) -> Path:
    table.to_csv(folder / f"{center}.tsv", sep="\t", index=False, na_rep="n/a")
    source = SourceConfig(path=str(folder / f"{center}.tsv"), mask_column="mask")
    prepare(source, folder / center, covariates=REAL_SCHEMA, volume=REAL_GRID, center=center)
    return folder / center


def correlation(a: Any, b: Any) -> float:
    return float(np.corrcoef(np.ravel(a), np.ravel(b))[0, 1])


@pytest.mark.real
def test_real_heads_in_scanner_space_meet_their_registered_selves(data_root: Path, tmp_path: Path) -> None:
    heads, registered = data_root / "ixi_heads_2mm", data_root / "ixi_2mm"
    table = pd.read_csv(heads / "participants.tsv", sep="\t", na_values="n/a")[["participant_id", "age", "sex"]]
    names = table["participant_id"]
    assert "".join(nib.aff2axcodes(nib.load(heads / f"{names[0]}_T1w.nii.gz").affine)) == "PSR"
    one = table.assign(
        image=[heads / f"{n}_T1w.nii.gz" for n in names], mask=[heads / f"{n}_dlmuse.nii.gz" for n in names]
    )
    two = table.assign(
        image=[registered / f"{n}_T1w.nii.gz" for n in names], mask=[registered / f"{n}_dseg.nii.gz" for n in names]
    )
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    found = open_dataset(str(real_cohort(one, tmp_path / "one", "foreground")))
    expected = open_dataset(str(real_cohort(two, tmp_path / "two", "foreground")))
    assert found.sample_ids == expected.sample_ids
    assert len(found) == len(table) == 10
    sides = []
    for a, b in zip(found.volumes(), expected.volumes(), strict=True):
        # Seen on these ten: 0.87-0.995; what is left is the rotation that registration took out.
        assert correlation(a, b) > 0.85
        assert correlation(a, b) > correlation(a[:, ::-1], b) + 0.04
        assert correlation(a, b) > correlation(a[:, :, ::-1], b) + 0.03
        sides.append(correlation(a, b) - correlation(a[::-1], b))
    # A brain nearly equals its mirror image, so left and right are told by all ten together.
    assert np.mean(sides) > 0.005
    assert sum(side > 0 for side in sides) >= 9


@pytest.mark.real
def test_real_subjects_without_age_are_rejects(data_root: Path, tmp_path: Path) -> None:
    folder = data_root / "ixi_2mm"
    table = pd.read_csv(folder / "participants.tsv", sep="\t", na_values="n/a")
    unknown = table[table["age"].isna()]
    assert len(unknown) == 3
    table = pd.concat([unknown, table[table["age"].notna()].iloc[:3]])
    table["image"], table["mask"] = [str(folder / n) for n in table["t1w"]], [str(folder / n) for n in table["dseg"]]
    root = real_cohort(table, tmp_path, "world")
    assert len(open_dataset(str(root))) == 3
    assert list(rejects(root).values()) == ["missing covariate: age, sex"] * 3
    assert set(rejects(root)) == {name.replace("-", "") for name in unknown["participant_id"]}
