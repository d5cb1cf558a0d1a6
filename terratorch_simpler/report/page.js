"use strict";
// Values on pointing, on tapping, and with the arrow keys in a picture that has the focus. Without this, titles tell them.
const box = document.getElementById("tip");
let at = null;

function tell(mark) {
  if (at) at.classList.remove("at");
  at = mark;
  box.textContent = mark ? mark.dataset.tip : "";
  if (!mark) return;
  mark.classList.add("at");
  const place = mark.getBoundingClientRect();
  const left = place.left + place.width / 2 - box.offsetWidth / 2;
  const above = place.top - box.offsetHeight - 8;
  box.style.left = Math.max(4, Math.min(left, document.documentElement.clientWidth - box.offsetWidth - 4)) + scrollX + "px";
  box.style.top = (above > 0 ? above : place.bottom + 8) + scrollY + "px";
}

for (const mark of document.querySelectorAll(".tip")) {
  const title = mark.querySelector("title");
  mark.dataset.tip = title.textContent;
  title.remove(); // or the browser shows it as well
}

for (const chart of document.querySelectorAll("svg.chart")) {
  const marks = [...chart.querySelectorAll(".tip")];
  const columns = Number(chart.dataset.columns) || 1;
  chart.addEventListener("keydown", (event) => {
    const upDown = chart.dataset.columns ? columns : 1;
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -upDown, ArrowDown: upDown }[event.key];
    if (event.key === "Escape") return tell(null);
    if (!step || !marks.length) return;
    event.preventDefault();
    const now = marks.indexOf(at);
    tell(marks[now < 0 ? 0 : Math.max(0, Math.min(marks.length - 1, now + step))]);
  });
  chart.addEventListener("blur", () => tell(null));
}

document.addEventListener("pointerover", (event) => tell(event.target.closest ? event.target.closest(".tip") : null));
document.addEventListener("pointerdown", (event) => tell(event.target.closest ? event.target.closest(".tip") : null));

// The slider: what the tables and charts of the page say of one depth.
const slider = document.getElementById("depth");

function cellsOf(table, depth) {
  const row = table && table.querySelector(`tr[data-depth="${depth}"]`);
  if (!row) return [];
  return [...table.tHead.rows[0].cells].slice(1).map((head, i) => [head.textContent, row.cells[i + 1].textContent]);
}

function setsOf(depth) {
  return [...document.querySelectorAll("#set-charts figure")].map((chart) => {
    const start = `${depth} blocks kept: `;
    const mark = [...chart.querySelectorAll(".tip.error")].find((tip) => tip.dataset.tip.startsWith(start));
    return [chart.querySelector("h3").textContent, mark ? mark.dataset.tip.slice(start.length) : ""];
  });
}

function words(depth) {
  const about = document.getElementById("slider").dataset;
  const said = [Number(about.own) === depth ? about.same : about.other];
  const sets = [...document.querySelectorAll("#sets tbody tr")];
  for (const [which, deep] of [["Deep enough for", true], ["Not for", false]]) {
    const of = sets.filter((row) => (depth >= Number(row.dataset.depth)) === deep);
    if (of.length) said.push(`${which} ${of.map((row) => `${row.cells[0].textContent} (${row.dataset.depth})`).join(", ")}.`);
  }
  return said.join(" ");
}

function show() {
  const depth = Number(slider.value);
  const sets = setsOf(depth);
  const costs = cellsOf(document.getElementById("costs"), depth).filter(([name]) => !(sets.length && name.includes("±")));
  const swept = cellsOf(document.getElementById("swept"), depth).filter(([name]) => /probe|k-NN$|latency/.test(name));
  document.getElementById("depth-shown").textContent = depth;
  document.getElementById("depth-words").textContent = words(depth);
  document.getElementById("depth-facts").replaceChildren(
    ...[...costs, ...sets, ...swept].filter(([, value]) => value).map(([name, value]) => {
      const fact = document.createElement("div");
      const [large, small] = value.split(/ (?=[(±])/);
      for (const [tag, text] of [["dt", name], ["dd", large]]) fact.appendChild(document.createElement(tag)).textContent = text;
      if (small) fact.lastChild.appendChild(document.createElement("small")).textContent = small;
      return fact;
    }),
  );
}

if (slider) {
  slider.addEventListener("input", show);
  show();
  document.getElementById("slider").hidden = false;
}
