"""brainsynth release: refused until verify and audit pass on the dataset as it is; documents pass their validators."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pandas as pd
import pytest
import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from brainsynth import cli, open_dataset
from brainsynth.audit.verdict import AUDIT_KEY, read_audit
from brainsynth.bundle.spec import BUNDLE_FILE, BundleSpec
from brainsynth.config.audit import AuditConfig
from brainsynth.config.release import ReleaseConfig
from brainsynth.config.schema import SamplerConfig
from brainsynth.covariates.schema import Covariate, CovariateSchema
from brainsynth.errors import UserError
from brainsynth.evaluation.evaluation_report import JUDGED
from brainsynth.labels import LabelTable
from brainsynth.manifest import MODEL_KEY, ModelRecord, SampleRecord, describe_sample
from brainsynth.metrics.finding import finding
from brainsynth.plan import GenerationIdentity, generation_plan, generation_samples
from brainsynth.records import seal, to_dict, unseal
from brainsynth.stages import push, release
from brainsynth.stages.audit import run as audit
from brainsynth.stages.import_bundle import PAPER
from brainsynth.storage.commit import commit_shard, write_plan
from brainsynth.storage.filesystem import open_store
from brainsynth.storage.finalise import SHARDS_KEY, SUBJECTS_KEY, finalise
from brainsynth.storage.verify import verify_dataset
from brainsynth.storage.whole_file import whole_folder
from brainsynth.volume import VolumeSpec
from tests.docs.pages import commands
from tests.instruments.heads import SHAPE, SPACING, heads
from tests.integration.test_audit import cohort
from tests.line import as_config, write_yaml
from tests.servers.hub import Hub
from tests.storage.conftest import BANDS, bands

VOLUMES, PER_SHARD, SECRET = 12, 4, "P17"
HOST = "a-machine-of-ours"
SCHEMA = CovariateSchema(
    covariates=(
        Covariate(name="age", kind="continuous", unit="years", low=18.0, high=95.0, description="Age at the scan"),
        Covariate(name="sex", kind="binary", categories=("F", "M")),
    )
)
DOCUMENTS = {
    "README.md", "MODEL_CARD.md", "LICENSE", "CITATION.cff", "croissant.json", "ro-crate-metadata.json", ".bidsignore",
    "dataset_description.json", "participants.tsv", "participants.json", "SHA256SUMS", "release.json",
    "preview.parquet",
}  # fmt: skip


SEVEN = ["Congruence", "Coverage", "Constraint", "Completeness", "Compliance", "Comprehension", "Consistency"]


class World:
    """A cohort of heads, a bundle that says it was trained on it, a dataset that says it was made with that, its audit."""

    def __init__(self, root: Path, labels: LabelTable | None = None) -> None:
        self.root, self.dataset, self.labels = root, root / "generated", labels
        self.reference = cohort(root, "reference", heads(44, 1), 1)
        grid = VolumeSpec(shape_xyz=SHAPE, spacing_mm=SPACING, origin_mm=(-76.0, -100.0, -76.0))
        trained_on = open_dataset(self.reference).manifest["plan_fingerprint"]
        self.bundle = dataclasses.replace(
            PAPER,
            name="tiny",
            covariates=SCHEMA,
            volume=grid,
            flipped_axes=(),
            licence="CC-BY-SA-4.0",
            training_data="44 invented heads",
            provenance={"cohort_fingerprint": trained_on},
        )
        (root / "bundle").mkdir()
        (root / "bundle" / BUNDLE_FILE).write_bytes(seal(self.bundle))
        self._generate(grid)
        config = {"dataset": str(self.dataset), "reference": self.reference, "bundle": str(root / "bundle")}
        config |= {"output": str(root / "audit"), "false_alarm_rate": 0.1, "pictures": False}
        config["runtime"] = {"workers": 0, "threads_per_worker": 1, "micro_batch": 16}
        self.audited = audit(as_config(config, AuditConfig, root))

    def _generate(self, grid: VolumeSpec) -> None:
        rng = np.random.default_rng(5)
        rows = pd.DataFrame({"age": rng.uniform(20, 90, VOLUMES + 1), "sex": rng.choice(["F", "M"], VOLUMES + 1)})
        samples = generation_samples(rows, SCHEMA, 0, np.arange(VOLUMES + 1) < 2)
        sampler = SamplerConfig(method="ddim", steps=5)
        identity = GenerationIdentity(bundle=self.bundle.digest, sampler=sampler, precision="float32", base_seed=0)
        plan = generation_plan(identity, grid, SCHEMA, samples, PER_SHARD, self.labels)
        store = open_store(str(self.dataset))
        write_plan(store, plan, samples)
        voxels = np.stack([grid.quantise(head) for head in heads(VOLUMES + 1, 9)])
        for index in range(plan.num_shards):
            shard = plan.shard(index)
            part = [voxels[shard.start : shard.stop]]
            part += [bands(plan, part[0])] if self.labels else []
            ids = samples["sample_id"][shard.start : shard.stop]
            records = [
                describe_sample(name, shard.start + n, [array[n] for array in part], plan=plan)
                for n, name in enumerate(ids)
            ]
            if shard.stop > VOLUMES:  # the last row failed, with a message that names a place
                reason = f"FileNotFoundError: {self.root}/bundle"
                records[-1] = SampleRecord(sample_id=ids.iloc[-1], row=VOLUMES, status="failed", reason=reason)
            runtime = {"began_at": 1_790_000_000.0 + index, "host": HOST, "pid": 987654321, "device": "cpu x86_64"}
            commit_shard(store, plan, shard, part, records, runtime)
        finalise(store, plan)
        model = ModelRecord(
            bundle=self.bundle.digest,
            name=self.bundle.name,
            licence=self.bundle.licence,
            training_data=self.bundle.training_data,
        )
        store.write(MODEL_KEY, seal(model))

    def config(self, output: Path, **changes: Any) -> dict[str, Any]:
        return {
            "dataset": str(self.dataset),
            "bundle": str(self.root / "bundle"),
            "audit": str(self.root / "audit"),
            "output": str(output),
            "title": "Invented heads",
            "description": "Heads of nobody, for tests.",
            "licence": "CC-BY-4.0",
            "source_terms": "Nobody's data was used.",
            "creators": [
                {
                    "given_names": "Ada",
                    "family_names": "Example",
                    "affiliation": "Nowhere",
                    "orcid": "0000-0002-1825-0097",
                },
                {"name": "The Example Group"},
            ],
            "contact": "https://example.org/contact",
            "published": "2026-11-26",
            "url": "https://example.org/heads",
            "doi": "10.1234/heads",
        } | changes

    def release(self, output: Path, **changes: Any) -> release.ReleaseRecord:
        return release.run(as_config(self.config(output, **changes), ReleaseConfig, self.root))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = World(tmp_path_factory.mktemp("release"))
    assert world.audited.passed, world.audited.reasons
    return world


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("labelled"), BANDS)


@pytest.fixture(scope="module")
def released(world: World) -> Path:
    output = world.root / "released"
    world.release(output)
    return output


@pytest.fixture(scope="module")
def as_bids(world: World) -> Path:
    output = world.root / "released-bids"
    world.release(output, data="bids")
    return output


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_release_holds_the_dataset_and_its_documents(world: World, released: Path) -> None:
    there = names(released)
    assert {name for name in there if "/" not in name} == DOCUMENTS
    assert verify_dataset(open_store(str(released / "data"))).ok
    np.testing.assert_array_equal(
        open_dataset(str(released / "data")).volumes(), open_dataset(str(world.dataset)).volumes()
    )
    table = pd.read_csv(released / "participants.tsv", sep="\t")
    assert list(table["participant_id"]) == [f"sub-syn{row:06d}" for row in range(VOLUMES)]
    assert set(table) == {"participant_id", *json.loads((released / "participants.json").read_text())}
    record = unseal(release.ReleaseRecord, (released / "release.json").read_bytes(), "release.json")
    assert (record.files, record.audit.verdict) == (len(there), "PASS")
    assert record.shards_digest == open_dataset(str(world.dataset)).manifest["shards_digest"]


def test_checksums_are_of_every_file_and_find_a_flipped_byte(released: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(released, copy)
    lines = (copy / "SHA256SUMS").read_text().splitlines()
    assert {line[66:] for line in lines} == names(copy) - {"SHA256SUMS", "release.json"}
    command = ["sha256sum", "--check", "--quiet", "SHA256SUMS"]
    assert subprocess.run(command, cwd=copy, capture_output=True).returncode == 0
    file = copy / "data/dataset.zarr/t1w/c/1/0/0/0"
    data = bytearray(file.read_bytes())
    data[50] ^= 1
    file.write_bytes(bytes(data))
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert done.returncode != 0
    assert "t1w/c/1/0/0/0" in done.stdout


def test_no_document_names_a_participant_or_a_folder(world: World, released: Path) -> None:
    private = [world.root.as_posix(), os.uname().nodename]
    private += [f'"{pair.subject}"' for pair in read_audit(open_store(str(world.root / "audit"))).copies.worst]
    assert len(private) > 3
    for name in DOCUMENTS - {"release.json", "SHA256SUMS", "preview.parquet"}:
        text = (released / name).read_text()
        assert [word for word in private if word in text] == [], name


def test_nothing_of_a_release_names_a_machine_or_a_place(world: World, released: Path, as_bids: Path) -> None:
    private = (world.root.as_posix(), HOST, "987654321")
    assert told(world.dataset, private) >= {f"{world.dataset.as_posix()}/{key}" for key in (SHARDS_KEY, SUBJECTS_KEY)}
    assert told(released, private) | told(as_bids, private) == set()
    subjects = pd.read_parquet(released / "data" / SUBJECTS_KEY)
    assert list(subjects["reason"][subjects["status"] == "failed"]) == ["FileNotFoundError"]
    kept = {key for text in pd.read_parquet(released / "data" / SHARDS_KEY)["runtime"] for key in json.loads(text)}
    assert kept == {"began_at", "device", "encode_s", "write_s"}


def told(folder: Path, private: tuple[str, ...]) -> set[str]:
    """Files that hold one of the words, in their bytes or in the cells of their table."""
    found = set()
    for path in (path for path in folder.rglob("*") if path.is_file()):
        data = path.read_bytes()
        if path.suffix == ".parquet":
            data += pd.read_parquet(path).to_csv().encode()
        if path.name.endswith(".gz"):
            data += gzip.decompress(data)
        if any(word.encode() in data for word in private):
            found.add(path.as_posix())
    return found


def test_every_document_says_that_it_is_ai_generated_and_its_limits(released: Path) -> None:
    marked = DOCUMENTS - {
        ".bidsignore",
        "CITATION.cff",
        "participants.tsv",
        "participants.json",
        "SHA256SUMS",
        "release.json",
        "preview.parquet",
    }
    for name in marked:
        assert "AI-generated" in (released / name).read_text(), name
    for name in ("README.md", "MODEL_CARD.md", "croissant.json", "ro-crate-metadata.json"):
        assert "Not for diagnosis, treatment" in (released / name).read_text(), name
    front = yaml.safe_load((released / "README.md").read_text().split("---\n")[1])
    assert (front["license"], front["size_categories"]) == ("cc-by-4.0", ["n<1K"])
    assert "ai-generated" in front["tags"]


def test_the_citation_file(released: Path) -> None:
    citation = yaml.safe_load((released / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["authors"][0]["orcid"] == "https://orcid.org/0000-0002-1825-0097"
    assert {"message", "title", "type", "doi", "license", "version", "date-released"} <= set(citation)


def test_the_card_fills_the_scorecard_from_what_was_measured(world: World, tmp_path: Path) -> None:
    digest = open_dataset(str(world.dataset)).manifest["shards_digest"]
    line = to_dict(finding("age: slope", "", (0.8, 0.7, 0.9), 12, (0.9, 0.8, 1.0), 20, "equal")) | {"as_real": True}
    other = line | {"metric": "coverage (k = 5)", "value": 0.123}
    within = line | {"metric": "age: slope (sex F)", "value": 0.456}
    report = {"facts": {JUDGED: digest}, "findings": [line, other, within]}
    (tmp_path / "report.json").write_text(json.dumps(report))
    world.release(tmp_path / "out", evaluation=str(tmp_path), preview=0)
    assert not (tmp_path / "out" / "preview.parquet").exists()
    card = (tmp_path / "out" / "README.md").read_text()
    rows = {
        row.split(" | ")[0][2:]: row for row in card.partition("## Scorecard")[2].splitlines() if row.startswith("| C")
    }
    assert list(rows) == SEVEN
    assert "age: slope: 0.8 [0.7, 0.9], n = 12; real 0.9" in rows["Constraint"]
    assert "coverage (k = 5): 0.123" in rows["Coverage"]
    assert "(sex F): 0.456" in rows["Consistency"]
    assert "0.456" not in rows["Constraint"]
    assert "not measured" in rows["Congruence"]
    assert f"audit PASS: 0 outright copies of {world.audited.training_people} people" in rows["Compliance"]
    record = json.loads((tmp_path / "out" / "release.json").read_text())["record"]
    assert not {"evaluation", "signing_key"} & set(record["config"])
    (tmp_path / "report.json").write_text(json.dumps({**report, "facts": {JUDGED: "0" * 64}}))
    with pytest.raises(UserError, match="is of another dataset, or another state of it"):
        world.release(tmp_path / "again", evaluation=str(tmp_path))


def test_the_preview_opens_in_datasets_and_without_it(
    world: World, released: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = open_dataset(str(world.dataset))
    table = pd.read_parquet(released / "preview.parquet")
    assert list(table["sample_id"]) == list(original.table["sample_id"][:8])
    image = nibabel.Nifti1Image.from_bytes(gzip.decompress(table["nifti"][3]["bytes"]))
    np.testing.assert_array_equal(np.asarray(image.dataobj), original.volume(3))
    np.testing.assert_array_equal(image.affine, original[3]["affine"])
    datasets = pytest.importorskip("datasets", reason="`datasets` is not installed: `pip install datasets nibabel`")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    opened = datasets.load_dataset(str(released), cache_dir=str(world.root / "hf-cache"))
    assert list(opened) == ["preview"]
    assert opened["preview"]["age"] == list(table["age"])
    np.testing.assert_array_equal(opened["preview"][3]["nifti"].get_fdata(dtype=np.float32), original.volume(3))


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Made by the commands of docs/publication.md."""
    folder = tmp_path_factory.mktemp("keys")
    typed = [c.text for c in commands("docs/publication.md") if c.text.startswith("openssl ")]
    assert len(typed) == 2
    for text in typed:
        subprocess.run(text.split(), cwd=folder, check=True, capture_output=True)
    other = ed25519.Ed25519PrivateKey.generate().public_key()
    pem = other.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / "other.pem").write_bytes(pem)
    return {name: str(folder / f"{name}.pem") for name in ("private", "public", "other")}


