"""`brainsynth view`: a dataset in the browser (docs/viewer.md)."""

from __future__ import annotations

import argparse
import os
import sys
import webbrowser

from brainsynth.storage.filesystem import resolve_uri


def command(arguments: argparse.Namespace) -> int:
    """Serves the dataset until Ctrl-C."""
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
