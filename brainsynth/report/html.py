"""One self-contained HTML page: nothing is fetched, so that it opens inside a hospital network."""

from __future__ import annotations

import html
from collections.abc import Collection, Sequence

from matplotlib.figure import Figure

from brainsynth.report.figures import data_uri

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""A browser that honours it fetches nothing and runs nothing, whatever the page's text holds."""
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1180px;margin:2rem auto;padding:0 1rem;color:#1a202c}
h1{font-size:1.6rem;margin-bottom:.2rem} h2{font-size:1.15rem;margin-top:2rem;border-bottom:1px solid #e2e8f0}
table{border-collapse:collapse;font-size:.88rem} td,th{padding:.25rem .8rem .25rem 0;text-align:left;vertical-align:top}
th{color:#4a5568;font-weight:600} img{max-width:100%;height:auto} .note{color:#4a5568;font-size:.9rem}
.bad td{background:#fffaf0} .bad td:last-child{color:#c05621;font-weight:600}
.warning{background:#fffaf0;border-left:4px solid #dd6b20;padding:.5rem .8rem} code{background:#edf2f7;padding:0 .25rem}
"""


class Page:
    """Sections are added in reading order."""

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title = title
        self._parts = [
            f"<h1>{html.escape(title)}</h1>",
            f'<p class="note">{html.escape(subtitle)}</p>' if subtitle else "",
        ]

    def heading(self, text: str) -> None:
        """A section's heading."""
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str, kind: str = "") -> None:
        """A paragraph; `note` and `warning` have their own look."""
        self._parts.append(f'<p class="{kind}">{html.escape(text)}</p>')

    def table(
        self, header: Sequence[str], rows: Sequence[Sequence[object]], marked: Collection[int] = frozenset()
    ) -> None:
        """A table of plain values; rows whose numbers are `marked` stand out."""
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
        body = ""
        for number, row in enumerate(rows):
            cells = "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row)
            body += ('<tr class="bad">' if number in marked else "<tr>") + cells + "</tr>"
        self._parts.append(f"<table><tr>{head}</tr>{body}</table>")

    def figure(self, figure: Figure, alternative: str) -> None:
        """A picture, inside the page."""
        self._parts.append(f'<img alt="{html.escape(alternative)}" src="{data_uri(figure)}">')

    def render(self) -> str:
        """The whole page."""
        return (
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(self.title)}</title>'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
            f"<style>{_STYLE}</style><body>{''.join(self._parts)}</body></html>\n"
        )
