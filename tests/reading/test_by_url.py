"""A dataset on a web server that gives files and parts of files, and nothing else: no list, no writing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from brainsynth import open_dataset
from brainsynth.errors import UserError
from brainsynth.manifest import describe_sample
from brainsynth.storage import object_store
from brainsynth.storage.commit import commit_shard, write_plan
from brainsynth.storage.filesystem import open_store
from brainsynth.storage.finalise import finalise
from brainsynth.volume import VolumeSpec
from tests.reading import conftest
from tests.servers.static import StaticServer

INDEX = "dataset.zarr/t1w/c/0/0/0/0"


@pytest.fixture
def served(finished: Path) -> Iterator[StaticServer]:
    server = StaticServer(finished)
    yield server
    server.stop()


def test_samples_are_those_of_the_folder(served: StaticServer, intensities: np.ndarray) -> None:
    opened = open_dataset(served.url)
    np.testing.assert_array_equal(opened.volumes(), intensities)
    assert opened.table.equals(open_dataset(str(served.folder)).table)
    assert {request.method for request in served.requests} == {"GET"}
    assert not [request.path for request in served.requests if request.path.endswith("/")], "a list was asked for"


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three volumes of 160×224×160 in one shard."""
    root = tmp_path_factory.mktemp("large") / "dataset"
    plan, samples = conftest.plan_of(3, samples_per_shard=4)
    volume = VolumeSpec(shape_xyz=(160, 224, 160), spacing_mm=(1.0, 1.0, 1.0), origin_mm=(0.0, 0.0, 0.0))
    from brainsynth.plan import generation_identity, generation_plan

    plan = generation_plan(generation_identity(plan), volume, plan.covariates, samples, 4)
    store = open_store(str(root))
    write_plan(store, plan, samples)
    rng = np.random.default_rng(0)
    voxels = np.stack([volume.quantise(rng.random(volume.shape_xyz, np.float32)) for _ in range(3)])
    records = [describe_sample(samples["sample_id"][row], row, [voxels[row]]) for row in range(3)]
    commit_shard(store, plan, plan.shard(0), [voxels], records, {})
    finalise(store, plan)
    return root


def test_a_patch_costs_its_chunks_and_the_index(large: Path) -> None:
    server = StaticServer(large)
    opened, local = open_dataset(server.url), open_dataset(str(large))
    data = (large / INDEX).read_bytes()
    chunks = 64
    index = np.frombuffer(data[-16 * 4 * chunks - 4 : -4], "<u8").reshape(4, 4, 4, 4, 2)
    for row, start in enumerate([(3, 5, 7), (40, 56, 40), (96, 160, 96)]):
        opened.shape  # noqa: B018 the array's metadata, before the patch is counted
        server.requests.clear()
        np.testing.assert_array_equal(opened.patch(row, start, 64), local.patch(row, start, 64))
        first, last = np.divide(start, (40, 56, 40)).astype(int), np.divide(np.add(start, 63), (40, 56, 40)).astype(int)
        touched = index[row][tuple(slice(a, b + 1) for a, b in zip(first, last, strict=True))][..., 1]
        tails = [request for request in server.requests if request.asked.startswith("bytes=-")]
        assert len(tails) == (1 if row == 0 else 0), "the index is read once"
        read = sum(request.size for request in server.requests)
        assert read <= 1.2 * touched.sum() + 16 * 4 * chunks + 4
        assert read < 0.4 * len(data)
        assert len(server.requests) <= touched.size + len(tails)
    server.stop()


LOADER = """
import sys

import numpy as np
from torch.utils.data import DataLoader, RandomSampler

import brainsynth

if __name__ == "__main__":
    remote, local = brainsynth.open_dataset(sys.argv[1]), brainsynth.open_dataset(sys.argv[2])
    sampler = RandomSampler(remote, replacement=True, num_samples=1000)
    loader = DataLoader(
        remote.torch(patch=8), 8, sampler=sampler, num_workers=2, multiprocessing_context="forkserver", timeout=120
    )
    places = {name: place for place, name in enumerate(local.sample_ids)}
    right = 0
    for batch in loader:
        for name, start, image in zip(batch["sample_id"], batch["start"].tolist(), batch["image"].numpy(), strict=True):
            right += np.array_equal(image[0], local.patch(places[name], start, 8))
    print(right, "of 1000 patches")
"""


