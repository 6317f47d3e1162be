"""Names of objects: what a store accepts as a key, and what it may show of an address."""

from __future__ import annotations

import os
import re
import urllib.parse
from pathlib import Path

from brainsynth.errors import UserError

_MAX_KEY_BYTES = 900
_SECRET_VARIABLE = re.compile(
    r"(AWS|AZURE|GOOGLE|GCS).*(SECRET|TOKEN|KEY|PASSWORD|SAS|CREDENTIAL|ACCOUNT$)", re.IGNORECASE
)
_SECRET_IN_TEXT = (
    (re.compile(r"(://)[^/\s@]+@"), r"\1***@"),
    (re.compile(r"\?[^\s\"'<>,;)]+"), "?***"),
    (
        re.compile(r"(?i)\b(bearer|credential|signature|signedheaders|authorization|token)(\s*[=:]\s*|\s+)\S+"),
        r"\1\2***",
    ),
)

_OF_DESKTOP = re.compile(
    r"\._.*|\.DS_Store|\.localized|Icon\r|\.(Spotlight-V100|Trashes|fseventsd|TemporaryItems|DocumentRevisions-V100)"
    r"|\.apdisk|__MACOSX|Thumbs\.db(:encryptable)?|ehthumbs(_vista)?\.db|[Dd]esktop\.ini|\$RECYCLE\.BIN"
    r"|System Volume Information|\.directory|\.Trash-\d+|\.nfs[0-9a-f]{16,}|@eaDir|\.snapshot|lost\+found"
    r"|\.fuse_hidden[0-9a-f]+|\.ipynb_checkpoints|\.~lock\..*#|~\$.+",
)


def check_key(key: str, root: str, empty: bool = False) -> str:
    """The key itself, when it names something below its root whatever kind of store reads it. Raises UserError.

    A key comes from our own layout or from a manifest that somebody else wrote. It is judged as it stands and as a web
    client might decode it, so that no spelling of `..` means a folder above.
    """
    if empty and key == "":
        return key
    shown = ascii(key)[:120]
    try:
        too_long = len(key.encode()) > _MAX_KEY_BYTES
    except UnicodeEncodeError:
        too_long = True
    plain = urllib.parse.unquote(urllib.parse.unquote(key))
    for spelling in (key, plain):
        parts = spelling.split("/")
        bad = any(part in ("", ".", "..") for part in parts) or re.match(r"[A-Za-z]:$", parts[0])
        if bad or too_long or "\\" in spelling or any(ord(c) < 32 or ord(c) == 127 for c in spelling):
            raise UserError(f"the key {shown} is refused: it leaves the folder {scrub(root)}, or no object can have it")
    return key


def file_path(uri: str) -> str:
    """The path behind a file:// address: as it is written, if something is there, else with `%20` and the like replaced."""
    path = "/" + uri.removeprefix("file://").removeprefix("localhost/").lstrip("/")
    return path if os.path.exists(path) else urllib.parse.unquote(path)


def check_address(uri: str) -> str:
    """The URI itself, when it carries no credentials. Raises UserError, without showing them."""
    shown = scrub(re.split("[?#]", uri)[0])
    try:
        parts = urllib.parse.urlsplit(uri)
    except ValueError as error:
        raise UserError(f"cannot open {shown}: {error}") from None
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise UserError(
            f"cannot open {shown}: an address is written into records and logs, so it must not carry credentials, a query "
            "or a #; put credentials into the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, …)"
        )
    return uri.rstrip("/") if parts.netloc else uri


def scrub(text: str) -> str:
    """The text without secrets: values of the environment's credentials, user parts and queries of addresses."""
    for name, value in os.environ.items():
        if len(value) >= 6 and _SECRET_VARIABLE.match(name):
            text = text.replace(value, "***").replace(urllib.parse.quote(value, safe=""), "***")
    for pattern, instead in _SECRET_IN_TEXT:
        text = pattern.sub(instead, text)
    return text


def is_of_desktop(key: str) -> bool:
    """True for what macOS, Windows, Linux desktops and file servers leave in folders that they show: it is harmless."""
    return any(_OF_DESKTOP.fullmatch(part) for part in key.split("/"))


def only_of_desktop(folder: Path) -> list[str]:
    """Such names in a folder that holds nothing else; [] of one that holds more, or nothing."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return names if all(map(is_of_desktop, names)) else []
