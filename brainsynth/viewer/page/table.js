// The table of subjects. Only the rows in sight are in the page, so that 100,000 are as light as a hundred.

import { element } from "./elements.js";

const ROW = 26;
const SPARE = 8;

export class Table {
  constructor(box, onSelect) {
    Object.assign(this, { box, onSelect, order: [], selected: -1, sort: { key: "", down: false } });
    this.head = element("div", { className: "head", role: "row" });
    this.body = element("div", { className: "body", role: "rowgroup" });
    box.replaceChildren(element("div", { role: "rowgroup", className: "top" }, this.head), this.body);
    let waiting = false;
    const later = () => {
      if (waiting) return;
      waiting = true;
      requestAnimationFrame(() => ((waiting = false), this.draw()));
    };
    box.addEventListener("scroll", later);
    new ResizeObserver(later).observe(box);
    this.body.addEventListener("click", (event) => {
      const line = event.target.closest("[data-index]");
      if (line) this.onSelect(Number(line.dataset.index));
    });
  }

  show(rows) {
    this.rows = rows;
    const order = ["Covariates", "Quality", "Measured − asked"];
    const hidden = ["status", "gate_attempts"];
    this.columns = order.flatMap((group) => rows.fields.filter((field) => field.group === group && !hidden.includes(field.key)));
    const id = { key: "", short: "subject", numeric: false };
    this.head.replaceChildren(...[id, ...this.columns].map((column) => this.heading(column)));
    this.box.style.setProperty("--columns", this.columns.length);
    this.box.setAttribute("aria-colcount", this.columns.length + 1);
  }

  heading(column) {
    const unit = column.unit && !column.difference ? element("small", { textContent: ` ${column.unit}` }) : "";
    const button = element("button", { type: "button", title: `sort by ${column.short}` }, column.short, unit);
    const cell = element("div", { role: "columnheader", className: column.key === "" || column.values ? "text" : "figure" }, button);
    button.addEventListener("click", () => {
      const same = this.sort.key === column.key;
      this.sort = { key: column.key, down: same ? !this.sort.down : false };
      this.fill(this.order);
    });
    cell.dataset.key = column.key;
    return cell;
  }

  // Show these rows, sorted as chosen; rows without a value come last.
  fill(indices) {
    const { key, down } = this.sort;
    const field = this.columns.find((column) => column.key === key);
    this.order = [...indices].sort((a, b) => a - b);
    const turn = down ? -1 : 1;
    if (field) {
      const rank = (i) => {
        const value = field.get(i);
        return Number.isNaN(value) || (field.values && value < 0) ? Infinity : turn * value;
      };
      const ranks = new Float64Array(this.rows.size);
      for (const i of this.order) ranks[i] = rank(i);
      this.order.sort((a, b) => (ranks[a] === ranks[b] ? a - b : ranks[a] < ranks[b] ? -1 : 1));
    } else if (down) this.order.reverse();
    for (const cell of this.head.children) {
      const state = cell.dataset.key === key ? (down ? "descending" : "ascending") : "none";
      cell.setAttribute("aria-sort", state);
    }
    this.box.setAttribute("aria-rowcount", this.order.length + 1);
    this.body.style.height = `${this.order.length * ROW}px`;
    this.draw();
  }

  draw() {
    const first = Math.max(0, Math.floor(this.box.scrollTop / ROW) - SPARE);
    const last = Math.min(this.order.length, first + Math.ceil(this.box.clientHeight / ROW) + 2 * SPARE);
    this.body.replaceChildren(...Array.from({ length: Math.max(0, last - first) }, (_, k) => this.line(first + k)));
    const there = this.order[first] !== undefined && this.body.querySelector("[aria-selected=true]");
    if (there) this.box.setAttribute("aria-activedescendant", there.id);
    else this.box.removeAttribute("aria-activedescendant");
  }

  line(place) {
    const { rows } = this;
    const i = this.order[place];
    const status = rows.statusText(i);
    const dot = element("i", { className: `dot ${status}`, title: status });
    const id = element("div", { role: "gridcell", className: "text id", title: rows.ids[i] }, dot, rows.ids[i]);
    const cells = this.columns.map((column) =>
      element("div", { role: "gridcell", className: column.values ? "text" : "figure", textContent: rows.text(column, i) }));
    const line = element("div", { role: "row", id: `row-${i}`, className: "line", data: { index: i } }, id, ...cells);
    line.style.top = `${place * ROW}px`;
    line.setAttribute("aria-rowindex", place + 2);
    line.setAttribute("aria-selected", i === this.selected);
    return line;
  }

  // Mark a row, and bring it into sight.
  select(i) {
    this.selected = i;
    const place = this.order.indexOf(i);
    if (place >= 0) {
      const [top, bottom] = [place * ROW, (place + 1) * ROW + this.head.offsetHeight];
      if (top < this.box.scrollTop) this.box.scrollTop = top;
      else if (bottom > this.box.scrollTop + this.box.clientHeight) this.box.scrollTop = bottom - this.box.clientHeight;
    }
    this.draw();
  }

  // The row so many places after the selected one; the first where none is in sight. -1 where there is none.
  beside(step) {
    if (!this.order.length) return -1;
    const place = this.order.indexOf(this.selected);
    if (place < 0) return this.order[0];
    return this.order[Math.min(this.order.length - 1, Math.max(0, place + step))];
  }
}
