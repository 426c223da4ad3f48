"""The style sheet of the report: quiet, light or dark as the reader has it, and printable.

The colours of data are those of Okabe and Ito (Color Universal Design, 2008), which stay apart for colour-blind
readers; greys are for what nobody can use.
"""

from __future__ import annotations

CSS = """
:root { color-scheme: light dark;
  --page: #ffffff; --card: #ffffff; --ink: #1d2430; --soft: #5b6573; --rule: #dfe3e8; --faint: #f3f5f7;
  --blue: #0072b2; --sky: #56b4e9; --green: #009e73; --orange: #e69f00; --red: #d55e00; --rose: #cc79a7;
  --grey1: #7f8894; --grey2: #a7aeb8; --grey3: #ccd1d8; --mint: #7cc9b2; }
@media (prefers-color-scheme: dark) { :root {
  --page: #14181e; --card: #14181e; --ink: #e7eaee; --soft: #9aa4b2; --rule: #2c333d; --faint: #1d232b;
  --blue: #1579ba; --grey1: #8b95a2; --grey2: #68727f; --grey3: #4a535f; --mint: #4f9a86; } }
@media print { :root { color-scheme: light;
  --page: #ffffff; --card: #ffffff; --ink: #1d2430; --soft: #5b6573; --rule: #dfe3e8; --faint: #f3f5f7;
  --blue: #0072b2; --grey1: #7f8894; --grey2: #a7aeb8; --grey3: #ccd1d8; --mint: #7cc9b2; }
  body { font-size: 11px; } * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  section, figure, .figures div { break-inside: avoid; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 14px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", Arial, sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 40px 32px 56px; }
h1 { font-size: 28px; line-height: 1.2; font-weight: 600; letter-spacing: -0.01em; margin: 0 0 6px; }
h2 { font-size: 16px; font-weight: 600; margin: 0 0 2px; }
p { margin: 0 0 8px; } .sub, .note { color: var(--soft); } .note { font-size: 12.5px; margin: 6px 0 0; }
.sub { font-size: 15px; margin: 0; }
.verdict { margin: 18px 0 0; padding: 10px 14px; border-left: 4px solid var(--green); background: var(--faint); }
.verdict.bad { border-color: var(--red); } .verdict.half { border-color: var(--orange); }
.verdict p { margin: 0; } .verdict p + p { color: var(--soft); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 0 28px;
  margin: 26px 0 8px; }
.figures div { border-top: 2px solid var(--ink); padding: 8px 0 14px; }
.figures b { display: block; font-size: 24px; line-height: 1.25; font-weight: 600; letter-spacing: -0.01em;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
.figures span { display: block; color: var(--soft); font-size: 12.5px; line-height: 1.4; }
.grid { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 0 44px; }
.wide { grid-column: 1 / -1; }
@media (max-width: 860px) { .wide figure { overflow-x: auto; } .wide figure svg { min-width: 760px; }
  .grid { grid-template-columns: minmax(0, 1fr); } main { padding: 24px 16px; } }
section { border-top: 1px solid var(--rule); padding: 18px 0 26px; min-width: 0; }
figure { margin: 10px 0 0; } svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", Arial, sans-serif;
  fill: var(--ink); font-variant-numeric: tabular-nums; }
svg text.soft { fill: var(--soft); } svg text.small { font-size: 10.5px; } svg text.tiny { font-size: 9px; }
svg text.on { fill: #ffffff; } svg text.dark { fill: #1d2430; } svg text.strong { font-weight: 600; }
svg text.bad { fill: var(--red); }
svg text.halo { paint-order: stroke; stroke: var(--card); stroke-width: 4px; stroke-linejoin: round; }
.axis { stroke: var(--grey2); } .grid-line { stroke: var(--rule); } .limit { stroke: var(--red); stroke-width: 1.5;
  stroke-dasharray: 5 3; } .curve { fill: none; stroke: var(--blue); stroke-width: 2; } .whisker { stroke: var(--blue);
  stroke-width: 2; } .lane { fill: var(--faint); } .frame { fill: none; stroke: var(--grey3); }
.blue { fill: var(--blue); } .sky { fill: var(--sky); } .green { fill: var(--green); } .orange { fill: var(--orange); }
.red { fill: var(--red); } .rose { fill: var(--rose); } .grey1 { fill: var(--grey1); } .grey2 { fill: var(--grey2); }
.grey3 { fill: var(--grey3); } .mint { fill: var(--mint); }
.cloud { fill: var(--blue); fill-opacity: 0.5; } .beyond { fill: var(--grey3); }
.ring { fill: none; stroke: var(--ink); stroke-width: 1.6; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 8px 0 0; padding: 0; list-style: none;
  color: var(--soft); font-size: 12.5px; } .legend svg { display: inline-block; width: 10px; height: 10px;
  margin-right: 6px; }
table { border-collapse: collapse; width: 100%; margin: 10px 0 0; font-size: 13px; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 500; color: var(--soft); border-bottom: 1px solid var(--grey2); }
th, td { padding: 4px 14px 4px 0; vertical-align: top; } td { border-bottom: 1px solid var(--rule); }
td.right, th.right { text-align: right; white-space: nowrap; } th:last-child, td:last-child { padding-right: 0; }
code { font: 12px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; color: var(--soft);
  overflow-wrap: anywhere; }
.scroll { overflow-x: auto; } ul.plain { margin: 8px 0 0; padding-left: 18px; } ul.plain li { margin: 3px 0; }
footer { border-top: 1px solid var(--rule); padding-top: 14px; color: var(--soft); font-size: 12.5px; }
"""
