// What is known of the selected subject: asked and measured side by side, with the difference.

import { number, signed, words } from "./columns.js";
import { element } from "./elements.js";

const cell = (text, className = "figure") => element("td", { textContent: text, className });

export function showSubject(box, rows, i) {
  const status = rows.statusText(i);
  const tags = [element("span", { className: `tag ${status}`, textContent: status })];
  if (rows.extrapolated[i]) {
    tags.push(element("span", { className: "tag extrapolated", textContent: "extrapolated", title: "outside the training support" }));
  }
  const parts = [
    element("h2", {}, rows.ids[i], " ", ...tags),
    element("p", { className: "muted", textContent: `row ${rows.row[i]}` }),
  ];
  if (rows.reason(i)) parts.push(element("p", { className: "reason", textContent: rows.reason(i) }));
  parts.push(covariates(rows, i), quality(rows, i), structures(rows, i));
  box.replaceChildren(...parts.filter(Boolean));
}

function covariates(rows, i) {
  const some = Object.keys(rows.measured).length > 0;
  const heads = some ? ["", "asked", "measured", "difference"] : ["", "asked"];
  const lines = rows.covariates.map((covariate) => {
    const { name, numeric, unit } = covariate;
    const head = element("th", { scope: "row", title: covariate.description }, words(name));
    if (numeric && unit) head.append(element("small", { textContent: ` ${unit}` }));
    const asked = rows.asked[name][i];
    const texts = rows.facts.rows.asked[name].values;
    const line = element("tr", { data: { covariate: name } }, head, cell(numeric ? number(asked) : texts[asked] ?? "–"));
    if (some) line.append(...measured(rows, covariate, i));
    return line;
  });
  const head = element("tr", {}, ...heads.map((text) => element("th", { scope: "col", textContent: text })));
  const table = element("table", { className: "values" }, element("thead", {}, head), element("tbody", {}, ...lines));
  const by = some ? `measured on the image by ${rows.facts.measured_by}` : "nothing was measured on these images";
  return element("div", {}, table, element("p", { className: "muted", textContent: by }));
}

function measured(rows, { name, numeric, categories }, i) {
  const value = rows.measured[name]?.[i] ?? NaN;
  if (!Number.isFinite(value)) return [cell("–"), cell("–")];
  if (numeric) return [cell(number(value)), cell(signed(rows.difference(name, i)))];
  // Of two categories an evaluation measures the probability of the second.
  const text = `${categories[1] ?? ""} ${Math.round(100 * value)}\u00a0%`;
  const agrees = (value >= 0.5) === (rows.asked[name][i] === 1);
  return [cell(text), cell(agrees ? "agrees" : "differs")];
}

function quality(rows, i) {
  const known = { gate_score: "gate score", gate_attempts: "attempts", mean: "mean", std: "SD" };
  const lines = Object.entries(known).filter(([key]) => Number.isFinite(rows.quality[key]?.[i]));
  if (!lines.length) return null;
  const pair = (title, text) => element("div", {}, element("dt", { textContent: title }), element("dd", { textContent: text }));
  const items = lines.map(([key, title]) => pair(title, number(rows.quality[key][i])));
  const code = rows.gateCheck?.codes[i] ?? -1;
  if (code >= 0 && rows.gateCheck.values[code]) items.push(pair("nearest to refusal", rows.gateCheck.values[code]));
  return element("dl", { className: "quality" }, ...items);
}

// The legend of the label map, with the volume of every structure.
function structures(rows, i) {
  const { labels, rows: columns } = rows.facts;
  if (!labels.length || !rows.isOk(i)) return null;
  const items = labels.map(({ name, color }, k) => {
    const swatch = element("span", { className: "swatch" });
    swatch.style.background = `rgb(${color.join(" ")})`;
    const volume = number(columns.label_volumes[k]?.[i] ?? NaN);
    return element("div", {}, element("dt", {}, swatch, name), element("dd", { textContent: `${volume} ml` }));
  });
  return element("dl", { className: "quality structures", aria: { label: "Structures of the label map" } }, ...items);
}