def test_a_thousand_patches_from_two_workers(served: StaticServer, tmp_path: Path) -> None:
    (tmp_path / "loader.py").write_text(LOADER)
    command = [sys.executable, str(tmp_path / "loader.py"), served.url, str(served.folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "1000 of 1000 patches", done.stderr
    assert len([request for request in served.requests if request.path.endswith(INDEX)]) > 50, (
        "not read from the server"
    )


def test_a_cache_is_asked_first_and_never_trusted(served: StaticServer, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = open_dataset(served.url, cache=str(cache)).volume(3)
    served.requests.clear()
    again = open_dataset(served.url, cache=str(cache))
    np.testing.assert_array_equal(again.volume(3), first)
    asked = [request.path for request in served.requests]
    assert asked == ["/dataset.json", "/dataset.zarr/t1w/zarr.json"], "what the digest covers comes from the cache"
    for entry in cache.rglob("*"):  # cut by a kill, or changed by somebody
        if entry.is_file():
            entry.write_bytes(entry.read_bytes()[:-1] + b"?")
    np.testing.assert_array_equal(open_dataset(served.url, cache=str(cache)).volume(3), first)
    assert len(list(cache.iterdir())) == 1, "one folder, by the dataset's digest"


def test_a_damaged_chunk_is_an_error_and_is_not_kept(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(finished), str(copy)], check=True)
    whole = (copy / INDEX).read_bytes()
    server = StaticServer(copy)
    damaged = bytearray(whole)
    damaged[100] ^= 1
    (copy / INDEX).write_bytes(damaged)
    with pytest.raises(ValueError, match="the volume of row 0 is lost or damaged"):
        open_dataset(server.url, cache=str(tmp_path / "cache")).volume(0)
    (copy / INDEX).write_bytes(whole)
    assert open_dataset(server.url, cache=str(tmp_path / "cache")).volume(0).max() > 0.5
    server.stop()


def test_a_disk_that_is_full_keeps_nothing_and_reading_continues(
    served: StaticServer, tmp_path: Path, intensities: np.ndarray
) -> None:
    (tmp_path / "cache").write_text("a file in the place of the folder")
    opened = open_dataset(served.url, cache=str(tmp_path / "cache"))
    np.testing.assert_array_equal(opened.volume(0), intensities[0])


def test_what_goes_wrong_is_said(served: StaticServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="there is no finished dataset at http.*nowhere"):
        open_dataset(f"{served.url}/nowhere")
    opened = open_dataset(served.url)
    assert opened.shape
    served.ranges = False
    with pytest.raises(UserError, match="it does not give parts of files; copy the dataset, or serve it by"):
        opened.volume(0)
    served.status = 403
    with pytest.raises(UserError, match="cannot read http.*HTTP 403; access is refused"):
        opened.volume(0)
    monkeypatch.setattr(object_store, "WEB_ATTEMPTS", 2)
    served.status = 503
    with pytest.raises(UserError, match=r"HTTP 503 \(try 2"):
        opened.volume(0)
    served.status, served.delay_s = 0, 1.5
    monkeypatch.setattr(object_store, "WEB_SECONDS", 0.2)
    with pytest.raises(UserError, match=r"no answer within 0.2 s \(try 3.*check the address and the network"):
        open_dataset(served.url)
    with pytest.raises(UserError, match="Connection refused.*check the address"):
        open_dataset("http://127.0.0.1:9/brains")
    with pytest.raises(UserError, match="write hf://datasets/OWNER/NAME"):
        open_dataset("hf://datasets/nobody")


def test_measured_values_need_a_list(served: StaticServer) -> None:
    with pytest.raises(UserError, match="this server cannot list or write files"):
        open_dataset(served.url, measured=True)


def test_a_hub_that_redirects_to_its_storage(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, intensities: np.ndarray
) -> None:
    repository = tmp_path / "datasets" / "lab" / "brains" / "resolve" / "v1"
    repository.mkdir(parents=True)
    (repository / "data").symlink_to(finished)
    storage, hub = StaticServer(tmp_path), StaticServer(tmp_path)
    hub.redirect = storage.url.replace("127.0.0.1", "localhost")
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", "hf_canary0001")
    opened = open_dataset("hf://datasets/lab/brains@v1/data")
    np.testing.assert_array_equal(opened.volume(5), intensities[5])
    assert {request.token for request in hub.requests} == {"Bearer hf_canary0001"}
    assert {request.token for request in storage.requests} == {""}, "the token went on to another host"
    assert storage.requests[0].path == "/datasets/lab/brains/resolve/v1/data/dataset.json"
    for server in (hub, storage):
        server.stop()
