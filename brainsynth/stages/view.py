"""`brainsynth view`: a dataset in the browser (docs/viewer.md)."""

from __future__ import annotations

import argparse
import os
import sys
import webbrowser

from brainsynth.errors import UserError
from brainsynth.storage.filesystem import local_folder, resolve_uri


def command(arguments: argparse.Namespace) -> int:
    """Serves the dataset until Ctrl-C; or writes it as a site."""
    from brainsynth.viewer.server import ViewServer
    from brainsynth.viewer.view import View

    if arguments.where and not arguments.static:
        raise UserError("--where: only with --static; on the page, filter there")
    uri = resolve_uri(arguments.uri, "uri")
    view = View(uri, arguments.measured or True)
    if arguments.static:
        from brainsynth.viewer.static import write_site

        output = local_folder(arguments.static, "--static")
        count = write_site(view, uri, output, arguments.where)
        size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
        print(
            f"{count} volumes, {size / 1e6:.1f} MB: open {output / 'index.html'} in a browser, or put the folder on a site"
        )
        return 0
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
