"""Datasets on the Hugging Face hub, by its plain HTTP addresses: hf://datasets/OWNER/NAME[@REVISION][/FOLDER]."""

from __future__ import annotations

import os
import urllib.parse

from brainsynth.errors import UserError

_HUB = "https://huggingface.co"


def hub_address(uri: str) -> str:
    """The https:// address below which the hub serves the files of an hf:// address.

    `HF_ENDPOINT` names another hub. Without a revision it is `main`, whose files may change; a commit's never do.

    Raises UserError for an address of another form.
    """
    kind, *parts = uri.removeprefix("hf://").strip("/").split("/")
    if kind not in ("datasets", "models", "spaces") or len(parts) < 2 or not all(parts):
        raise UserError(f"{uri}: write hf://datasets/OWNER/NAME, and behind it @REVISION and the folder if need be")
    owner, (name, _, revision), *folder = parts[0], parts[1].partition("@"), *parts[2:]
    repository = f"{owner}/{name}" if kind == "models" else f"{kind}/{owner}/{name}"
    endpoint = os.environ.get("HF_ENDPOINT", _HUB).rstrip("/")
    return "/".join([endpoint, repository, "resolve", revision or "main", *folder])


def hub_headers() -> dict[str, str]:
    """What the hub is sent with each request: the token of the environment (HF_TOKEN), for datasets that are not public.

    It is not sent over an unencrypted connection to another machine.
    """
    token = os.environ.get("HF_TOKEN", "").strip()
    endpoint = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT", _HUB))
    private = endpoint.scheme == "https" or endpoint.hostname in ("127.0.0.1", "::1", "localhost")
    return {"Authorization": f"Bearer {token}"} if token and private else {}
