"""The look of a report: one self-contained page for screen and paper, in light and dark."""

import html
from collections.abc import Sequence

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fffefb; --ink: #1b2430; --quiet: #5d6875; --pale: #a8b3bf; --rule: #dfe3e6;
  --accent: #1f5f8b; --tint: #f1f5f8;
  --serif: Charter, "Bitstream Charter", "Sitka Text", Cambria, "Noto Serif", serif;
  --sans: "Helvetica Neue", "Segoe UI", "Noto Sans", "Liberation Sans", Arial, sans-serif;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #15191e; --ink: #dfe4e9; --quiet: #98a4b0; --pale: #616d79; --rule: #2c343c;
    --accent: #7fbbe3; --tint: #1d242b;
  }
}
* { box-sizing: border-box }
body {
  margin: 0 auto; padding: 3.5rem 1.5rem 5rem; max-width: 58rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 var(--serif); font-variant-numeric: lining-nums;
}
h1 { font-size: 1.9rem; line-height: 1.2; font-weight: 600; margin: 0 0 .4rem }
h2 { font-size: 1.15rem; font-weight: 600; margin: 3rem 0 .6rem }
h3 { font-size: 1rem; font-weight: 400; font-style: italic; margin: 1.6rem 0 .6rem }
p { margin: 0 0 .8rem; max-width: 42rem }
.lead { color: var(--quiet); overflow-wrap: anywhere }
.key { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 1rem;
       margin: 2rem 0 0; padding: 1rem 0; border-block: 1px solid var(--rule) }
.key div { font: .8rem/1.4 var(--sans); color: var(--quiet) }
.key b { display: block; font: 1.9rem/1.25 var(--serif); color: var(--ink) }
.key div:first-child b { color: var(--accent) }
table { border-collapse: collapse; font: .86rem/1.35 var(--sans);
        font-variant-numeric: tabular-nums lining-nums; margin: .4rem 0 .8rem }
.wide { overflow-x: auto }
.wide table { width: 100% }
thead th { font-weight: 400; color: var(--quiet); border-bottom: 1px solid var(--ink) }
table { border-block: 1.5px solid var(--ink) }
th, td { padding: .28rem .75rem; text-align: right; vertical-align: baseline }
th:first-child, td:first-child { text-align: left; padding-left: 0; font-weight: 400 }
th:last-child, td:last-child:not(.mark) { padding-right: 0 }
tr.part td:first-child { padding-left: 1.1rem; color: var(--quiet) }
tr.kind td { padding-left: 1.1rem; font-style: italic }
tr.head td { border-top: 1px solid var(--rule) }
tbody tr:first-child td { border-top: 0; padding-top: .45rem }
td.text, th.text { text-align: left; overflow-wrap: anywhere }
td.mark, th.mark { width: 13rem; padding: 0 .3rem 0 1rem }
td.mark svg { display: block; width: 100%; height: 1.3rem; overflow: visible }
td.mark { vertical-align: middle }
.columns { display: flex; flex-wrap: wrap; gap: 1.4rem 3.5rem; align-items: flex-start }
.columns > div { flex: 1 1 18rem; min-width: 0 }
.columns table { width: 100% }
.columns td:first-child { white-space: nowrap }
.note { font: .8rem/1.45 var(--sans); color: var(--quiet); max-width: 48rem }
.gallery { display: grid; gap: 1.6rem 1.2rem;
           grid-template-columns: repeat(auto-fill, minmax(12.4rem, 1fr)) }
.gallery + .note { margin-top: 1.2rem }
.gallery.long { grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)) }
figure { margin: 0 }
.example { break-inside: avoid; font-size: .92rem; line-height: 1.35 }
.picture { aspect-ratio: 4 / 3; background: var(--tint); display: flex; align-items: center;
           justify-content: center; overflow: hidden }
.picture img { width: 100%; height: 100%; object-fit: contain; display: block }
.picture img.pixelated { image-rendering: pixelated }
.picture span { font: .78rem/1.4 var(--sans); color: var(--quiet); padding: 1rem;
                overflow-wrap: anywhere }
.example p { margin: .5rem 0 .35rem; overflow-wrap: anywhere }
.pair { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 0 .8rem;
        margin: .35rem 0 0; border-top: 1px solid var(--rule); padding-top: .3rem }
.pair dt { grid-row: 1; font: .7rem/1.5 var(--sans); color: var(--quiet) }
.pair dd { grid-row: 2; margin: 0; overflow-wrap: break-word }
.pair dd.hit { color: var(--accent); font-weight: 600 }
.pair dd > span { display: block; margin-bottom: .15rem }
.example small { display: block; margin-top: .3rem; font: .7rem/1.45 var(--sans);
                 color: var(--quiet); overflow-wrap: anywhere }
.plot svg { width: 100%; height: auto; font-family: var(--sans); display: block }
.plot svg * { stroke-linejoin: round }
pre.table { columns: auto; white-space: pre; overflow-x: auto }
pre { font: .72rem/1.5 "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; columns: 2 20rem;
      column-gap: 2.5rem; white-space: pre-wrap; overflow-wrap: anywhere; margin: .4rem 0 }
@page { margin: 18mm 16mm }
@media print {
  body { padding: 0; max-width: none; font-size: 10pt; background: none }
  h2, h3 { break-after: avoid }
  tr, .key, .plot { break-inside: avoid }
  .example { font-size: .85rem }
  .gallery { grid-template-columns: repeat(4, 1fr) }
  .gallery.long { grid-template-columns: repeat(3, 1fr) }
  * { print-color-adjust: exact }
}
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
LONGEST = 400  # characters of a prompt, reference or prediction that are shown


def page(title: str, body: Sequence[str]) -> str:
    """A whole document; it loads nothing, and the browser is told to allow nothing."""
    return _PAGE.format(title=text(title), style=STYLE, body="\n".join(body))


def text(words: object, longest: int | None = None) -> str:
    """Words of unknown origin as HTML text or attribute.

    What is no character of a document (halves of surrogate pairs, control characters) is shown as
    the replacement character.

    Args:
        longest: characters after which they are cut.
    """
    words = str(words)
    if longest is not None and len(words) > longest:
        words = words[: longest - 1].rstrip() + "…"
    words = words.encode("utf-8", "replace").decode()
    plain = (c if c.isprintable() or c in " \n\t" or ord(c) > 0x9F else "\ufffd" for c in words)
    return html.escape("".join(plain))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML. Columns of numbers are flush right, others left.

    A head of no cells stands for none.
    """
    numeric = [
        all(_begins_with_number(cell) for cell in column) for column in zip(*rows, strict=True)
    ]
    lines = ["<table>"]
    if head:
        lines += ["<thead>", _row("th scope=col", head, numeric), "</thead>"]
    lines += ["<tbody>", *(_row("td", row, numeric) for row in rows), "</tbody></table>"]
    return "\n".join(lines)


def _row(tag: str, cells: Sequence[str], numeric: Sequence[bool]) -> str:
    pairs = zip(cells, numeric, strict=True)
    inside = "".join(f"<{tag}{'' if n else ' class=text'}>{c}</{tag[:2]}>" for c, n in pairs)
    return f"<tr>{inside}</tr>"


def _begins_with_number(cell: str) -> bool:
    return not cell or cell[0].isdigit() or cell[0] in "−-–"
