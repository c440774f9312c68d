"""The style sheet and the script of the report. They are inline, so that the page is one file."""

from __future__ import annotations

# Colours: Okabe and Ito's palette, which colour-blind readers can tell apart.
STYLE = """
:root{--ink:#1c1f23;--soft:#6a7280;--rule:#e3e6ea;--page:#fbfbfa;--card:#fff;
--c0:#0072b2;--c1:#d55e00;--c2:#009e73;--c3:#cc79a7;--c4:#b8860b;--c5:#56b4e9}
@media (prefers-color-scheme:dark){:root{--ink:#e6e8eb;--soft:#98a1ae;--rule:#2d3238;--page:#15181b;--card:#1b1f23;
--c0:#56a8e0;--c1:#f08a4b;--c2:#35c298;--c3:#de9cc2;--c4:#d9b54a;--c5:#8accf2}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
header,main{max-width:1240px;margin:0 auto;padding:0 28px}
header{padding-top:36px;display:flex;align-items:baseline;justify-content:space-between;gap:24px;flex-wrap:wrap}
h1{font-size:26px;font-weight:650;letter-spacing:-.01em;margin:0}
header p{color:var(--soft);margin:0;font-size:13px}
h2{font-size:13px;font-weight:600;letter-spacing:.06em;text-transform:uppercase;color:var(--soft);
margin:40px 0 12px;border-bottom:1px solid var(--rule);padding-bottom:6px}
h3{font-size:14px;font-weight:600;margin:18px 0 8px}
small{color:var(--soft);font-size:12px}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,470px),1fr));gap:18px}
figure{margin:0;background:var(--card);border:1px solid var(--rule);border-radius:8px;
padding:14px 14px 8px;position:relative}
figcaption{font-weight:600;font-size:14px;margin-bottom:4px}
figcaption small{font-weight:400;margin-left:8px}
svg{display:block;width:100%;height:auto}
.grid{stroke:var(--rule);stroke-width:1;fill:none}
.tick{fill:var(--soft);font-size:11.5px;font-variant-numeric:tabular-nums}
.line{fill:none;stroke-width:1.8;stroke-linejoin:round}
.line.faint{stroke-width:1;opacity:.3}
.line.dashed{stroke-dasharray:6 4}
figure.log,#log:checked~.charts figure.linear{display:none}
#log:checked~.charts figure.log{display:block}
label[for=log]{font-size:13px;color:var(--soft);margin-left:6px}
.charts{margin-top:10px}
.cursor{stroke:var(--soft);stroke-width:1;stroke-dasharray:3 3}
output{position:absolute;top:12px;right:14px;font-size:12px;line-height:1.45;text-align:right;
font-variant-numeric:tabular-nums;pointer-events:none;background:var(--card);padding-left:8px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:13.5px;font-variant-numeric:tabular-nums;width:100%}
th{text-align:left;font-weight:500;color:var(--soft);padding:5px 18px 5px 0;border-bottom:1px solid var(--rule)}
td{padding:5px 18px 5px 0;border-bottom:1px solid var(--rule);vertical-align:top;overflow-wrap:anywhere}
table:not(.settings) td{white-space:nowrap}
.settings td:first-child{color:var(--soft);white-space:nowrap;width:1%;padding-right:32px}
.settings td:first-child b{color:var(--ink)}
q{quotes:none;white-space:pre-wrap}
.swatch{display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:7px}
.bar{display:inline-block;height:9px;border-radius:2px}
section:last-child{padding-bottom:56px}
@media (max-width:600px){
header,main{padding:0 14px}
table:not(.settings) td{white-space:normal}
.cards thead{display:none}
.cards tr{display:block;padding:8px 0;border-bottom:1px solid var(--rule)}
.cards td{display:flex;justify-content:space-between;gap:16px;padding:2px 0;border:0;text-align:right}
.cards td::before{content:attr(data-name);color:var(--soft);text-align:left}
.settings td{display:block;border:0;padding:1px 0}
.settings td:first-child{width:auto;padding:8px 0 0}
}
""" + "".join(
    f".line.run{n}{{stroke:var(--c{n})}}.dot.run{n}{{fill:var(--c{n})}}"
    f".swatch.run{n},.bar.run{n}{{background:var(--c{n})}}output .run{n}{{color:var(--c{n})}}"
    for n in range(6)
)

# Shows the step at the pointer, and the value of each line there. A point is [step, value, x, y].
SCRIPT = """
for (const figure of document.querySelectorAll('figure[data-series]')) {
  const lines = JSON.parse(figure.dataset.series), svg = figure.querySelector('svg');
  const cursor = figure.querySelector('.cursor'), output = figure.querySelector('output');
  const all = lines.flatMap(line => line.points);
  const nearest = (points, x) => points.reduce((a, b) => Math.abs(b[2] - x) < Math.abs(a[2] - x) ? b : a);
  svg.addEventListener('pointermove', event => {
    const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    const point = nearest(all, x);
    cursor.setAttribute('d', `M${point[2]} 8V220`);
    output.replaceChildren(...[['', 'step ' + point[0].toLocaleString()], ...lines.map(line =>
      ['run' + line.run, line.name + '  ' + nearest(line.points, point[2])[1].toPrecision(5)])].map(([kind, text]) => {
        const row = document.createElement('div'); row.className = kind; row.textContent = text; return row; }));
  });
  svg.addEventListener('pointerleave', () => { cursor.setAttribute('d', ''); output.replaceChildren(); });
}
"""
