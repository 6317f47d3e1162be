// Asked against measured, a plot for each covariate that was measured. A click opens the subject.

import { number, signed, words } from "./columns.js";
import { colour, element } from "./elements.js";

const EDGE = { left: 46, right: 10, top: 8, bottom: 30 };
const REACH = 14;
const MANY = 3000;

export class Scatter {
  constructor(box, onSelect) {
    Object.assign(this, { box, onSelect, plots: [], passing: [], selected: -1 });
    new ResizeObserver(() => this.draw()).observe(box);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  show(rows) {
    this.rows = rows;
    const measured = rows.covariates.filter(({ name, numeric, categories }) => rows.measured[name] && (numeric || categories.length === 2));
    this.plots = measured.map((covariate) => this.plot(covariate));
    const title = element("h2", { textContent: "Asked against measured" });
    const none = element("p", { className: "muted", textContent: "An evaluation with `publish: true` puts measured values here." });
    this.box.replaceChildren(title, ...(measured.length ? this.plots.map(({ figure }) => figure) : [none]));
  }

  plot({ name, numeric, unit, categories }) {
    const { rows } = this;
    const asked = rows.asked[name];
    // Two categories are two columns, spread a little, always alike.
    const spread = (i) => (((i * 2654435761) >>> 0) / 2 ** 32 - 0.5) * 0.5;
    const x = numeric ? (i) => asked[i] : (i) => (asked[i] < 0 ? NaN : asked[i] + spread(i));
    const y = (i) => rows.measured[name][i];
    const canvas = element("canvas", { role: "img" });
    const caption = element("figcaption");
    const out = { name, numeric, unit, categories, x, y, canvas, caption };
    out.figure = element("figure", { data: { covariate: name } }, element("h3", {}, words(name)), canvas, caption);
    if (numeric && unit) out.figure.firstChild.append(element("small", { textContent: ` ${unit}` }));
    const hit = (event) => this.nearest(out, event.offsetX, event.offsetY);
    canvas.addEventListener("click", (event) => hit(event) >= 0 && this.onSelect(hit(event)));
    canvas.addEventListener("mousemove", (event) => {
      const i = hit(event);
      canvas.style.cursor = i < 0 ? "" : "pointer";
      canvas.title = i < 0 ? "" : `${rows.ids[i]}: asked ${rows.text({ get: (k) => asked[k], values: rows.facts.rows.asked[name].values }, i)}, measured ${number(y(i))}`;
    });
    return out;
  }

  // After a change of the filters.
  fill(passing, selected) {
    Object.assign(this, { passing, selected });
    for (const plot of this.plots) this.describe(plot);
    this.draw();
  }

  // Another subject: the dots stay as they are.
  mark(selected) {
    this.selected = selected;
    for (const plot of this.plots) this.drawMark(plot);
  }

  // r, bias and spread of what passes the filters.
  describe(plot) {
    const { rows } = this;
    const both = this.passing.filter((i) => Number.isFinite(rows.measured[plot.name][i]) && !(rows.asked[plot.name][i] < 0 && !plot.numeric));
    let text = `n ${both.length}`;
    if (plot.numeric) {
      const { r, bias, sd } = agreement(both.map((i) => rows.asked[plot.name][i]), both.map(plot.y));
      if (Number.isFinite(r)) text = `r ${number(Math.round(100 * r) / 100)} · measured − asked ${signed(bias)} ± ${number(Number(sd.toPrecision(3)))} ${plot.unit} · ${text}`;
    } else {
      const right = both.filter((i) => (plot.y(i) >= 0.5) === (rows.asked[plot.name][i] === 1)).length;
      if (both.length) text = `${Math.round((100 * right) / both.length)} % as asked · ${text}`;
    }
    plot.caption.textContent = text.replaceAll("-", "−");
    plot.canvas.setAttribute("aria-label", `${words(plot.name)}: asked against measured; ${plot.caption.textContent}`);
  }

  draw() {
    for (const plot of this.plots) this.drawPlot(plot);
  }

  drawPlot(plot) {
    const [width, height] = [plot.canvas.clientWidth, plot.canvas.clientHeight];
    if (!width || !height) return;
    const scale = devicePixelRatio || 1;
    plot.dots = element("canvas", { width: Math.round(width * scale), height: Math.round(height * scale) });
    [plot.canvas.width, plot.canvas.height] = [plot.dots.width, plot.dots.height];
    const pen = plot.dots.getContext("2d");
    pen.scale(scale, scale);
    this.place(plot, width, height);
    this.frame(plot, pen, width, height);
    if (this.passing.length < this.rows.size) this.drawDots(plot, pen, [...this.rows.row.keys()], colour("--faint"), 0.35);
    this.drawDots(plot, pen, this.passing, colour("--accent"), this.rows.size > MANY ? 0.7 : 0.8);
    this.drawMark(plot);
  }

  drawDots(plot, pen, indices, style, alpha) {
    Object.assign(pen, { fillStyle: style, globalAlpha: alpha });
    const seen = new Set(); // of very many rows, one dot a pixel
    for (const i of indices) {
      const [left, up] = [plot.left(i), plot.up(i)];
      if (!Number.isFinite(left + up)) continue;
      if (this.rows.size <= MANY) {
        pen.beginPath();
        pen.arc(left, up, this.rows.size > 500 ? 2 : 3, 0, 2 * Math.PI);
        pen.fill();
        continue;
      }
      const pixel = Math.round(up) * 4096 + Math.round(left);
      if (seen.has(pixel)) continue;
      seen.add(pixel);
      pen.fillRect(Math.round(left), Math.round(up), 1, 1);
    }
    pen.globalAlpha = 1;
  }

  drawMark(plot) {
    if (!plot.dots) return;
    const pen = plot.canvas.getContext("2d");
    pen.clearRect(0, 0, plot.canvas.width, plot.canvas.height);
    pen.drawImage(plot.dots, 0, 0);
    const scale = devicePixelRatio || 1;
    const [left, up] = this.selected < 0 ? [NaN, NaN] : [plot.left(this.selected) * scale, plot.up(this.selected) * scale];
    if (!Number.isFinite(left + up)) return;
    for (const [style, size] of [["--panel", 8], ["--mark", 6]]) {
      pen.fillStyle = colour(style);
      pen.beginPath();
      pen.arc(left, up, size * scale, 0, 2 * Math.PI);
      pen.fill();
    }
  }

  // Where a value lies on the canvas.
  place(plot, width, height) {
    let [low, high] = [Infinity, -Infinity];
    for (let i = 0; i < this.rows.size; i++) {
      for (const value of plot.numeric ? [plot.x(i), plot.y(i)] : [plot.y(i)]) {
        if (value < low) low = value;
        if (value > high) high = value;
      }
    }
    if (!plot.numeric) [low, high] = [0, 1];
    const room = (high - low) * 0.04 || 1;
    Object.assign(plot, { low: low - room, high: high + room });
    const across = plot.numeric ? [plot.low, plot.high] : [-0.5, 1.5];
    plot.toLeft = (v) => EDGE.left + ((v - across[0]) / (across[1] - across[0])) * (width - EDGE.left - EDGE.right);
    plot.toUp = (v) => height - EDGE.bottom - ((v - plot.low) / (plot.high - plot.low)) * (height - EDGE.top - EDGE.bottom);
    plot.left = (i) => plot.toLeft(plot.x(i));
    plot.up = (i) => plot.toUp(plot.y(i));
  }

  frame(plot, pen, width, height) {
    const [right, bottom] = [width - EDGE.right, height - EDGE.bottom];
    Object.assign(pen, { strokeStyle: colour("--line"), fillStyle: colour("--muted"), font: "11px system-ui, sans-serif", lineWidth: 1 });
    const line = (...points) => (pen.beginPath(), points.forEach(([a, b], k) => (k ? pen.lineTo(a, b) : pen.moveTo(a, b))), pen.stroke());
    for (const value of ticks(plot.low, plot.high)) {
      const up = plot.toUp(value);
      line([EDGE.left, up], [right, up]);
      Object.assign(pen, { textAlign: "right", textBaseline: "middle" });
      pen.fillText(plot.numeric ? number(value) : `${Math.round(100 * value)} %`, EDGE.left - 5, up);
    }
    Object.assign(pen, { textAlign: "center", textBaseline: "top" });
    const below = plot.numeric ? ticks(plot.low, plot.high).map((v) => [v, number(v)]) : [[0, plot.categories[0]], [1, plot.categories[1]]];
    for (const [value, text] of below) {
      const left = plot.toLeft(value);
      if (plot.numeric) line([left, EDGE.top], [left, bottom]);
      pen.fillText(text, left, bottom + 3);
    }
    pen.fillText("asked", (EDGE.left + right) / 2, bottom + 16);
    pen.save();
    pen.translate(3, (EDGE.top + bottom) / 2);
    pen.rotate(-Math.PI / 2);
    pen.fillText(plot.numeric ? "measured" : `probability of ${plot.categories[1]}`, 0, 0);
    pen.restore();
    pen.setLineDash([4, 3]);
    pen.strokeStyle = colour("--muted");
    if (plot.numeric) line([plot.toLeft(plot.low), plot.toUp(plot.low)], [plot.toLeft(plot.high), plot.toUp(plot.high)]);
    else line([EDGE.left, plot.toUp(0.5)], [right, plot.toUp(0.5)]);
    pen.setLineDash([]);
  }

  nearest(plot, left, up) {
    let [found, least] = [-1, REACH ** 2];
    for (const i of this.passing) {
      const distance = (plot.left(i) - left) ** 2 + (plot.up(i) - up) ** 2;
      if (distance < least) [found, least] = [i, distance];
    }
    return found;
  }
}

function ticks(low, high) {
  const rough = (high - low) / 5;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((k) => k * power >= rough) * power;
  const out = [];
  for (let k = Math.ceil(low / step); k * step <= high; k++) out.push(Number((k * step).toPrecision(12)));
  return out;
}

function agreement(asked, measured) {
  const n = asked.length;
  const mean = (list) => list.reduce((sum, value) => sum + value, 0) / n;
  const sum = (list, other) => list.reduce((total, value, k) => total + value * other[k], 0);
  const from = (list) => ((middle) => list.map((value) => value - middle))(mean(list));
  const [a, b, d] = [from(asked), from(measured), from(measured.map((value, k) => value - asked[k]))];
  const bias = mean(measured) - mean(asked);
  return { r: n > 2 ? sum(a, b) / Math.sqrt(sum(a, a) * sum(b, b)) : NaN, bias, sd: Math.sqrt(sum(d, d) / (n - 1)) };
}
