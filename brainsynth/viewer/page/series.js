// A case series: rows that were made from one noise, stepped through along the covariates that move.

import { number, words } from "./columns.js";
import { element } from "./elements.js";

const PACE_MS = 350;

export class Series {
  constructor(box, onSelect) {
    Object.assign(this, { box, onSelect, members: [], timer: 0 });
  }

  // Show the series that row i belongs to, if any.
  show(rows, i) {
    if (rows !== this.rows || !this.members.includes(i)) {
      this.pause();
      this.rows = rows;
      this.members = rows.seriesOf(i);
      this.build();
    }
    this.box.hidden = !this.members.length;
    this.at = i;
    if (this.members.length) this.update();
  }

  build() {
    if (!this.members.length) return;
    this.axes = this.movingAxes();
    this.sliders = this.axes.map((axis, k) => {
      const slider = element("input", { type: "range", min: 0, max: axis.values.length - 1, step: 1, aria: { label: axis.title } });
      const output = element("output");
      slider.addEventListener("input", () => this.put(k, Number(slider.value)));
      return { slider, output, label: element("label", {}, element("span", { textContent: axis.title }), slider, output) };
    });
    const button = (text, label, act) => {
      const made = element("button", { type: "button", textContent: text, title: label, aria: { label } });
      made.addEventListener("click", act);
      return made;
    };
    this.playing = button("▶", "play", () => this.toggle());
    this.place = element("span", { className: "place" });
    const buttons = [button("‹", "previous step", () => this.step(-1)), this.playing, button("›", "next step", () => this.step(1))];
    const title = element("strong", { textContent: "Case series", title: "volumes made from one noise" });
    const bar = element("div", { className: "steps" }, title, ...buttons, this.place);
    this.box.replaceChildren(bar, ...this.sliders.map(({ label }) => label));
  }

  // The covariates that move, if the members are a full grid of them; else just the members in order.
  movingAxes() {
    const { rows, members } = this;
    const axes = [];
    for (const { name, numeric, unit } of rows.covariates) {
      const column = rows.asked[name];
      const values = [...new Set(members.map((i) => column[i]))].sort((a, b) => a - b);
      if (values.length < 2 || values.some(Number.isNaN)) continue;
      const texts = rows.facts.rows.asked[name].values;
      axes.push({ title: words(name), values, of: (i) => column[i], text: (v) => (numeric ? `${number(v)} ${unit}` : texts[v] ?? "–") });
    }
    const full = axes.reduce((product, axis) => product * axis.values.length, 1);
    const places = new Set(members.map((i) => axes.map((axis) => axis.of(i)).join()));
    if (axes.length && axes.length <= 2 && full === members.length && places.size === full) return axes;
    const order = new Map(members.map((i, k) => [i, k]));
    const say = (k) => axes.slice(0, 3).map((axis) => `${axis.title} ${axis.text(axis.of(members[k]))}`).join(", ") || rows.ids[members[k]];
    return [{ title: "step", values: [...members.keys()], of: (i) => order.get(i), text: say }];
  }

  put(k, step) {
    const wanted = this.axes.map((axis, other) => (other === k ? axis.values[step] : axis.of(this.at)));
    const next = this.members.find((i) => this.axes.every((axis, other) => axis.of(i) === wanted[other]));
    return next === undefined ? undefined : this.onSelect(next);
  }

  // One step along the first axis; past the end it begins anew where `around` is set. Resolves when it is shown.
  async step(by, around = false) {
    if (!this.members.length) return;
    const [axis] = this.axes;
    const last = axis.values.length - 1;
    const place = axis.values.indexOf(axis.of(this.at)) + by;
    await this.put(0, around ? (place + last + 1) % (last + 1) : Math.min(last, Math.max(0, place)));
  }

  // The rows that the next steps will want.
  ahead(count) {
    if (!this.members.length) return [];
    const [axis, other] = this.axes;
    const line = this.members.filter((i) => !other || other.of(i) === other.of(this.at)).sort((a, b) => axis.of(a) - axis.of(b));
    const place = line.indexOf(this.at);
    return Array.from({ length: Math.min(count, line.length - 1) }, (_, k) => line[(place + k + 1) % line.length]);
  }

  toggle() {
    if (this.timer) return this.pause();
    if (!this.members.length) return;
    this.timer = setTimeout(() => this.tick(), PACE_MS);
    this.playing.textContent = "❚❚";
    this.playing.setAttribute("aria-label", "pause");
  }

  async tick() {
    await this.step(1, true);
    if (this.timer) this.timer = setTimeout(() => this.tick(), PACE_MS);
  }

  pause() {
    clearTimeout(this.timer);
    this.timer = 0;
    if (!this.playing) return;
    this.playing.textContent = "▶";
    this.playing.setAttribute("aria-label", "play");
  }

  update() {
    this.axes.forEach((axis, k) => {
      const { slider, output } = this.sliders[k];
      slider.value = axis.values.indexOf(axis.of(this.at));
      output.textContent = axis.text(axis.of(this.at));
      slider.setAttribute("aria-valuetext", output.textContent);
    });
    const outside = this.rows.extrapolated[this.at] ? " · extrapolated" : "";
    this.place.textContent = `${this.members.indexOf(this.at) + 1} of ${this.members.length}${outside}`;
  }
}
