"use strict";
function drawPlots() {
  results.plots.forEach((plot) => {
    const traces = plot.lines.map((line, i) => ({
      x: line.x, y: line.y, name: escapeHtml(line.name), mode: line.x.length > 1 ? "lines" : "markers", cliponaxis: Boolean(plot.range),
      line: { color: css(`--hue-${i % 8}`), width: i ? 2.5 : 2, dash: line.faint ? "dot" : "solid" }, marker: { color: css(`--hue-${i % 8}`) },
      hovertemplate: `%{y:${plot.format}}<extra>${escapeHtml(line.name)}</extra>`,
    }));
    const colour = (mark) => css(mark.faint ? "--soft" : "--accent");
    const shapes = plot.marks.map((mark) => ({
      type: "line", x0: mark.x, x1: mark.x, yref: "paper", y0: 0, y1: 1, line: { color: colour(mark), width: 1.5, dash: mark.faint ? "dot" : "dash" },
    }));
    const annotations = plot.marks.map((mark, i) => ({
      x: plot.logarithmic ? Math.log10(mark.x) : mark.x, y: 1, yref: "paper", yanchor: "bottom", yshift: 15 * i, text: escapeHtml(mark.text), showarrow: false,
      font: { size: 12, color: colour(mark) },
    }));
    Plotly.react(plot.id, traces, layout({
      hovermode: "x unified", margin: { l: 52, r: 12, t: 9 + 15 * Math.max(1, plot.marks.length), b: plot.lines.length > 1 ? 64 : 44 }, shapes, annotations, showlegend: plot.lines.length > 1,
      legend: { orientation: "h", x: 0, y: -0.3 },
      xaxis: { title: { text: plot.axis, standoff: 8 }, fixedrange: true, nticks: 6, type: plot.logarithmic ? "log" : "linear", exponentformat: "power" },
      yaxis: {
        ...(plot.percent ? percentAxis : {}), fixedrange: true, nticks: 6, ...(plot.range ? { range: plot.range } : {}),
        ...(plot.vertical ? { title: { text: plot.vertical, standoff: 8 } } : {}),
      },
    }), config);
  });
}
onDraw(drawPlots);
