"""A quality gate ⇄ one safetensors file (half a megabyte for a head in blocks of 8 mm)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from brainsynth.bundle.generator import ModelSpec
from brainsynth.bundle.spec import GATE_FILE
from brainsynth.errors import UserError
from brainsynth.gate.features import COARSE_MM, blocks
from brainsynth.gate.gate import GateSpec, QualityGate
from brainsynth.gate.maps import COMPONENTS, CoarseMaps, Subspace
from brainsynth.instruments.linear_ruler import LinearRuler
from brainsynth.instruments.tissue_features import tissue_length
from brainsynth.records import canonical_json, from_dict, to_dict

MAX_BYTES = 64 << 20
METADATA_KEY = "quality_gate"
_RULER_PARTS = ("mean", "weights")
_PARTS, _SINGLE = ("mean", "components", "spread", "rough"), ("certain", "direction")


def is_sound(envelope: npt.NDArray[np.floating[Any]]) -> bool:
    """Whether a gate can judge by it: volumes that are all alike leave spreads of 0 and limits that are not finite."""
    return bool(np.isfinite(envelope).all() and (envelope[:, 1:] > 0).all())


def gate_tensors(gate: QualityGate) -> dict[str, npt.NDArray[Any]]:
    """Name → array: the envelope in float64, the maps (I, J, K) in float16, which they are rounded to anyway."""
    tensors: dict[str, npt.NDArray[Any]] = {"gate.envelope": gate.envelope}
    tensors |= {f"gate.{name}": getattr(gate.maps, name) for name in _SINGLE}
    for kind in ("bright", "filled"):
        tensors |= {f"gate.{kind}.{part}": getattr(getattr(gate.maps, kind), part) for part in _PARTS}
    tensors = {
        k: np.ascontiguousarray(v, np.float64 if k == "gate.envelope" else np.float16) for k, v in tensors.items()
    }
    for spec, ruler in zip(gate.spec.rulers, gate.rulers, strict=True):
        tensors |= {f"ruler.{spec.name}.{part}": getattr(ruler, part) for part in _RULER_PARTS}
    return tensors


def gate_from_tensors(spec: GateSpec, tensors: dict[str, npt.NDArray[Any]], where: str) -> QualityGate:
    """The gate of a record and its arrays. Raises UserError when an array is missing, unknown, misshapen or not finite."""
    block = blocks(spec.volume.shape_xyz, spec.volume.spacing_mm, COARSE_MM)
    grid = tuple(-(-n // b) for n, b in zip(spec.volume.shape_xyz, block, strict=True))
    wanted: dict[str, tuple[int, ...]] = {"gate.envelope": (len(spec.names), 4)}
    wanted |= {f"gate.{name}": grid for name in _SINGLE}
    for kind in ("bright", "filled"):
        wanted |= {f"gate.{kind}.{part}": grid for part in _PARTS if part != "components"}
        wanted[f"gate.{kind}.components"] = (min(COMPONENTS, _leading(tensors, f"gate.{kind}.components")), *grid)
    features = tissue_length(spec.volume) if spec.rulers else 0
    wanted |= {f"ruler.{ruler.name}.{part}": (features,) for ruler in spec.rulers for part in _RULER_PARTS}
    wrong = sorted(set(wanted) ^ set(tensors))
    wrong += [k for k in wanted if k in tensors and tensors[k].shape != wanted[k]]
    wrong += [k for k in wanted if k in tensors and not np.isfinite(tensors[k]).all()]
    if not wrong and not is_sound(tensors["gate.envelope"]):
        wrong.append("gate.envelope")
    if wrong:
        raise UserError(f"{where} is not a quality gate for {spec.volume.shape_xyz} voxels: see {', '.join(wrong[:5])}")
    envelope = tensors["gate.envelope"].astype(np.float64)
    maps = {k: v.astype(np.float32) for k, v in tensors.items() if k != "gate.envelope"}
    bright, filled = (Subspace(*(maps[f"gate.{kind}.{part}"] for part in _PARTS)) for kind in ("bright", "filled"))
    rulers = tuple(
        LinearRuler(
            kind="continuous",
            mean=maps[f"ruler.{ruler.name}.mean"],
            weights=maps[f"ruler.{ruler.name}.weights"],
            intercept=ruler.intercept,
            calibration=ruler.calibration,
        )
        for ruler in spec.rulers
    )
    coarse = CoarseMaps(bright=bright, filled=filled, certain=maps["gate.certain"], direction=maps["gate.direction"])
    return QualityGate(spec, envelope, coarse, rulers)


def _leading(tensors: dict[str, npt.NDArray[Any]], name: str) -> int:
    return max(1, tensors[name].shape[0]) if name in tensors and tensors[name].ndim else 1


def save_gate(gate: QualityGate, path: Path) -> None:
    """Write a gate as one safetensors file, its record in the metadata."""
    save_file(gate_tensors(gate), path, metadata={METADATA_KEY: canonical_json(to_dict(gate.spec)).decode()})


def load_gate(path: Path) -> QualityGate:
    """Read what `save_gate` wrote. Raises UserError when it is missing, damaged or something else."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path} is not a quality gate: it is larger than {MAX_BYTES >> 20} MiB")
        with safe_open(path, framework="numpy") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except FileNotFoundError:
        raise UserError(f"there is no quality gate at {path}; fit one on the training cohort") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if text is None:
        raise UserError(f"{path} is not a quality gate: it has no record {METADATA_KEY!r} in its metadata")
    try:
        body = json.loads(text)
    except ValueError:
        raise UserError(f"{path} is damaged: its record is not JSON") from None
    return gate_from_tensors(from_dict(GateSpec, body, str(path)), tensors, str(path))


def load_bundle_gate(folder: Path, bundle: ModelSpec) -> QualityGate:
    """The gate of a bundle whose files were checked. Raises UserError when it is damaged or for another grid."""
    gate = load_gate(folder / GATE_FILE)
    if (gate.spec.volume.shape_xyz, gate.spec.volume.spacing_mm) != (bundle.volume.shape_xyz, bundle.volume.spacing_mm):
        raise UserError(f"{folder / GATE_FILE} is for volumes of another grid than the bundle's")
    return gate
