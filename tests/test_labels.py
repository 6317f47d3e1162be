"""A label table: what it refuses, what it counts, and what is written of it. A plan without one is what it was."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from brainsynth.errors import UserError
from brainsynth.labels import Label, LabelTable
from brainsynth.plan import Plan, volume_arrays
from brainsynth.records import from_dict, seal, to_dict, unseal
from tests.test_plan import VOLUME, plan_of, rows_of, samples_of

TABLE = LabelTable(
    labels=(
        Label(index=17, name="Left-Hippocampus", abbreviation="LHip", color="#dcd814", values=(17, 218)),
        Label(index=4, name="Left Lateral Ventricle"),
    ),
    source="a drawing",
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index": 255}, "an index is 1 to 254; 0 is background, 255 marks lost data"),
        ({"index": 0}, "an index is 1 to 254"),
        ({"index": 2035}, "an index is 1 to 254"),
        ({"name": "a\tb"}, "name and abbreviation are"),
        ({"name": "--"}, "name and abbreviation are"),
        ({"name": "Großhirn"}, "name and abbreviation are"),
        ({"abbreviation": "x\n"}, "name and abbreviation are"),
        ({"color": "red"}, "color is #rrggbb"),
    ],
)
def test_a_label_that_cannot_be_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TABLE.labels[0], **change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ((), "needs at least one label"),
        ((Label(index=1, name="a"), Label(index=1, name="b")), "the same index more than once: 1"),
        ((Label(index=1, name="Left Hip"), Label(index=2, name="left-hip")), "the same name more than once: left_hip"),
    ],
)
def test_a_table_that_cannot_be_is_refused(labels: tuple[Label, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LabelTable(labels=labels, source="")


def test_volumes_are_counted_by_column_and_strangers_named() -> None:
    voxels = np.zeros((3, 4, 5), np.uint8)
    voxels[0, 0, :4] = 17
    voxels[1, 0, :2] = 4
    assert TABLE.volumes_ml(voxels, 0.5) == {
        "label_volume_left_hippocampus": 2.0,
        "label_volume_left_lateral_ventricle": 1.0,
    }
    assert TABLE.unknown(voxels) == []
    voxels[2, 0] = 255
    voxels[2, 1] = 3
    assert TABLE.unknown(voxels) == [3, 255]
    assert TABLE.fault(voxels) == "label map: 255 marks lost data and cannot be a label"
    voxels[2, 0] = 3
    assert TABLE.fault(voxels) == "label map: the label table lacks 3"
    voxels[:] = 0
    assert TABLE.fault(voxels) == "label map: all background"
    voxels[0, 0, 0] = 4
    assert TABLE.fault(voxels) == ""


def test_the_tsv_is_bids_and_colors_are_there() -> None:
    lines = TABLE.tsv().decode().splitlines()
    assert lines[0] == "index\tname\tabbreviation\tcolor"
    assert lines[2] == "17\tLeft-Hippocampus\tLHip\t#dcd814"
    assert lines[1].startswith("4\tLeft Lateral Ventricle\tn/a\t#")
    assert len({label.rgb for label in (Label(index=i, name=f"s{i}") for i in range(1, 20))}) == 19


def test_a_plan_holds_the_table_and_one_without_is_as_before() -> None:
    bare = plan_of(samples_of(rows_of(3)))
    assert "labels" not in to_dict(bare)
    assert "fill" not in to_dict(bare)["arrays"][0]
    both = replace(bare, labels=TABLE, arrays=volume_arrays(VOLUME, TABLE))
    assert both.fingerprint != bare.fingerprint
    assert unseal(Plan, seal(both), "plan.json") == both
    image, dseg = both.arrays
    assert (dseg.name, dseg.dtype, dseg.fill_value, dseg.chunk_shape) == ("dseg", "uint8", 255, image.chunk_shape)
    assert np.isnan(image.fill_value)
    with pytest.raises(UserError, match="a plan with labels needs the volumes' array and dseg"):
        from_dict(Plan, to_dict(both) | {"arrays": to_dict(bare)["arrays"]}, "plan.json")
