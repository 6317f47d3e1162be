"""`brainsynth view`: a dataset in the browser (docs/viewer.md)."""

from __future__ import annotations

import argparse
import os
import sys
import webbrowser
from typing import Any

from brainsynth.storage.filesystem import resolve_uri


def add_view_verb(verbs: Any) -> argparse.ArgumentParser:
    """Its parser, without the dataset's address, which other verbs take, too."""
    view: argparse.ArgumentParser = verbs.add_parser(
        "view", help="look at a dataset in the browser: filter, scroll slices, compare asked with measured"
    )
    view.add_argument("--port", type=int, default=0, help="of 127.0.0.1; a free one by default")
    view.add_argument("--no-browser", action="store_true", help="only print the address")
    view.add_argument(
        "--measured", metavar="DIGEST", help="of several evaluations, whose measured values: the start of its digest"
    )
    view.set_defaults(run=_view)
    return view


def _view(arguments: argparse.Namespace) -> int:
    from brainsynth.viewer.server import ViewServer
    from brainsynth.viewer.view import View

    view = View(resolve_uri(arguments.uri, "uri"), arguments.measured or True)
    with ViewServer(view, arguments.port) as server:
        print(f"{len(view)} rows: {server.address}\nCtrl+C ends it", flush=True)
        if not arguments.no_browser and _has_screen():
            webbrowser.open(server.address)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("ended")
    return 0


def _has_screen() -> bool:
    """False where `webbrowser` could only start a browser of the terminal, which would take it over."""
    return sys.platform in ("win32", "darwin") or any(os.environ.get(n) for n in ("DISPLAY", "WAYLAND_DISPLAY"))
