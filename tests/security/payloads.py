"""Files that run code in a reader that trusts them: each, when it is executed, makes a folder, the flag."""

from __future__ import annotations

import io
import json
import pickle
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

REPO = Path(__file__).parents[2]


class Trap:
    """An object whose pickle makes the flag when it is read."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.makedirs, (str(self.flag), 0o700, True)


def pickled(flag: Path) -> bytes:
    """A bare pickle."""
    return pickle.dumps(Trap(flag))


def torch_saved(flag: Path, zipped: bool) -> bytes:
    """What `torch.save` writes, in its new or its old container."""
    import torch

    buffer = io.BytesIO()
    torch.save({"weight": Trap(flag)}, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def npy(flag: Path) -> bytes:
    """An object array."""
    buffer = io.BytesIO()
    np.save(buffer, np.array([Trap(flag)], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def npz(flag: Path) -> bytes:
    """An archive of object arrays."""
    buffer = io.BytesIO()
    np.savez(buffer, weight=np.array([Trap(flag)], dtype=object))
    return buffer.getvalue()


def slippery_zip(target: str) -> bytes:
    """An archive with members that leave the folder it is unpacked into."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(f"../../{target}", "escaped")
        archive.writestr(f"/tmp/{target}", "escaped")  # noqa: S108
    return buffer.getvalue()


def linked_tar(target: str) -> bytes:
    """An archive with a link to a folder outside, and a file that is written through it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        link = tarfile.TarInfo("out")
        link.type, link.linkname = tarfile.SYMTYPE, "/tmp"  # noqa: S108
        archive.addfile(link)
        member = tarfile.TarInfo(f"out/{target}")
        member.size = 7
        archive.addfile(member, io.BytesIO(b"escaped"))
    return buffer.getvalue()


def safetensors(header: bytes, size: int | None = None, data: bytes = b"") -> bytes:
    """A safetensors file with this header, and a word on the header's size that may be a lie."""
    return struct.pack("<Q", len(header) if size is None else size) + header + data


def deep_json(depth: int = 200_000) -> bytes:
    """Nested lists that end a reader which recurses."""
    return b'{"sha256": "0", "record": ' + b"[" * depth + b"]" * depth + b"}"


def parquet(column: pa.Array, metadata: dict[bytes, bytes]) -> bytes:
    """A table whose `age` says that it is of an extension type."""
    table = pa.table({"age": column})
    field = table.schema.field("age").with_metadata(metadata)
    buffer = io.BytesIO()
    pq.write_table(table.cast(pa.schema([field])), buffer)
    return buffer.getvalue()


def monai_config(flag: Path) -> dict[str, Any]:
    """A config that MONAI's own parser would run."""
    return {
        "imports": [f"$__import__('os').makedirs({str(flag)!r}, exist_ok=True)"],
        "network": {"_target_": "os.makedirs", "name": str(flag), "exist_ok": True},
        "licence": f"$__import__('os').makedirs({str(flag)!r}, exist_ok=True)",
    }


def yaml_object(flag: Path) -> str:
    """A YAML tag that calls a function."""
    return f"output: !!python/object/apply:os.makedirs [{str(flag)!r}]\n"


def yaml_bomb() -> str:
    """Ten levels of ten aliases each."""
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    return "\n".join(levels) + "\n"


_PROOF = """
import io, json, pickle, sys
from pathlib import Path
import numpy as np, torch, yaml
from numcodecs import pickles
folder = Path(sys.argv[1])
read = lambda name: (folder / name).read_bytes()
pickle.loads(read("pickle"))
torch.load(io.BytesIO(read("torch-zip")), weights_only=False)
torch.load(io.BytesIO(read("torch-old")), weights_only=False)
np.load(io.BytesIO(read("npy")), allow_pickle=True)
np.load(io.BytesIO(read("npz")), allow_pickle=True)["weight"]
yaml.unsafe_load(read("yaml").decode())
import torch.distributed.checkpoint as dcp
try:
    dcp.load({"weight": torch.zeros(1)}, checkpoint_id=str(folder / "dcp"))
except BaseException as error:  # its own kind is no Exception
    print("dcp ended in", type(error).__name__)
from monai.bundle import ConfigParser
parser = ConfigParser(json.loads(read("monai")))
parser.get_parsed_content("licence")
"""
LIVE = ("pickle", "torch-zip", "torch-old", "npy", "npz", "yaml", "dcp", "monai")


def live_payloads(folder: Path) -> dict[str, bool]:
    """Reads each payload the trusting way, in a process of its own, and says which made its flag: all must."""
    flags = {name: folder / f"flag-{name}" for name in LIVE}
    files = {
        "pickle": pickled(flags["pickle"]),
        "torch-zip": torch_saved(flags["torch-zip"], True),
        "torch-old": torch_saved(flags["torch-old"], False),
        "npy": npy(flags["npy"]),
        "npz": npz(flags["npz"]),
        "yaml": yaml_object(flags["yaml"]).encode(),
        "monai": json.dumps(monai_config(flags["monai"])).encode(),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / "dcp").mkdir()
    (folder / "dcp" / ".metadata").write_bytes(pickled(flags["dcp"]))
    command = [sys.executable, "-c", _PROOF, str(folder)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return {name: flag.is_dir() for name, flag in flags.items()}
