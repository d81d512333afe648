"""What the report's page is made of: its head, tables, figures with their captions."""

import base64
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tinylora.studies.canvas import Picture

HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 70em; margin: auto; padding: 16px }}
h1, h2, h3, p, li {{ overflow-wrap: anywhere }}
section + section {{ border-top: 1px solid #ccc; margin-top: 32px }}
.figures {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 16px }}
figure {{ margin: 0 }} img {{ max-width: 100%; height: auto }} figcaption {{ font-size: 14px; color: #444 }}
.wide {{ overflow-x: auto; margin: 16px 0 }}
table {{ border-collapse: collapse; font-size: 14px; white-space: nowrap }}
th, td {{ padding: 4px 10px; border-bottom: 1px solid #ddd; text-align: right }}
th:first-child, td:first-child {{ text-align: left; white-space: normal; min-width: 9em }}
.answers {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); gap: 8px 16px }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; background: #f4f4f4; padding: 8px; margin: 4px 0; font-size: 14px }}
</style></head><body>
"""


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that scrolls in a box of its own where it is wider than the page."""

    def line(cell: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{cell}>{escape(text)}</{cell}>" for text in cells) + "</tr>\n"

    body = "".join(line("td", row) for row in rows)
    return f'<div class="wide" tabindex="0"><table>\n{line("th", header)}{body}</table></div>\n'


def html_figures(pictures: Sequence["Picture"]) -> str:
    parts = []
    for p in pictures:
        source = base64.b64encode(p.png).decode()
        image = f'<img src="data:image/png;base64,{source}" alt="{escape(p.alt)}">'
        parts.append(f"<figure>{image}<figcaption>{escape(p.caption)}</figcaption></figure>\n")
    return f'<div class="figures">\n{"".join(parts)}</div>\n'
