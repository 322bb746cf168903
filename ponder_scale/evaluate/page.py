"""A trace as one HTML page that needs nothing else: tokens down, passes across, colour for a number of choice."""

from __future__ import annotations

import json
from dataclasses import asdict
from html import escape
from typing import Any

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>@TITLE@</title>
<style>
  body { font: 14px/1.4 system-ui, sans-serif; margin: 24px; color: #222; }
  table { border-collapse: collapse; margin-top: 12px; }
  th, td { padding: 4px 10px; text-align: left; white-space: pre; font-variant-numeric: tabular-nums; }
  td.belief { border: 1px solid white; cursor: default; min-width: 120px; }
  td.belief span { float: right; opacity: .75; margin-left: 12px; }
  code { font-family: ui-monospace, monospace; }
</style>
</head>
<body>
<h1>@TITLE@</h1>
<p>Each row is a token, each column a pass: its most probable next token, and
<select id="metric">
  <option value="kl_to_last">KL divergence to the last pass (nats)</option>
  <option value="entropy">entropy of the prediction (nats)</option>
  <option value="change">relative change of the embedding</option>
  <option value="loss">loss on the token that follows (nats)</option>
</select>
as a number and as colour. Point at a cell for more.</p>
<table id="map"></table>
<script>
const trace = @DATA@;
const metric = document.getElementById("metric"), map = document.getElementById("map");
function cell(tag, text, parent) {
  const made = document.createElement(tag);
  made.textContent = text;
  parent.appendChild(made);
  return made;
}
function draw() {
  const key = metric.value;
  const numbers = trace.beliefs.flat().map(belief => belief[key]).filter(value => value !== null);
  const largest = Math.max(...numbers, 1e-9);
  map.replaceChildren();
  const head = map.insertRow();
  cell("th", "token", head);
  trace.beliefs[0].forEach((_, index) => cell("th", "pass " + index, head));
  trace.tokens.forEach((token, row) => {
    const line = map.insertRow();
    cell("code", JSON.stringify(token), cell("td", "", line));
    trace.beliefs[row].forEach(belief => {
      const value = belief[key], made = cell("td", JSON.stringify(belief.top[0][0]), line);
      made.className = "belief";
      made.style.background = value === null ? "#eee" : `hsl(${220 - 200 * value / largest} 80% 82%)`;
      cell("span", value === null ? "-" : value.toFixed(3), made);
      made.title = belief.top.map(([name, p]) => JSON.stringify(name) + "  " + p.toFixed(3)).join("\\n");
    });
  });
  document.body.dataset.drawn = key;
}
metric.addEventListener("change", draw);
draw();
</script>
</body>
</html>
"""


def trace_page(trace: Any, name: str) -> str:
    """The page of a `Trace` by the model `name`."""
    # a text may hold the end tag of the script it is put in
    data = json.dumps(asdict(trace)).replace("<", "\\u003c")
    return _PAGE.replace("@TITLE@", escape(f"What {name} ponders")).replace("@DATA@", data)
