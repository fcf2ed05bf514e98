"use strict";
const results = JSON.parse(document.getElementById("results").textContent);
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const hue = (item) => css(`--hue-${item.colour}`);
const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)} %`;
// an axis of shares: decimals only where the ticks need them, and nothing beyond 0 and 100 %
const percentAxis = { tickformat: ".3~%", autorangeoptions: { clipmin: 0, clipmax: 1 } };
const escapeHtml = (text) => text.replace(/[&<>]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[c]);
const config = { displayModeBar: false, responsive: false, doubleClick: "reset" };

function layout(extra) {
  const axis = { gridcolor: css("--line"), linecolor: css("--line"), zeroline: false, tickfont: { size: 12 }, ticks: "", automargin: true };
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, dragmode: false, hovermode: "closest",
    font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: css("--soft") },
    hoverlabel: { bgcolor: css("--card"), bordercolor: css("--line"), font: { color: css("--ink"), size: 13 }, align: "left" },
    margin: { l: 52, r: 14, t: 10, b: 46 },
    ...extra,
    xaxis: { ...axis, ...extra.xaxis },
    yaxis: { ...axis, ...extra.yaxis },
  };
}

// ---- sortable tables

function sortBy(header) {
  const table = header.closest("table");
  const body = table.querySelector("tbody.sorted"); // other bodies keep their place
  const headers = [...table.tHead.rows[0].cells];
  const column = headers.indexOf(header);
  const first = header.querySelector("button").dataset.first;
  const other = first === "ascending" ? "descending" : "ascending";
  const order = header.getAttribute("aria-sort") === first ? other : first;
  headers.forEach((h) => h.removeAttribute("aria-sort"));
  header.setAttribute("aria-sort", order);
  const sign = order === "ascending" ? 1 : -1;
  const value = (row) => row.children[column].dataset.value;
  const numeric = header.classList.contains("num");
  const compare = (a, b) => (numeric ? Number(value(a)) - Number(value(b)) : value(a).localeCompare(value(b)));
  body.append(...[...body.rows].sort((a, b) => sign * compare(a, b)));
}

document.querySelectorAll("table.sortable thead button").forEach((button) => button.addEventListener("click", () => sortBy(button.closest("th"))));

// ---- what is wider than its place scrolls, and says so

function markWide() {
  for (const box of document.querySelectorAll(".scroll")) {
    box.classList.toggle("wide", box.scrollWidth > box.clientWidth + 1);
    box.classList.toggle("more", box.scrollLeft + box.clientWidth < box.scrollWidth - 1);
  }
}
document.querySelectorAll(".scroll").forEach((box) => box.addEventListener("scroll", markWide, { passive: true }));
addEventListener("resize", markWide);
markWide();

// ---- plots: drawn at once, and again whenever the window or the colours change

const drawings = [];

function onDraw(draw) { // a page registers each function that draws plots
  drawings.push(draw);
  draw();
}

const redraw = () => drawings.forEach((draw) => draw());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
let pageWidth = innerWidth;
addEventListener("resize", () => {
  if (innerWidth === pageWidth) return; // a phone's address bar comes and goes
  pageWidth = innerWidth;
  requestAnimationFrame(() => {
    for (const plot of document.querySelectorAll(".plot")) Plotly.purge(plot);
    redraw();
  });
});
