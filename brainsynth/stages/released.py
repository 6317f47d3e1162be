"""A release as others get it: its record, whether every file is the one that was released, and who signed it."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from brainsynth.cards.facts import AuditSummary
from brainsynth.config.release import ReleaseConfig
from brainsynth.errors import UserError
from brainsynth.records import record, unseal
from brainsynth.stages.verify import RELEASE_KEY
from brainsynth.storage.keys import is_of_desktop
from brainsynth.storage.whole_file import file_sha256

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

SUMS, SIGNATURE_KEY = "SHA256SUMS", "release.json.sig"


@record
class ReleaseRecord:
    """`release.json`: what was released, sealed; written last."""

    config: ReleaseConfig
    """As asked for, but for the paths, which are empty: of what they name, the digests are here."""
    plan_fingerprint: str
    shards_digest: str
    bundle: str
    verified: str
    audit: AuditSummary
    files: int
    size_bytes: int
    sums_sha256: str
    """Of SHA256SUMS, and through it of every file."""


def read_release(folder: Path) -> ReleaseRecord:
    """Raises UserError for a folder that `brainsynth release` did not write."""
    try:
        data = (folder / RELEASE_KEY).read_bytes()
    except OSError:
        raise UserError(
            f"{folder} is not a release: {RELEASE_KEY} is missing; `brainsynth release` makes one, of a dataset that was "
            "verified and audited"
        ) from None
    return unseal(ReleaseRecord, data, f"{folder}/{RELEASE_KEY}")


def sums(folder: Path, released: ReleaseRecord) -> dict[str, str]:
    """File → sha256, of every file but SHA256SUMS, `release.json` and its signature. Raises UserError for changed sums."""
    if not (folder / SUMS).is_file() or file_sha256(folder / SUMS) != released.sums_sha256:
        raise UserError(f"{folder}/{SUMS} is not the one that was released: its sha256 is not that of {RELEASE_KEY}")
    lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    return {line[66:]: line[:64] for line in lines}


def changed(folder: Path, wanted: dict[str, str]) -> list[str]:
    """What of a release is lost, changed or left over, a line each; every file is read."""
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    strays = {name for name in there - {*wanted, SUMS, RELEASE_KEY, SIGNATURE_KEY} if not is_of_desktop(name)}
    lost = dict.fromkeys(wanted.keys() - there, "is missing")
    other = {
        name: "is not the file that was released"
        for name, digest in wanted.items()
        if name in there and file_sha256(folder / name) != digest
    }
    return [f"{name} {what}" for name, what in sorted({**lost, **other, **dict.fromkeys(strays, "was added")}.items())]


def signing_key(path: str) -> Ed25519PrivateKey:
    """The private key of a PEM file. Raises UserError."""
    ed25519 = _ed25519()
    return _key(path, "signing_key", "private", ed25519.Ed25519PrivateKey)  # type: ignore[no-any-return]


def signature_problem(folder: Path, public_key: str) -> str:
    """Why `release.json` is not signed by the owner of a public key (a PEM file); empty where it is.

    Raises UserError for a file that is not such a key.
    """
    ed25519 = _ed25519()
    from cryptography.exceptions import InvalidSignature

    key = _key(public_key, "--public-key", "public", ed25519.Ed25519PublicKey)
    if not (folder / SIGNATURE_KEY).is_file():
        return f"it is not signed: {SIGNATURE_KEY} is missing"
    try:
        key.verify((folder / SIGNATURE_KEY).read_bytes(), (folder / RELEASE_KEY).read_bytes())
    except InvalidSignature:
        return f"{RELEASE_KEY} was changed, or was signed by another key than {public_key}"
    return ""


def _ed25519() -> ModuleType:
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ModuleNotFoundError:
        raise UserError(
            "signatures need cryptography, which is not installed: pip install 'brainsynth[publish]'"
        ) from None
    return ed25519


def _key(path: str, where: str, kind: str, wanted: type) -> Any:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization

    try:
        data = Path(path).expanduser().read_bytes()
        key: Any = (
            serialization.load_pem_private_key(data, None)
            if kind == "private"
            else serialization.load_pem_public_key(data)
        )
    except OSError as error:
        raise UserError(f"{where}: {path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, UnsupportedAlgorithm):  # TypeError: it has a password
        key = None
    if not isinstance(key, wanted):
        raise UserError(
            f"{where}: {path} is not an Ed25519 {kind} key in a PEM file without a password; docs/publication.md has "
            "the commands that make one"
        )
    return key