def verified(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(["verify", *words])
    said = capsys.readouterr()
    return int(str(ended.value.code)), said.out + said.err


def test_a_signed_release_is_verified_and_a_forged_one_refused(
    world: World, released: Path, tmp_path: Path, keys: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    signed = tmp_path / "signed"
    record = world.release(signed, signing_key=keys["private"])
    assert record.files == len(names(signed))
    assert keys["private"] not in (signed / "release.json").read_text()
    assert verified(capsys, str(signed), "--public-key", keys["public"])[0] == 0
    code, said = verified(capsys, str(signed), "--public-key", keys["other"])
    assert code == 1
    assert "was signed by another key" in said
    code, said = verified(capsys, str(released), "--public-key", keys["public"])
    assert code == 1
    assert "it is not signed" in said
    assert verified(capsys, str(released))[0] == 0
    forged = dataclasses.replace(record, verified="whatever")  # sealed anew, so that its own digest is right
    (signed / "release.json").write_bytes(seal(forged))
    assert verified(capsys, str(signed))[0] == 0
    code, said = verified(capsys, str(signed), "--public-key", keys["public"])
    assert code == 1
    assert "release.json was changed" in said
    for wrong, message in (("absent.pem", "cannot be read"), (keys["private"], "is not an Ed25519 public key")):
        code, said = verified(capsys, str(signed), "--public-key", wrong)
        assert code == 2
        assert message in said
    code, said = verified(capsys, str(world.dataset), "--public-key", keys["public"])
    assert code == 2
    with pytest.raises(UserError, match="is not an Ed25519 private key"):
        world.release(tmp_path / "none", signing_key=keys["public"])
    assert not (tmp_path / "none").exists()


def test_openssl_verifies_the_signature(world: World, tmp_path: Path, keys: dict[str, str]) -> None:
    signed = tmp_path / "signed"
    world.release(signed, signing_key=keys["private"])
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", keys["public"], "-rawin", "-in", "release.json"]
    judged = subprocess.run([*command, "-sigfile", "release.json.sig"], cwd=signed, capture_output=True, text=True)
    assert judged.returncode == 0, judged.stdout + judged.stderr


def test_verify_finds_what_was_done_to_a_release(
    released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(released, copy)
    (copy / "LICENSE").write_text("mine")
    (copy / "CITATION.cff").unlink()
    (copy / "scan.nii").write_bytes(b"x")
    (copy / ".DS_Store").write_bytes(b"x")
    code, said = verified(capsys, str(copy))
    assert code == 1
    lines = ["CITATION.cff is missing", "LICENSE is not the file that was released", "scan.nii was added"]
    assert said.splitlines()[1:] == lines
    (copy / "SHA256SUMS").write_text("")
    code, said = verified(capsys, str(copy))
    assert code == 2
    assert "is not the one that was released" in said


def broken(document: Path, folder: Path, change: Callable[[Any], None]) -> Path:
    """A changed copy, to see that a validator does look."""
    value = json.loads(document.read_text())
    change(value)
    (folder / document.name).write_text(json.dumps(value))
    return folder / document.name


@pytest.mark.parametrize("kind", ["released", "as_bids"])
def test_croissant_passes_its_validator(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    mlcroissant = pytest.importorskip(
        "mlcroissant", reason="Croissant's validator is not installed: `pip install mlcroissant`"
    )
    folder = request.getfixturevalue(kind)
    dataset = mlcroissant.Dataset(jsonld=str(folder / "croissant.json"))
    assert dataset.metadata.ctx.issues.errors == set()
    assert str(dataset.metadata.conforms_to).find("1.1") > 0
    records = list(dataset.records("participants"))
    assert len(records) == VOLUMES
    table = pd.read_csv(folder / "participants.tsv", sep="\t")
    assert [float(record["participants/age"]) for record in records] == pytest.approx(list(table["age"]))
    wrong = broken(folder / "croissant.json", tmp_path, lambda d: d["recordSet"][0]["field"][0].pop("dataType"))
    with pytest.raises(mlcroissant.ValidationError):
        mlcroissant.Dataset(jsonld=str(wrong))


def test_croissant_tells_the_provenance(world: World, released: Path) -> None:
    document = json.loads((released / "croissant.json").read_text())
    made = document["prov:wasGeneratedBy"]
    assert made["prov:used"]["@id"] == f"urn:sha256:{world.bundle.digest}"
    assert made["prov:startedAtTime"] == "2026-09-21T14:13:20+00:00"
    assert made["prov:endedAtTime"] == "2026-09-21T14:13:23+00:00"
    assert document["prov:wasDerivedFrom"]["prov:wasDerivedFrom"]["name"] == "44 invented heads"
    assert document["digitalSourceType"].endswith("trainedAlgorithmicMedia")


@pytest.fixture(scope="module")
def crate_context() -> tuple[str, Any]:
    """The validator's command and RO-Crate's context, which the crate names by its address; tests reach no network."""
    validator = os.environ.get("ROCRATE_VALIDATOR") or shutil.which("rocrate-validator")
    if not validator:
        pytest.skip(
            "RO-Crate's validator is not installed: `uv tool install roc-validator --with rocrate`, in its own place"
        )
    find = "import rocrate, pathlib; print(pathlib.Path(rocrate.__file__).parent / 'data/ro-crate.jsonld')"
    python = Path(validator).resolve().parent / "python"
    found = subprocess.run([str(python), "-c", find], capture_output=True, text=True, timeout=60)
    if found.returncode:
        pytest.skip("rocrate, which has RO-Crate's context, is not beside the validator")
    return validator, json.loads(Path(found.stdout.strip()).read_text())["@context"]


@pytest.mark.parametrize("kind", ["released", "as_bids"])
def test_everything_that_the_crate_names_is_there(kind: str, request: pytest.FixtureRequest) -> None:
    """The quick sibling of the validator's test."""
    folder = request.getfixturevalue(kind)
    graph = json.loads((folder / "ro-crate-metadata.json").read_text())["@graph"]
    entities = {entity["@id"]: entity for entity in graph}
    assert len(entities) == len(graph)

    def named(value: Any) -> list[str]:
        if isinstance(value, dict):
            return [value["@id"]] if set(value) == {"@id"} else [i for v in value.values() for i in named(v)]
        return [i for item in value for i in named(item)] if isinstance(value, list) else []

    known = {"https://w3id.org/ro/crate/1.1", "https://spdx.org/licenses/Apache-2.0"}
    assert {i for entity in graph for i in named(entity)} - set(entities) <= known
    parts = named(entities["./"]["hasPart"])
    assert len(parts) >= 8
    assert all((folder / part).exists() for part in parts)
    action = entities["#generation"]
    assert entities[action["instrument"]["@id"]]["@type"] == "SoftwareApplication"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["released", "as_bids"])
def test_ro_crate_passes_its_validator(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, crate_context: tuple[str, Any]
) -> None:
    validator, context = crate_context
    crate = tmp_path / "crate"
    shutil.copytree(request.getfixturevalue(kind), crate)

    def judge(change: Callable[[Any], Any]) -> subprocess.CompletedProcess[str]:
        broken(crate / "ro-crate-metadata.json", crate, change)
        command = [validator, "-y", "validate", "--skip-availability-check", "-p", "process-run-crate-0.5", str(crate)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    done = judge(lambda d: d["@context"].__setitem__(0, context))
    assert done.returncode == 0, done.stdout
    assert judge(lambda d: d["@graph"][2].pop("instrument")).returncode == 1


@pytest.mark.parametrize(("kind", "allowed"), [("as_bids", []), ("released", ["PARTICIPANT_ID_MISMATCH"])])
def test_bids_passes_its_validator(kind: str, allowed: list[str], request: pytest.FixtureRequest) -> None:
    """A Zarr release has no file for BIDS to find by participant; nothing else is wrong with it."""
    folder = request.getfixturevalue(kind)
    description = json.loads((folder / "dataset_description.json").read_text())
    assert description["Name"] == "Invented heads"
    assert description["GeneratedBy"][0]["Description"].startswith("AI-generated images of no real person")
    validator = Path(sys.executable).parent / "bids-validator-deno"
    if not validator.exists():
        pytest.skip("the BIDS validator is not installed: `pip install bids-validator-deno`")
    judged = subprocess.run(
        [str(validator), str(folder), "--format", "json"], capture_output=True, text=True, timeout=300
    )
    issues = json.loads(judged.stdout)["issues"]["issues"]
    assert [issue["code"] for issue in issues if issue["severity"] == "error"] == allowed


def damaged(world: World, folder: Path) -> tuple[dict[str, Any], str]:
    root = folder / "damaged"
    shutil.copytree(world.dataset, root)
    file = root / "dataset.zarr/t1w/c/0/0/0/0"
    data = bytearray(file.read_bytes())
    data[60] ^= 1
    file.write_bytes(bytes(data))
    return {"dataset": str(root)}, "NOT ok"


def no_audit(world: World, folder: Path) -> tuple[dict[str, Any], str]:
    return {"audit": str(folder)}, "holds no audit"


def failed_audit(world: World, folder: Path) -> tuple[dict[str, Any], str]:
    failed = dataclasses.replace(world.audited, verdict="FAIL", reasons=("3 outright copies",))
    (folder / AUDIT_KEY).write_bytes(seal(failed))
    return {"audit": str(folder)}, "3 outright copies"


def audit_of_another_state(world: World, folder: Path) -> tuple[dict[str, Any], str]:
    other = dataclasses.replace(world.audited, dataset_shards_digest="0" * 64)
    (folder / AUDIT_KEY).write_bytes(seal(other))
    return {"audit": str(folder)}, "another state of it"


def another_bundle(world: World, folder: Path) -> tuple[dict[str, Any], str]:
    spec: BundleSpec = dataclasses.replace(world.bundle, name="other")
    (folder / BUNDLE_FILE).write_bytes(seal(spec))
    return {"bundle": str(folder)}, "is not the bundle that made"


def no_model(world: World, folder: Path) -> tuple[dict[str, Any], str]:
    root = folder / "copy"
    shutil.copytree(world.dataset, root)
    (root / MODEL_KEY).unlink()
    return {"dataset": str(root)}, "terms of its model are not known"


def not_finished(world: World, folder: Path) -> tuple[dict[str, Any], str]:
    root = folder / "copy"
    shutil.copytree(world.dataset, root)
    (root / "dataset.json").unlink()
    return {"dataset": str(root)}, "is not finished"


def real_scans(world: World, folder: Path) -> tuple[dict[str, Any], str]:
    return {"dataset": world.reference}, "only generated datasets"


def full_output(world: World, folder: Path) -> tuple[dict[str, Any], str]:
    (folder / "out").mkdir()
    (folder / "out" / "mine").write_text("")
    return {}, "is not empty"


@pytest.mark.parametrize(
    "mistake",
    [
        damaged,
        no_audit,
        failed_audit,
        audit_of_another_state,
        another_bundle,
        no_model,
        not_finished,
        real_scans,
        full_output,
    ],
    ids=lambda mistake: mistake.__name__,
)
def test_what_did_not_pass_is_not_released(
    mistake: Callable[[World, Path], tuple[dict[str, Any], str]], world: World, tmp_path: Path
) -> None:
    changes, told = mistake(world, tmp_path)
    before = names(tmp_path)
    with pytest.raises(UserError) as refused:
        world.release(tmp_path / "out", **changes)
    assert told in str(refused.value)
    assert names(tmp_path) | {"config.yaml"} == before | {"config.yaml"}


@pytest.mark.parametrize(
    "changes",
    [
        {"licence": ""},
        {"licence": "my own licence"},
        {"creators": []},
        {"creators": [{"name": "A", "orcid": "123"}]},
        {"creators": [{"given_names": "A"}]},
        {"published": "yesterday"},
        {"version": "one"},
        {"url": "heads"},
        {"doi": "heads"},
        {"source_terms": " "},
    ],
)
def test_what_only_its_owner_knows_is_asked_for(changes: dict[str, Any], world: World, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=next(iter(changes))):
        world.release(tmp_path / "out", **changes)


def test_what_hubs_do_not_take_is_told_beforehand(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(release, "MAX_FOLDER", 2)
    with pytest.raises(UserError, match="larger samples_per_shard"):
        world.release(tmp_path / "out")
    with pytest.raises(UserError, match="release it as zarr"):
        world.release(tmp_path / "out", data="bids")
    monkeypatch.setattr(release, "MAX_BYTES", 1000)
    with pytest.raises(UserError, match="smaller samples_per_shard"):
        world.release(tmp_path / "out")


def test_the_example_of_the_page_is_a_config(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/publication.md").read_text()
    example = page.split("```yaml\n")[1].split("```")[0]
    config = as_config(yaml.safe_load(example), ReleaseConfig, tmp_path)
    assert [creator.full_name for creator in config.creators] == ["Ada Example", "The Example Group"]


def test_the_command(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(write_yaml(world.config(tmp_path / "out"), tmp_path))

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["brainsynth", "release", "--config", config, *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return int(left.value.code or 0)

    assert run("--dry-run") == 0
    assert "12 volumes" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert run("--set", f"audit={tmp_path}") == 2
    assert "brainsynth audit" in capsys.readouterr().err
    assert run() == 0
    assert (tmp_path / "out" / "release.json").exists()
    assert run() == 2  # it is there


def test_where_links_cannot_be_made_data_is_copied(
    world: World, released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("another filesystem")

    monkeypatch.setattr(release.os, "link", refuse)
    world.release(tmp_path / "out")
    stored = "data/dataset.zarr/t1w/c/0/0/0/0"
    assert (tmp_path / "out" / stored).stat().st_nlink == 1 < (released / stored).stat().st_nlink
    assert (tmp_path / "out" / "SHA256SUMS").read_bytes() == (released / "SHA256SUMS").read_bytes()


KILLED = """
import os, signal, sys
from pathlib import Path
from brainsynth.config.load import load_config
from brainsynth.config.release import ReleaseConfig
from brainsynth.stages import push, release
name = sys.argv[2]
def killed(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)
setattr(release, name, killed)
release.run(load_config(sys.argv[1], ReleaseConfig))
"""


@pytest.mark.parametrize(("at", "data"), [("_put", "bids"), ("_documents", "zarr"), ("finalise", "zarr")])
def test_what_a_killed_release_left_is_removed(at: str, data: str, world: World, tmp_path: Path) -> None:
    output = tmp_path / "out.v1"
    config = write_yaml(world.config(output, data=data), tmp_path, "release.yaml")
    (tmp_path / ".tmp-of-somebody").mkdir()
    command = [sys.executable, "-c", KILLED, str(config), at]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert killed.returncode == -9, killed.stderr
    left = {path.name for path in tmp_path.glob(".tmp-*")} - {".tmp-of-somebody"}
    assert len(left) == 1
    assert not output.exists()
    world.release(tmp_path / "another", data=data)  # of another folder: it leaves that alone
    assert (tmp_path / left.pop()).exists()
    world.release(output, data=data)
    assert {path.name for path in tmp_path.glob(".tmp-*")} == {".tmp-of-somebody"}
    assert names(output) == names(tmp_path / "another")


def test_a_release_that_is_at_work_is_left_alone(world: World, tmp_path: Path) -> None:
    with whole_folder(tmp_path / "out") as first:
        (first / "half").write_text("x")
        with pytest.raises(UserError, match="is being written by another process"):
            world.release(tmp_path / "out")
        assert (first / "half").exists()
    assert names(tmp_path / "out") == {"half"}


def test_a_folder_of_the_dataset_is_no_output(world: World, tmp_path: Path) -> None:
    for output, why in ((world.dataset, "is"), (world.dataset / "release", "lies in"), (world.root, "holds")):
        with pytest.raises(UserError, match=f"output: .* {why} the folder of the dataset"):
            world.release(output)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "Thumbs.db").write_bytes(b"x")
    with pytest.raises(UserError, match="holds only Thumbs.db, which a desktop left: delete it"):
        world.release(tmp_path / "new")
    (tmp_path / "scan.nii").write_bytes(b"x")
    with pytest.raises(UserError, match="is a file, and a folder is needed"):
        world.release(tmp_path / "scan.nii")


def test_a_desktop_s_files_do_not_stop_a_release(world: World, tmp_path: Path) -> None:
    for name in (".DS_Store", "commits/._shard-000000.json"):
        (world.dataset / name).write_bytes(b"x")
    try:
        world.release(tmp_path / "out")
    finally:
        for name in (".DS_Store", "commits/._shard-000000.json"):
            (world.dataset / name).unlink()
    assert not [name for name in names(tmp_path / "out") if "DS_Store" in name or "._" in name]


@pytest.mark.parametrize("data", ["zarr", "bids"])
def test_label_maps_are_released_with_their_images(data: str, labelled: World, tmp_path: Path) -> None:
    output = tmp_path / "released"
    labelled.release(output, data=data)
    table = pd.read_csv(output / "participants.tsv", sep="\t")
    assert set(table) == {"participant_id", *json.loads((output / "participants.json").read_text())}
    assert (table["label_volume_band_2"] > 0).all()
    assert "a label map of each, 3 structures (band 1, band 2, band 3)" in (output / "README.md").read_text()
    if data == "zarr":
        assert verify_dataset(open_store(str(output / "data"))).ok
        pairs = open_dataset(str(output / "data"))
        for sample, original in zip(pairs, open_dataset(str(labelled.dataset)), strict=True):
            np.testing.assert_array_equal(sample["labels"], original["labels"])
        assert (output / "data" / "dseg.tsv").read_bytes() == BANDS.tsv()
    else:
        assert len(list(output.glob("derivatives/labels/sub-*/anat/sub-*_dseg.nii.gz"))) == VOLUMES
        assert (output / "derivatives" / "labels" / "dseg.tsv").read_bytes() == BANDS.tsv()
    (maps,) = [
        one for one in json.loads((output / "croissant.json").read_text())["distribution"] if one["@id"] == "label-maps"
    ]
    assert list(output.glob(maps["includes"]))
    mlcroissant = pytest.importorskip(
        "mlcroissant", reason="Croissant's validator is not installed: `pip install mlcroissant`"
    )
    mlcroissant.Dataset(jsonld=str(output / "croissant.json"))
    validator = Path(sys.executable).parent / "bids-validator-deno"
    if data == "zarr" or not validator.exists():
        return
    done = subprocess.run(
        [str(validator), str(output), "--format", "json"], capture_output=True, text=True, timeout=300
    )
    issues = json.loads(done.stdout)["issues"]["issues"]
    assert [issue for issue in issues if issue["severity"] == "error"] == []


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that this process and its children talk to, by its protocol of large files."""
    constants = pytest.importorskip(
        "huggingface_hub", reason="huggingface_hub is not installed: `pip install 'brainsynth[publish]'`"
    ).constants
    hub = Hub()
    for name, value in (("HF_ENDPOINT", hub.url), ("HF_TOKEN", hub.token), ("HF_HUB_DISABLE_XET", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    yield hub
    hub.stop()


def pushed(capsys: pytest.CaptureFixture[str], folder: Path, *words: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(["push", str(folder), "--to", "ada/heads", *words])
    said = capsys.readouterr()
    return int(str(ended.value.code)), said.out + said.err


def test_a_push_that_is_killed_is_resumed(
    released: Path, hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(push, "FILES", 10)
    hub.stop_after = 4
    words = ["push", str(released), "--to", "ada/heads"]
    script = f"from brainsynth import cli; from brainsynth.stages import push; push.FILES = 10; cli.main({words})"
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert hub.reached.wait(60)
    child.kill()
    child.wait()
    first, committed = list(hub.uploads), len(hub.commits)
    assert "release.json" not in hub.files
    hub.stop_after = -1
    code, said = pushed(capsys, released)
    assert code == 0, said
    assert len(set(hub.uploads)) == len(hub.uploads) > len(first)
    assert hub.commits[-1][-1] == "release.json"
    assert max(map(len, hub.commits)) <= 10
    assert len(hub.commits) > committed
    sent = [name for commit in hub.commits for name in commit]
    assert len(sent) == len(set(sent))
    assert {name: data for name, data in hub.files.items() if name != ".gitattributes"} == {
        name: (released / name).read_bytes() for name in names(released)
    }
    assert "of which 0 were sent now" in pushed(capsys, released)[1]


def test_a_push_that_cannot_be_is_one_clear_error(
    world: World,
    released: Path,
    hub: Hub,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(folder: Path, *words: str) -> str:
        code, said = pushed(capsys, folder, *words)
        assert code == 2
        assert said.count("error") == 1
        return said

    for folder in (world.dataset, world.root / "audit", tmp_path / "nowhere"):
        assert "is not a release: release.json is missing" in refused(folder)
    copy = tmp_path / "copy"
    shutil.copytree(released, copy)
    (copy / "scan.nii").write_bytes(b"x")
    assert "scan.nii was added" in refused(copy)
    hub.files["train.csv"] = b"of somebody"
    assert "holds 1 files that are not of this release, such as train.csv" in refused(released)
    del hub.files["train.csv"]
    hub.read_only = True
    assert "the token may not write there" in refused(released)
    hub.repo = "ada/other"
    assert "there is no such dataset repository" in refused(released)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "the token is missing or not valid" in refused(released)
    assert hub.commits == []
    code, said = pushed(capsys, released, "--dry-run")
    assert code == 0
    assert "nothing was sent" in said
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    assert "run the same command again to resume" in refused(released)
