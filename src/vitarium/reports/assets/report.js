"use strict";
const { models, costs, classes, confusion, metric } = results;
const metricAxis = metric.percent ? percentAxis : {};
const unit = metric.percent || !metric.unit ? "" : ` ${metric.unit}`;

// ---- metric against cost

const scatter = document.getElementById("scatter");
const chosenCost = () => costs.find((cost) => cost.key === document.querySelector("input[name=cost]:checked").value);

function niceTicks(low, high) { // 1, 2, 5 in every decade
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
    for (const digit of [1, 2, 5]) ticks.push(digit * 10 ** power);
  return ticks.filter((tick) => tick >= low && tick <= high);
}

function horizontal(values) { // a logarithmic axis where the costs differ by much
  const low = Math.min(...values), high = Math.max(...values);
  if (low > 0 && high / low > 6) {
    const pad = 0.12 * Math.log10(high / low);
    const range = [Math.log10(low) - pad, Math.log10(high) + pad];
    return { type: "log", range, tickvals: niceTicks(10 ** range[0], 10 ** range[1]), at: Math.log10 };
  }
  const pad = 0.14 * (high - low || high || 1);
  return { type: "linear", range: [Math.max(0, low - pad), high + pad], nticks: 7, at: (value) => value };
}

const errorAbove = (m) => (metric.percent ? Math.min(m.error, 1 - m.score) : m.error); // no share is above 100 % or below 0
const errorBelow = (m) => (metric.percent ? Math.min(m.error, m.score) : m.error);

function vertical() {
  const low = Math.min(...models.map((m) => m.score - errorBelow(m))), high = Math.max(...models.map((m) => m.score + errorAbove(m)));
  const span = high - low || Math.abs(high) || 0.1, pad = 0.12 * span
  const room = 0.05 * span; // for a point at the end, too little for a tick
  return metric.percent ? [Math.max(-room, low - pad), Math.min(1 + room, high + pad)] : [low - pad, high + pad];
}

const MOST_NAMES = 12; // beside the points; more cover one another
const SIDES = ["middle right", "middle left", "top right", "bottom right", "top left", "bottom left", "top center", "bottom center"];

function nameBox(point, side) {
  const w = 7.2 * point.name.length + 4, h = 17;
  const [v, s] = side.split(" ");
  const left = s === "right" ? point.x + 9 : s === "left" ? point.x - 9 - w : point.x - w / 2;
  const top = v === "middle" ? point.y - h / 2 : v === "top" ? point.y - h - 6 : point.y + 6;
  return [left, top, left + w, top + h];
}

function placeNames(points, front, width, height) { // each name where it covers least of the rest, a few rounds
  const taken = points.flatMap((p) => [[p.x - 8, p.y - 8, p.x + 8, p.y + 8], [p.x - 3, p.y - p.bar, p.x + 3, p.y + p.bar]]);
  front.forEach((i, k) => { // the steps of the front
    const from = points[i], to = points[front[k + 1]] ?? { x: width, y: from.y };
    taken.push([from.x, from.y - 3, to.x, from.y + 3], [to.x - 3, to.y, to.x + 3, from.y]);
  });
  const overlap = (a, b) => Math.max(0, Math.min(a[2], b[2]) - Math.max(a[0], b[0])) * Math.max(0, Math.min(a[3], b[3]) - Math.max(a[1], b[1]));
  const covered = (box, others) => others.reduce((sum, other) => sum + overlap(box, other), 0);
  const placed = points.map(() => ({ side: SIDES[0], box: [0, 0, 0, 0] }));
  for (let round = 0; round < 4; round++)
    points.forEach((p, i) => {
      const others = placed.filter((_, k) => k !== i).map((name) => name.box);
      const options = SIDES.map((side, order) => {
        const box = nameBox(p, side);
        const outside = Math.max(0, -box[0]) + Math.max(0, box[2] - width) + Math.max(0, -box[1]) + Math.max(0, box[3] - height);
        return { side, box, cost: covered(box, taken) + 3 * covered(box, others) + 60 * outside + order };
      });
      placed[i] = options.reduce((a, b) => (b.cost < a.cost ? b : a));
    });
  return placed.map((name) => name.side);
}

function drawScatter() {
  const cost = chosenCost();
  const values = models.map((m) => m[cost.key]);
  const { at, ...xaxis } = horizontal(values);
  const y = vertical();
  const width = scatter.clientWidth - 72, height = scatter.clientHeight - 62;
  const named = (i) => models.length <= MOST_NAMES || cost.front.includes(i); // of many, the others are named under the pointer
  const points = models.map((m, i) => ({
    name: named(i) ? m.name : "",
    x: ((at(m[cost.key]) - xaxis.range[0]) / (xaxis.range[1] - xaxis.range[0])) * width,
    y: ((y[1] - m.score) / (y[1] - y[0])) * height,
    bar: (m.error / (y[1] - y[0])) * height,
  }));
  const front = cost.front.slice().sort((a, b) => values[a] - values[b]);
  const edge = xaxis.type === "log" ? 10 ** xaxis.range[1] : xaxis.range[1];
  const line = {
    x: [...front.map((i) => values[i]), edge], y: [...front.map((i) => models[i].score), models[front.at(-1)].score],
    mode: "lines", line: { shape: "hv", color: css("--accent"), width: 1.5, dash: "dot" }, hoverinfo: "skip",
  };
  const marks = {
    x: values, y: models.map((m) => m.score), mode: "markers+text",
    text: points.map((p) => escapeHtml(p.name)), textposition: placeNames(points, front, width, height), cliponaxis: false,
    textfont: { size: 13, color: css("--ink") },
    marker: {
      size: 12, color: models.map(hue), opacity: 1,
      line: { width: models.map((_, i) => (front.includes(i) ? 2.5 : 0)), color: css("--card") },
    },
    error_y: {
      type: "data", symmetric: false, array: models.map(errorAbove), arrayminus: models.map(errorBelow),
      visible: models.some((m) => m.error > 0), color: css("--soft"), thickness: 1, width: 3,
    },
    customdata: models.map((m) => `<b>${escapeHtml(m.name)}</b><br>${m.hover.map(escapeHtml).join("<br>")}`),
    hovertemplate: "%{customdata}<extra></extra>",
  };
  const rings = {
    x: front.map((i) => values[i]), y: front.map((i) => models[i].score), mode: "markers", hoverinfo: "skip",
    marker: { size: 16, color: css("--accent") },
  };
  Plotly.react(scatter, [line, rings, marks], layout({
    margin: { l: 56, r: 16, t: 10, b: 52 },
    xaxis: { ...xaxis, title: { text: cost.title, standoff: 12 }, tickformat: cost.format, fixedrange: true, automargin: false },
    yaxis: { ...metricAxis, range: y, ticksuffix: unit, fixedrange: true, nticks: 7, automargin: false },
  }), config);
}

