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
