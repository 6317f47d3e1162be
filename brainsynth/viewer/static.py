"""The viewer as a folder of files that needs no server: a page opened from a disk may load scripts, and nothing else.

So the page's modules become one script, and table and volumes become scripts that hold them, compressed.
"""

from __future__ import annotations

import base64
import gzip
import re
from pathlib import Path

from brainsynth.errors import UserError
from brainsynth.reading.dataset import open_dataset
from brainsynth.storage.whole_file import whole_folder
from brainsynth.viewer.server import PAGE
from brainsynth.viewer.view import View

_IMPORT = re.compile(r'^import (\{.*\}) from "\./(.+)";$', re.MULTILINE)
_EXPORT = re.compile(r"^export (async function|function|class|const) (\w+)", re.MULTILINE)
_POLICY = (
    "default-src 'none'; script-src 'self' file:; style-src 'self' file:; img-src 'self' file: data: blob:; "
    "base-uri 'none'; form-action 'none'"
)
"""A browser that honours it lets the page talk to nobody."""
KEPT = ("style.css", "icon.svg", "vendor/niivue.umd.js", "vendor/LICENSES.txt", "vendor/NOTICE.md")


def write_site(view: View, uri: str, output: Path, where: str | None = None) -> int:
    """Write the site of a finished dataset into a new folder, all or nothing; returns how many volumes it holds.

    Raises:
        UserError: the dataset is not finished, the condition is wrong or nobody satisfies it, or the folder is not empty.
    """
    if not view.finished:
        raise UserError(f"--static: {uri} is not finished; run its job again to finish it")
    if output.exists() and any(output.iterdir()):
        raise UserError(f"--static: {output} is not empty; a site goes to a new folder")
    try:
        rows = [int(row) for row in open_dataset(uri, where=where).rows]
    except ValueError as error:
        raise UserError(str(error)) from None
    if where is not None:
        view.keep(rows)
    with whole_folder(output) as folder:
        for name in KEPT:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes((PAGE / name).read_bytes())
        (folder / "index.html").write_text(_page(), encoding="utf-8")
        (folder / "app.js").write_text(bundled("app.js"), encoding="utf-8")
        _put(folder, "dataset.json", view.document()[0])
        for row in rows:
            _put(folder, f"volumes/{row}.nii", view.volume(row))
            if view.has_labels:
                _put(folder, f"labels/{row}.nii", view.labels(row))
    return len(rows)


def _put(folder: Path, key: str, data: bytes) -> None:
    text = base64.b64encode(gzip.compress(data, 6, mtime=0)).decode()
    path = folder / f"{key}.js"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f'brainsynthFile("{key}", "{text}");\n', encoding="ascii")


def _page() -> str:
    html = (PAGE / "index.html").read_text(encoding="utf-8")
    html = html.replace('<html lang="en">', '<html lang="en" data-static="yes">')
    html = html.replace('<script src="app.js" type="module">', '<script src="app.js" defer>')
    return html.replace(
        '<meta charset="utf-8">',
        f'<meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
    )


def bundled(entry: str) -> str:
    """A module and all that it imports as one classic script; each keeps a scope of its own."""
    written: dict[str, str] = {}

    def add(name: str) -> None:
        text = (PAGE / name).read_text(encoding="utf-8")
        for _, other in _IMPORT.findall(text):
            if other not in written:
                add(other)
        names = ", ".join(name for _, name in _EXPORT.findall(text))
        text = _EXPORT.sub(r"\1 \2", _IMPORT.sub(r'const \1 = modules["\2"];', text))
        written[name] = f'modules["{name}"] = (() => {{\n{text}\nreturn {{ {names} }};\n}})();\n'

    add(entry)
    return '"use strict";\nconst modules = {};\n' + "".join(written.values())