// ---- learning curves

const hiddenModels = new Set();

function drawCurves(id, key, format) {
  const traces = models.map((m, i) => {
    const points = m.history.filter((point) => Number.isFinite(point[key]));
    return {
      x: points.map((p) => p.step), y: points.map((p) => p[key]), name: escapeHtml(m.name), mode: points.length > 1 ? "lines" : "markers", cliponaxis: false,
      line: { color: hue(m), width: 2, dash: ["solid", "dash", "dot"][Math.floor(i / 8) % 3] }, marker: { color: hue(m) }, visible: !hiddenModels.has(i),
      hovertemplate: `%{y:${format}}<extra>${escapeHtml(m.name)}</extra>`,
    };
  });
  Plotly.react(id, traces, layout({
    hovermode: "x unified", margin: { l: 48, r: 10, t: 8, b: 42 },
    xaxis: { title: { text: "step", standoff: 8 }, fixedrange: true, rangemode: "tozero", nticks: 6 },
    yaxis: { fixedrange: true, nticks: 6, ...(key === metric.key ? metricAxis : { rangemode: "tozero" }) },
  }), config);
}

function drawAllCurves() {
  drawCurves("score", metric.key, metric.percent ? ".1%" : ".4~g");
  if (document.getElementById("loss")) drawCurves("loss", "train_loss", ".3f");
}

// ---- confusion matrix

function mixed(name, share) { // a colour of the page, laid over the card
  const [over, under] = [css(name), css("--card-rgb")].map((text) => text.split(",").map(Number));
  return `rgb(${over.map((c, i) => Math.round(share * c + (1 - share) * under[i])).join(",")})`;
}

function drawConfusion() {
  const many = classes.length > 20;
  const totals = confusion.map((row) => row.reduce((a, b) => a + b, 0) || 1);
  const cells = (value) => confusion.map((row, t) => row.map((n, p) => value(n, t, p)));
  const layer = (keep, most, colour) => ({
    type: "heatmap", showscale: false, hoverongaps: false, xgap: many ? 0 : 2, ygap: many ? 0 : 2, hovertemplate: "%{customdata}<extra></extra>",
    x: classes.map((_, i) => i), y: classes.map((_, i) => i), z: cells((n, t, p) => (keep(t, p) && n ? n / totals[t] : null)), zmin: 0, zmax: most,
    colorscale: [[0, mixed(colour, 0.12)], [1, mixed(colour, 1)]],
    text: cells((n, t, p) => (keep(t, p) && n ? String(n) : "")), texttemplate: many ? "" : "%{text}",
    customdata: cells((n, t, p) => `${escapeHtml(classes[t])} predicted as ${escapeHtml(classes[p])}: ${n} of ${totals[t]} (${percent(n / totals[t])})`),
  });
  const most = Math.max(0.02, ...cells((n, t, p) => (t === p ? 0 : n / totals[t])).flat());
  const every = Math.ceil(classes.length / 30);
  const shown = classes.map((_, i) => i).filter((i) => i % every === 0);
  const names = shown.map((i) => escapeHtml(classes[i].length > 14 ? `${classes[i].slice(0, 13)}…` : classes[i]));
  const axis = { tickvals: shown, ticktext: names, showgrid: false, fixedrange: true, range: [-0.5, classes.length - 0.5] };
  Plotly.react("confusion", [layer((t, p) => t === p, 1, "--right"), layer((t, p) => t !== p, most, "--wrong")], layout({
    margin: { l: 44, r: 6, t: 6, b: 44 },
    xaxis: { ...axis, title: { text: "predicted", standoff: 8 }, tickangle: names.every((name) => name.length < 4) ? 0 : -90 },
    yaxis: { ...axis, title: { text: "true", standoff: 8 }, range: [classes.length - 0.5, -0.5] },
  }), config);
}

// ---- switches

document.querySelectorAll("input[name=cost]").forEach((input) => input.addEventListener("change", drawScatter));
document.querySelectorAll(".chip").forEach((chip) => chip.addEventListener("click", () => {
  const model = Number(chip.dataset.model);
  const shown = hiddenModels.delete(model) || !hiddenModels.add(model);
  chip.setAttribute("aria-pressed", String(shown));
  drawAllCurves();
}));
onDraw(drawScatter);
onDraw(drawAllCurves);
if (confusion) onDraw(drawConfusion);
