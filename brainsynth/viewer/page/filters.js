// Filters: a range of each number, the wanted values of each category, and a part of the id.

import { number } from "./columns.js";
import { drawn, element } from "./elements.js";

const BARS = 28;
const STEPS = 200;

export class Filters {
  constructor(form, onChange) {
    Object.assign(this, { form, onChange, search: "" });
    this.chosen = new Map(); // key of a field → {low, high} or Set of codes; a field without an entry lets all through
    form.addEventListener("submit", (event) => event.preventDefault());
  }

  get active() {
    return this.chosen.size + (this.search ? 1 : 0);
  }

  clear() {
    this.chosen.clear();
    this.search = "";
    this.show(this.rows);
    this.onChange();
  }

  // Indices of the rows that pass.
  pass() {
    const { rows } = this;
    const tests = rows.fields.filter((f) => this.chosen.has(f.key)).map((f) => this.test(f));
    const wanted = this.search.toLowerCase();
    if (wanted) tests.push((i) => rows.ids[i].toLowerCase().includes(wanted));
    const out = [];
    for (let i = 0; i < rows.size; i++) if (tests.every((test) => test(i))) out.push(i);
    return out;
  }

  test(field) {
    const chosen = this.chosen.get(field.key);
    if (field.values) return (i) => chosen.has(field.get(i));
    return (i) => {
      const value = field.get(i);
      return value >= chosen.low && value <= chosen.high;
    };
  }

  show(rows) {
    this.rows = rows;
    this.histograms = [];
    const groups = Map.groupBy(rows.fields, (field) => field.group);
    const boxes = ["Covariates", "Quality", "Measured − asked"].filter((name) => groups.has(name)).map((name) => {
      const fields = groups.get(name).map((field) => (field.values ? this.checks(field) : this.range(field)));
      return element("section", {}, element("h2", { textContent: name }), ...fields.filter(Boolean));
    });
    this.form.replaceChildren(...boxes);
  }

  checks(field) {
    const { rows } = this;
    const counts = new Array(field.values.length).fill(0);
    for (let i = 0; i < rows.size; i++) if (field.get(i) >= 0) counts[field.get(i)]++;
    const boxes = field.values.map((text, code) => {
      const checked = this.chosen.get(field.key)?.has(code) ?? true;
      const box = element("input", { type: "checkbox", checked, name: field.key, value: text });
      box.addEventListener("change", () => {
        const all = [...field.values.keys()];
        const kept = this.chosen.get(field.key) ?? new Set(all);
        kept[box.checked ? "add" : "delete"](code);
        this.set(field, kept.size === all.length ? null : kept);
      });
      return element("label", { className: "check" }, box, ` ${text} `, element("small", { textContent: counts[code] }));
    });
    return element("fieldset", {}, element("legend", { textContent: field.title }), element("div", { className: "checks" }, ...boxes));
  }

  range(field) {
    let [least, most] = [Infinity, -Infinity];
    for (let i = 0; i < this.rows.size; i++) {
      const value = field.get(i);
      if (value < least) least = value;
      if (value > most) most = value;
    }
    if (!(least < most)) return null;
    const histogram = this.histogram(field, least, most);
    const [low, high] = ["low", "high"].map((end) => this.end(field, end, least, most));
    const chosen = this.chosen.get(field.key) ?? { low: least, high: most };
    low.put(Math.max(chosen.low, least));
    high.put(Math.min(chosen.high, most));
    const changed = () => {
      // An end that was not moved is open: rows that join later are not shut out by it.
      const wanted = { low: low.value() > least ? low.value() : -Infinity, high: high.value() < most ? high.value() : Infinity };
      histogram.mark(wanted);
      this.set(field, wanted.low === -Infinity && wanted.high === Infinity ? null : wanted);
    };
    low.onChange = high.onChange = changed;
    histogram.mark(chosen);
    const unit = field.unit ? element("small", { textContent: ` ${field.unit}` }) : "";
    return element(
      "fieldset", {}, element("legend", {}, field.title, unit), histogram.picture,
      element("div", { className: "dual" }, low.slider, high.slider),
      element("div", { className: "ends" }, low.box, element("span", { textContent: "to" }), high.box),
    );
  }

  // One end of a range: a slider and a box for the exact number, which follow each other.
  end(field, which, least, most) {
    const name = `${which === "low" ? "lowest" : "highest"} ${field.short}`;
    const slider = element("input", { type: "range", min: 0, max: STEPS, step: 1, aria: { label: name } });
    const box = element("input", { type: "number", step: "any", name: `${field.key}.${which}`, aria: { label: name } });
    const out = { slider, box, onChange: null };
    let value = which === "low" ? least : most;
    out.value = () => value;
    out.put = (next) => {
      value = next;
      slider.value = Math.round(((next - least) / (most - least)) * STEPS);
      slider.setAttribute("aria-valuetext", `${number(next)} ${field.unit}`);
      box.value = number(next);
    };
    slider.addEventListener("input", () => {
      const at = Number(slider.value);
      out.put(at === 0 ? least : at === STEPS ? most : least + ((most - least) * at) / STEPS);
      out.onChange();
    });
    box.addEventListener("change", () => {
      const typed = box.value === "" ? NaN : Number(box.value);
      out.put(Number.isFinite(typed) ? typed : which === "low" ? least : most);
      out.onChange();
    });
    return out;
  }

  histogram(field, least, most) {
    const bin = (value) => Math.min(BARS - 1, Math.floor(((value - least) / (most - least)) * BARS));
    const count = (indices, size) => {
      const out = new Uint32Array(BARS);
      for (let k = 0; k < size; k++) {
        const value = field.get(indices ? indices[k] : k);
        if (Number.isFinite(value)) out[bin(value)]++;
      }
      return out;
    };
    const all = count(null, this.rows.size);
    const top = Math.max(...all);
    const picture = drawn("svg", { viewBox: `0 0 ${BARS} 20`, preserveAspectRatio: "none", class: "histogram", "aria-hidden": "true" });
    const bars = (counts, kind) =>
      [...counts].map((n, k) => drawn("rect", { x: k + 0.08, width: 0.84, y: 20 - (19 * n) / top, height: (19 * n) / top, class: kind }));
    const draw = (passing) => picture.replaceChildren(...bars(all, "all"), ...bars(count(passing, passing.length), "passing"));
    this.histograms.push(draw);
    const mark = ({ low, high }) => picture.classList.toggle("narrowed", low > least || high < most);
    return { picture, mark };
  }

  // After a change anywhere: what is left of each distribution.
  redraw(passing) {
    for (const draw of this.histograms) draw(passing);
  }

  set(field, chosen) {
    if (chosen === null) this.chosen.delete(field.key);
    else this.chosen.set(field.key, chosen);
    this.onChange();
  }
}
