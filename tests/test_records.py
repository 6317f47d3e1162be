"""Records: strict when read, canonical when written, and no flipped bit goes unnoticed."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

from brainsynth.errors import OtherVersion, UserError, problems_error
from brainsynth.manifest import ObjectRecord, SampleRecord, ShardManifest
from brainsynth.records import canonical_json, digest, from_dict, seal, to_dict, unseal

SAMPLE = SampleRecord(sample_id="sübject1", row=3, status="ok", voxel_sha256="ab", mean=0.25, p99=1e-05, extra={"n": 1})
RECORD = ShardManifest(
    plan_fingerprint="0f" * 8,
    shard=7,
    objects=(ObjectRecord(array="t1w", key="a/b", size_bytes=12, sha256="cd"),),
    samples=(SAMPLE,),
    runtime={"host": "x", "pid": 4, "make_s": 0.5},
)


def test_seal_and_unseal() -> None:
    assert unseal(ShardManifest, seal(RECORD), "here") == RECORD
    assert from_dict(ShardManifest, to_dict(RECORD), "here") == RECORD
    assert seal(RECORD) == seal(unseal(ShardManifest, seal(RECORD), "here"))


def test_every_flipped_bit_is_noticed_or_harmless() -> None:
    data = seal(RECORD)
    noticed = harmless = 0
    for bit in range(len(data) * 8):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            assert unseal(ShardManifest, bytes(damaged), "here") == RECORD, f"bit {bit} changed the record unnoticed"
            harmless += 1
        except UserError as error:
            assert str(error).startswith("here is damaged")
            noticed += 1
    assert noticed > 20 * harmless


def test_the_schema_is_written_and_another_version_is_told() -> None:
    sealed = json.loads(seal(RECORD))
    assert sealed["schema"] == "ShardManifest/1"
    content = {"record": sealed["record"], "schema": "ShardManifest/2"}
    later = content | {"sha256": digest(content)}
    with pytest.raises(OtherVersion, match="'ShardManifest/2', this brainsynth reads 'ShardManifest/1'"):
        unseal(ShardManifest, (json.dumps(later, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode(), "here")
    first = {"record": sealed["record"], "sha256": digest(sealed["record"])}
    data = (json.dumps(first, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()
    assert unseal(ShardManifest, data, "here") == RECORD, "the first records had none"


@pytest.mark.parametrize("left", [0, 1, 0.5, -3])
def test_a_truncated_record_is_noticed(left: float) -> None:
    data = seal(RECORD)
    with pytest.raises(UserError, match="here is damaged"):
        unseal(ShardManifest, data[: int(left * len(data)) if 0 < left < 1 else int(left)], "here")


@pytest.mark.parametrize(
    "data",
    [b"[1]", b'"record"', b"null", b'{"record": {}}', b"\xff\xfe", b'{"record": 1e999, "sha256": ""}',
     b'{"record": "\\ud800", "sha256": ""}', b'{"record": ' + b"[" * 100_000, b'{"record": {}, "sha256": 5, "more": 1}'],
)  # fmt: skip
def test_what_is_no_record_is_told(data: bytes) -> None:
    with pytest.raises(UserError, match="here is damaged"):
        unseal(ShardManifest, data, "here")


def forged(body: Any) -> bytes:
    sealed = {"record": body, "sha256": digest(body)}
    return (json.dumps(sealed, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def test_not_even_white_space_may_change() -> None:
    data = seal(RECORD)
    assert unseal(ShardManifest, data, "here") == RECORD
    for other in (data[:-1], data + b"\n", data.replace(b"\n ", b"\n  ", 1), json.dumps(json.loads(data)).encode()):
        with pytest.raises(UserError, match="does not match its own sha256"):
            unseal(ShardManifest, other, "here")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"shard": "7"}, "shard: Input should be a valid integer"),
        ({"shard": 7.5}, "shard: "),
        ({"stray": 1}, "stray: Unexpected keyword argument"),
        ({"schema_version": 2}, "schema_version: Input should be 1"),
        ({"samples": None}, "samples: "),
    ],
)
def test_a_record_of_another_shape_or_version_is_refused(change: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match="here is not a valid ShardManifest") as caught:
        unseal(ShardManifest, forged({**to_dict(RECORD), **change}), "here")
    assert told in str(caught.value)


def test_a_missing_field_is_named_by_its_place() -> None:
    body = to_dict(RECORD)
    del body["samples"][0]["row"]
    with pytest.raises(UserError, match=r"samples\.0\.row: Field required"):
        from_dict(ShardManifest, body, "here")


def test_not_a_number_is_refused_when_read_and_when_sealed() -> None:
    body = {**to_dict(SAMPLE), "mean": float("nan")}
    with pytest.raises(UserError, match="mean: Input should be a finite number"):
        from_dict(SampleRecord, body, "here")
    with pytest.raises(ValueError, match="not JSON compliant"):
        seal(replace(SAMPLE, mean=float("inf")))


def test_records_are_frozen_and_named() -> None:
    with pytest.raises(FrozenInstanceError):
        SAMPLE.row = 4  # type: ignore[misc]
    with pytest.raises(TypeError):
        SampleRecord("x", 1, "ok")  # type: ignore[misc]


def test_digests_do_not_depend_on_order_and_stay_what_they_were() -> None:
    assert canonical_json({"b": [1.0, "é"], "a": None}) == '{"a":null,"b":[1.0,"é"]}'.encode()
    assert digest({"b": 1, "a": 2}) == digest({"a": 2, "b": 1})
    assert digest({"a": 1}) != digest({"a": 1.0})
    # A stored dataset is found again by these: they may never change.
    assert digest({"a": 1, "b": "é"}) == "09ad9fd2fb648cb2f62141215828ea00a62c299db05d20aa9ade2f527a301cc6"
    assert digest(SAMPLE) == "844d60b4de3a016adea4a49a504000d28f68bbbc25ad7fc9f0e31be2b5d8a6ee"


def test_many_problems_are_cut_and_counted() -> None:
    text = str(problems_error("bad table", [f"row {i}" for i in range(25)]))
    assert text.splitlines()[0] == "bad table (25 problems)"
    assert text.splitlines()[-1] == "  … and 5 more"
    assert len(text.splitlines()) == 22
    assert str(problems_error("bad", ["one"])) == "bad (1 problem)\n  one"
