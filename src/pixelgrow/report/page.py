"""The HTML template of a report."""

from string import Template

PAGE = Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --ink: #1c2024; --soft: #667079; --line: #dfe3e6; --paper: #fbfbfa; --card: #fff;
  --c0: #1f6f8b; --c1: #c8553d; --c2: #588157; --c3: #8a5a9e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7e9; --soft: #98a2aa; --line: #343a40; --paper: #16181b;
  --card: #1e2125; --c0: #62b6cb; --c1: #ee8a6f; --c2: #8fc08d; --c3: #c296d6; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 2.5rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.9rem; letter-spacing: -0.02em; }
h2 { margin: 0 0 1rem; font-size: 1.2rem; }
h2 small, .subtitle, .note, figcaption, summary { color: var(--soft); font-size: 0.87rem; font-weight: normal; }
h3 { margin: 1.25rem 0 0.5rem; font-size: 1rem; }
section { margin-top: 1.5rem; padding: 1.25rem 1.4rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
a { color: var(--c0); text-decoration: none; }
.row { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1.25rem 2rem; align-items: start; }
.wide + .row, .row + .row { margin-top: 1.25rem; }
@media (max-width: 720px) { .row { grid-template-columns: minmax(0, 1fr); } }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; width: 100%; }
th { text-align: right; color: var(--soft); font-weight: normal; }
th, td { padding: 0.28rem 0 0.28rem 1rem; }
td { text-align: right; border-top: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { padding-left: 0; }
th:first-child, td:first-child, .named :nth-child(2) { text-align: left; }
.named td:nth-child(2) { white-space: normal; }
.bars td, .bars th { border: 0; }
.bar { width: 60%; }
.bar i { display: block; height: 0.7rem; min-width: 1px; border-radius: 3px; background: var(--c0); }
.note { margin: 1rem 0 0.5rem; }
figure { margin: 0.5rem 0; }
figure img { width: 100%; max-width: 640px; image-rendering: pixelated; border-radius: 4px; display: block; }
figcaption { margin-bottom: 0.3rem; }
img + figcaption { margin-top: 0.3rem; }
svg { width: 100%; height: auto; }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
.axis { stroke: var(--soft); } .rule { stroke: var(--line); }
.curve { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.curve.c0 { stroke: var(--c0); } .curve.c1 { stroke: var(--c1); } .curve.c2 { stroke: var(--c2); }
.curve.c3 { stroke: var(--c3); } .dot { fill: var(--c0); }
.key { margin-left: 0.8rem; white-space: nowrap; }
.key i { display: inline-block; width: 0.8rem; height: 0.2rem; margin-right: 0.3rem; vertical-align: middle; }
.key .c0 { background: var(--c0); } .key .c1 { background: var(--c1); } .key .c2 { background: var(--c2); }
.key .c3 { background: var(--c3); }
details { margin-top: 1rem; } summary { cursor: pointer; }
pre { overflow-x: auto; font: 12px/1.5 ui-monospace, monospace; white-space: pre-wrap; }
</style>
<h1>$name</h1>
<div class="subtitle">$subtitle</div>
$body
</html>
""")
