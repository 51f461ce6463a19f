"""A scene as one self-contained HTML page: the SVG, and details of the part that is clicked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from html import escape
from typing import Any

from moec.report.picture.part import Scene, ScenePart
from moec.report.picture.svg import svg
from moec.report.text import shape
from moec.report.units import count

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1"><title>%(title)s</title>
<style>
:root{color-scheme:light dark;--paper:#fff;--side:#f5f7fa;--ink:#1a2029;--soft:#5d6876;
--line:#d5dbe3;--mark:#7c3aed}
@media (prefers-color-scheme:dark){:root{--paper:#0f141b;--side:#161d27;--ink:#e8edf4;
--soft:#9aa7b8;--line:#344051;--mark:#a78bfa}}
*{box-sizing:border-box}
body{margin:0;display:flex;min-height:100vh;background:var(--paper);color:var(--ink);
font:14px/1.5 ui-sans-serif,system-ui,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif}
main{flex:1;min-width:0;overflow-x:auto;text-align:center;padding:12px}
main svg{max-width:100%%;height:auto}
aside{width:400px;flex:none;position:sticky;top:0;height:100vh;overflow:auto;padding:24px;
background:var(--side);border-left:1px solid var(--line)}
h2{margin:0 0 2px;font-size:17px;overflow-wrap:anywhere}p{margin:0 0 14px;color:var(--soft)}
h3{margin:18px 0 4px;font-size:12px;color:var(--soft);font-weight:600}
dl{display:grid;grid-template-columns:auto 1fr;gap:3px 14px;margin:0}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere;font-variant-numeric:tabular-nums}
table{border-collapse:collapse;width:100%%;font:12px ui-monospace,Menlo,Consolas,monospace}
td{padding:2px 8px 2px 0;vertical-align:top;overflow-wrap:anywhere}td+td{text-align:right;
white-space:nowrap}
.part{cursor:pointer;outline:none}
.part:hover>.card,.part:focus-visible>.card,.part.on>.card{stroke:var(--mark);stroke-width:2}
.part.on>.frame:last-of-type,.part:focus-visible>.frame{stroke:var(--mark)}
@media (max-width:900px){body{display:block}aside{position:static;width:auto;height:auto;
border:0;border-top:1px solid var(--line)}}
@media print{aside{display:none}}
</style></head><body>
<main>%(svg)s</main>
<aside id="details" aria-live="polite"></aside>
<script>
const parts=%(parts)s, home=%(home)s;
const aside=document.getElementById('details');
const el=(tag,text)=>{const e=document.createElement(tag);if(text!==undefined)e.textContent=text;
return e};
function show(d){
  aside.replaceChildren(el('h2',d.name),el('p',d.says));
  const facts=el('dl');
  for(const [k,v] of d.facts)facts.append(el('dt',k),el('dd',v));
  aside.append(facts);
  for(const [title,rows] of d.tables){
    if(!rows.length)continue;
    aside.append(el('h3',title));
    const table=el('table');
    for(const row of rows){const tr=el('tr');for(const cell of row)tr.append(el('td',cell));
      table.append(tr)}
    aside.append(table)}}
function pick(g){
  document.querySelectorAll('.part.on').forEach(e=>e.classList.remove('on'));
  if(g)g.classList.add('on');
  show(g?parts[+g.dataset.part]:home)}
document.querySelectorAll('.part').forEach(g=>{
  g.setAttribute('tabindex','0');
  g.addEventListener('click',e=>{e.stopPropagation();pick(g)});
  g.addEventListener('keydown',e=>{if(e.key==='Enter'||e.key===' '){e.preventDefault();
    e.stopPropagation();pick(g)}})});
document.querySelector('main').addEventListener('click',()=>pick(null));
document.addEventListener('keydown',e=>{if(e.key==='Escape')pick(null)});
show(home);
</script></body></html>
"""


def html(scene: Scene) -> str:
    picture, parts = svg(scene)
    return _PAGE % {
        "title": escape(scene.title),
        "svg": picture,
        "parts": _data([details(part) for part in parts]),
        "home": _data(_home(scene)),
    }


def _data(value: Any) -> str:
    """JSON that cannot close the surrounding script element, for any names in it."""
    return json.dumps(value).replace("<", "\\u003c")


_TOLD = ("name", "parameters", "active_parameters")


def details(part: ScenePart) -> Mapping[str, Any]:
    """The panel's data on a part: its name, facts as pairs, tables as rows."""
    facts = [["path", part.path]]
    if part.times > 1:
        facts.append(["repeated", f"{part.times} times; numbers are for one"])
    if part.parameters:
        facts.append(["parameters", f"{part.parameters:,}"])
    facts += [["tied to", name] for name in part.tied]
    if part.active != part.parameters:
        facts.append(["active per token", f"{part.active:,}"])
    for block in part.blocks:
        fields = {k: str(v) for k, v in asdict(block).items() if v != "" and k not in _TOLD}
        facts += [[key.replace("_", "-"), value] for key, value in fields.items()]
    says = {"sum": "Residual addition.", "moe": "A mixture of experts."}.get(part.kind, "")
    return {
        "name": part.label if part.kind != "sum" else part.path,
        "says": says,
        "facts": facts,
        "tables": [
            ["Not recognised", [[f"{d.rule}: {d.reason}"] for d in part.declined]],
            ["Weights", [list(weight) for weight in part.weights]],
            ["Operators", [[n, str(c)] for n, c in sorted(part.ops.items(), key=lambda i: -i[1])]],
        ],
    }


def _home(scene: Scene) -> Mapping[str, Any]:
    facts = [["parameters", f"{scene.parameters:,} ({count(scene.parameters)})"]]
    if scene.active != scene.parameters:
        facts.append(["active per token", f"{scene.active:,} ({count(scene.active)})"])
    return {
        "name": scene.title,
        "says": "Click a part for its weights and operators.",
        "facts": facts,
        "tables": [
            ["Inputs", [[line.name, shape(line)] for line in scene.inputs]],
            ["Outputs", [[line.name, shape(line)] for line in scene.outputs]],
        ],
    }
