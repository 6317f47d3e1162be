"""What the server tells of a dataset: every committed row, asked and measured, and volumes as the export has them."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from brainsynth import cli, open_dataset
from brainsynth.errors import UserError
from brainsynth.export.file_format import ExportedVolume
from brainsynth.export.formats import FORMATS
from brainsynth.storage.filesystem import open_store
from brainsynth.storage.finalise import finalise
from brainsynth.viewer.server import PAGE
from brainsynth.viewer.view import View
from tests.commands import brainsynth, tree
from tests.storage.conftest import BANDS
from tests.viewer.conftest import (
    AGES,
    FAILED,
    PEOPLE,
    REASON,
    REJECTED,
    VENTRICLES,
    VOLUME,
    ask,
    commit,
    measured,
    publish,
    served,
    write,
)

ROWS = PEOPLE + len(AGES) * len(VENTRICLES)


def texts(column: dict[str, Any]) -> list[str | None]:
    return [None if code < 0 else column["values"][code] for code in column["codes"]]


def test_every_row_is_told_with_its_fate(finished: Path) -> None:
    with served(finished) as server:
        answer = ask(server, "dataset.json")
    facts, rows = answer.json, answer.json["rows"]
    assert facts["title"] == "demo/generated"
    assert (facts["kind"], facts["synthetic"], facts["finished"], facts["planned"]) == ("generated", True, True, ROWS)
    assert [c["unit"] for c in facts["covariates"]] == ["years", "", "ml"]
    assert rows["row"] == list(range(ROWS))
    status = ["rejected" if r == REJECTED else "failed" if r == FAILED else "ok" for r in range(ROWS)]
    assert texts(rows["status"]) == status
    assert {r: reason for r, reason in enumerate(texts(rows["reason"])) if reason} == {3: REASON, 5: "out of memory"}
    assert rows["extrapolated"] == [0] * (ROWS - 2) + [1, 1]  # 90 years, where training ends at 80
    assert rows["series"] == [-1] * PEOPLE + [0] * 6
    assert rows["quality"]["gate_score"][:6] == [0.0, 0.05, 0.1, 0.15, 0.2, None]


def test_asked_and_measured_are_those_of_the_dataset(finished: Path) -> None:
    rows = View(str(finished)).document()[0]
    with served(finished) as server:
        facts = ask(server, "dataset.json").json
    assert rows == ask_again(finished)
    assert facts["measured_by"] == "an evaluation"
    table = open_dataset(str(finished), measured=True).table.set_index("row")
    for row in table.index:
        told = facts["rows"]
        assert told["sample_id"][row] == table["sample_id"][row]
        assert texts(told["asked"]["sex"])[row] == table["sex"][row]
        for name in ("age", "ventricular_volume"):
            assert told["asked"][name][row] == pytest.approx(table[name][row], rel=1e-5)
            assert told["measured"][name][row] == pytest.approx(table[f"measured_{name}"][row], rel=1e-5)
    assert facts["rows"]["measured"]["age"][REJECTED] is None


def ask_again(root: Path) -> bytes:
    with served(root) as server:
        return gzip.decompress(ask(server, "dataset.json", Accept_Encoding="gzip").body)


def test_a_volume_is_what_an_export_writes(finished: Path, tmp_path: Path) -> None:
    dataset = open_dataset(str(finished))
    index = list(dataset.rows).index(7)
    with served(finished) as server:
        body = ask(server, "volumes/7.nii").body
    volume = ExportedVolume("syn000007", dataset.stored(index), VOLUME, {"synthetic": True})
    FORMATS["nifti"].write(tmp_path / "7.nii.gz", [volume])
    assert body == gzip.decompress((tmp_path / "7.nii.gz").read_bytes())
    image = nibabel.Nifti1Image.from_bytes(body)
    np.testing.assert_array_equal(np.asarray(image.dataobj), dataset.volume(index))
    np.testing.assert_allclose(image.affine, dataset.affine)
    assert b"AI-generated" in bytes(image.header["descrip"])


@pytest.mark.parametrize("row", [REJECTED, FAILED, ROWS, 999_999_999])
def test_a_row_without_a_volume_has_none(finished: Path, row: int) -> None:
    with served(finished) as server:
        assert ask(server, f"volumes/{row}.nii").status == 404


def test_only_what_is_committed_is_seen_while_it_is_made(tmp_path: Path) -> None:
    root = tmp_path / "running"
    plan, samples = write(str(root), finished=False, shards=0)
    store = open_store(str(root))
    with served(root) as server:
        empty = ask(server, "dataset.json")
        assert (empty.json["rows"]["row"], empty.json["finished"], empty.json["planned"]) == ([], False, ROWS)
        commit(store, plan, samples, 2)
        some = ask(server, "dataset.json")
        assert some.json["rows"]["row"] == [10, 11, 12, 13, 14]
        assert some.json["measured_by"] == "the quality gate"
        assert [ask(server, f"volumes/{row}.nii").status for row in (9, 10, 14, 15)] == [404, 200, 200, 404]
        assert ask(server, "dataset.json", If_None_Match=some.headers["ETag"]).status == 304
        for index in (0, 1, 3):
            commit(store, plan, samples, index)
        finalise(store, plan)
        whole = ask(server, "dataset.json", If_None_Match=some.headers["ETag"])
        assert (whole.status, whole.json["finished"], len(whole.json["rows"]["row"])) == (200, True, ROWS)
        publish(str(root), measured(samples))
        assert ask(server, "dataset.json").json["measured_by"] == "an evaluation"


def test_running_and_finished_say_the_same_of_a_row(tmp_path: Path) -> None:
    root = tmp_path / "dataset"
    plan, _ = write(str(root), finished=False)
    running = View(str(root)).document()[0]
    finalise(open_store(str(root)), plan)
    assert View(str(root)).document()[0] == running.replace(b'"finished":false', b'"finished":true')


def test_of_several_evaluations_one_is_chosen(tmp_path: Path) -> None:
    root = str(tmp_path / "dataset")
    _, samples = write(root)
    first, second = (publish(root, measured(samples, shift)) for shift in (1.0, 2.0))
    with served(root) as server:
        facts = ask(server, "dataset.json").json
    assert facts["measured_by"] == "the quality gate"
    assert first[:12] in facts["note"]
    assert second[:12] in facts["note"]
    for digest, shift in ((first, 1.0), (second, 2.0)):
        with served(root, digest[:8]) as server:
            facts = ask(server, "dataset.json").json
        assert facts["rows"]["measured"]["age"][0] == facts["rows"]["asked"]["age"][0] + shift
        assert facts["note"] == ""
    with pytest.raises(UserError, match="0 tables of measured values fit"):
        View(root, "nothing")


def test_damage_is_told_and_the_rest_is_shown(tmp_path: Path) -> None:
    root = tmp_path / "dataset"
    write(str(root))
    shard = root / "dataset.zarr" / "t1w" / "c" / "1" / "0" / "0" / "0"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with served(root) as server:
        answers = {row: ask(server, f"volumes/{row}.nii") for row in (0, *range(6, 10))}
    damaged = {row: answer for row, answer in answers.items() if answer.status != 200}
    assert len(damaged) == 1
    assert 0 not in damaged
    (answer,) = damaged.values()
    assert answer.status == 500
    assert "brainsynth verify" in answer.json["error"]


def test_nothing_is_written(tmp_path: Path) -> None:
    root = tmp_path / "dataset"
    _, samples = write(str(root))
    publish(str(root), measured(samples))
    before = tree(tmp_path)
    with served(root) as server:
        for name in ("", "dataset.json", "volumes/0.nii", "volumes/3.nii"):
            ask(server, name)
    assert tree(tmp_path) == before


def test_a_bucket_is_read_like_a_folder(s3_root: str, finished: Path) -> None:
    _, samples = write(s3_root)
    publish(s3_root, measured(samples))
    with served(s3_root) as server, served(finished) as local:
        here, there = (ask(s, "dataset.json").json for s in (local, server))
        assert ask(server, "volumes/2.nii").body == ask(local, "volumes/2.nii").body
    assert there["rows"] == here["rows"]


def test_the_command_prints_its_address_and_ends_when_asked(finished: Path) -> None:
    command = [sys.executable, "-m", "brainsynth", "view", str(finished), "--no-browser"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.fullmatch(r"20 rows: (http://127\.0\.0\.1:\d+/[\w-]+/)\n", line)
        assert found, line
        with urllib.request.urlopen(found[1], timeout=60) as answer:  # noqa: S310
            assert b"<!doctype html>" in answer.read()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0


def test_what_is_no_dataset_of_volumes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert brainsynth(monkeypatch, "view", tmp_path / "nothing", "--no-browser") == 2
    assert "is not a brainsynth dataset" in capsys.readouterr().err
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize(
    ("port", "what"),
    [(None, "another program has it"), (70000, "at least 0 and at most 65535"), (-1, "at least 0 and at most 65535")],
)
def test_a_port_that_cannot_be_had_is_told(
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    port: int | None,
    what: str,
) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        wanted = other.getsockname()[1] if port is None else port
        assert brainsynth(monkeypatch, "view", finished, "--port", wanted, "--no-browser") == 2
    assert re.search(f"--port:? {wanted}: .*{what}", capsys.readouterr().err)


def test_what_is_not_ours_is_as_the_notice_says() -> None:
    notice = (PAGE / "vendor" / "NOTICE.md").read_text()
    named = dict(re.findall(r"sha256  ([0-9a-f]{64})  (\S+)", notice))
    assert {sha: hashlib.sha256((PAGE / "vendor" / file).read_bytes()).hexdigest() for sha, file in named.items()} == {
        sha: sha for sha in named
    }
    assert set(named.values()) == {p.name for p in (PAGE / "vendor").iterdir()} - {"NOTICE.md", "LICENSES.txt"}
    licences = (PAGE / "vendor" / "LICENSES.txt").read_text()
    for name in ("NiiVue", "fflate", "gl-matrix", "nifti-reader-js", "array-equal", "@lukeed/uuid", "@ungap"):
        assert f"\n{name}" in licences
        assert name in notice


def test_label_maps_are_those_of_the_dataset(labelled: Path, finished: Path, tmp_path: Path) -> None:
    dataset = open_dataset(str(labelled))
    with served(labelled) as server:
        document = ask(server, "dataset.json").json
        assert [one["name"] for one in document["labels"]] == ["band 1", "band 2", "band 3"]
        assert document["labels"][0]["color"] == list(BANDS.labels[0].rgb)
        volumes = document["rows"]["label_volumes"]
        assert [column[REJECTED] for column in volumes] == [None] * 3
        np.testing.assert_allclose([column[0] for column in volumes], dataset.label_volumes.iloc[0], rtol=1e-5)
        answer = ask(server, "labels/7.nii")
        (tmp_path / "map.nii").write_bytes(answer.body)
        image: Any = nibabel.load(tmp_path / "map.nii")
        index = dataset.sample_ids.index("syn000007")
        np.testing.assert_array_equal(np.asarray(image.dataobj), dataset.label_map(index))
        np.testing.assert_array_equal(image.affine, dataset.affine)
        assert image.get_data_dtype() == np.uint8
        assert ask(server, f"labels/{REJECTED}.nii").status == 404
        assert ask(server, "labels/999.nii").body == b"row 999 has no label map\n"
    with served(finished) as server:
        assert ask(server, "labels/7.nii").status == 404
        assert ask(server, "dataset.json").json["labels"] == []


def test_a_site_holds_the_chosen_volumes_as_they_are(
    labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(uri: Path, *words: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(["view", str(uri), *words])
        return int(str(ended.value.code)), capsys.readouterr().err

    def held(key: str) -> bytes:
        start, data = (site / f"{key}.js").read_text().split(", ")
        assert start == f'brainsynthFile("{key}"'
        return gzip.decompress(base64.b64decode(data.strip()[1:-3]))

    site, view = tmp_path / "site", View(str(labelled))
    assert run(labelled, "--static", str(site), "--where", "age > 70")[0] == 0
    rows = json.loads(held("dataset.json"))["rows"]
    kept = open_dataset(str(labelled), where="age > 70")
    assert rows["row"] == list(kept.rows)
    assert len(list((site / "volumes").iterdir())) == len(list((site / "labels").iterdir())) == len(kept) > 0
    assert held(f"volumes/{kept.rows[0]}.nii") == view.volume(kept.rows[0])
    assert held(f"labels/{kept.rows[0]}.nii") == view.labels(kept.rows[0])
    assert run(labelled, "--where", "age > 70") == (
        2,
        "error: --where: only with --static; on the page, filter there\n",
    )
    code, said = run(labelled, "--static", str(tmp_path / "other"), "--where", "height > 2")
    assert code == 2
    assert "height" in said
    write(str(tmp_path / "growing"), finished=False, shards=2)
    code, said = run(tmp_path / "growing", "--static", str(tmp_path / "other"))
    assert code == 2
    assert "is not finished" in said
    assert not (tmp_path / "other").exists()
