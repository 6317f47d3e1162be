// The page: loads the rows, and keeps filters, table, volume, series and plots at the same subject.

import { Rows } from "./columns.js";
import { byId } from "./elements.js";
import { Filters } from "./filters.js";
import { showSubject } from "./panel.js";
import { Scatter } from "./scatter.js";
import { Series } from "./series.js";
import { ask } from "./source.js";
import { Table } from "./table.js";
import { Volume, reason } from "./volume.js";

const POLL_MS = 4000;
const AHEAD = 3;

class App {
  constructor() {
    const select = (i) => this.select(i);
    this.filters = new Filters(byId("filters"), () => this.filter());
    this.table = new Table(byId("table"), select);
    this.series = new Series(byId("series"), select);
    this.scatter = new Scatter(byId("scatter"), select);
    this.selected = -1;
    this.shown = 0;
    const search = byId("search");
    search.addEventListener("input", () => ((this.filters.search = search.value.trim()), this.filter()));
    byId("clear").addEventListener("click", () => ((search.value = ""), this.filters.clear()));
    document.addEventListener("keydown", (event) => this.key(event), true);
    document.addEventListener("keyup", (event) => event.target.id === "volume" && event.stopPropagation(), true);
  }

  async start() {
    await this.load();
    this.volume = new Volume(this.rows.facts);
    await this.volume.attach(byId("volume"), byId("planes"));
    const asked = this.rows.byId.get(decodeURIComponent(location.hash.slice(1)));
    const first = asked ?? this.passing.find((i) => this.rows.isOk(i)) ?? this.passing[0];
    if (first !== undefined) await this.select(first);
    document.body.dataset.ready = "yes";
    if (!this.rows.facts.finished) setTimeout(() => this.poll(), POLL_MS);
  }

  async load() {
    const answer = await ask("dataset.json");
    if (!answer.ok) throw new Error(await reason(answer));
    const version = answer.headers.get("ETag");
    if (version === this.version) return false;
    this.version = version;
    const kept = this.rows?.ids[this.selected];
    this.rows = new Rows(await answer.json());
    this.selected = this.rows.byId.get(kept) ?? -1;
    this.describe();
    this.filters.show(this.rows);
    this.table.show(this.rows);
    this.scatter.show(this.rows);
    this.filter();
    return true;
  }

  // While the dataset is still being made: look for what was committed since.
  async poll() {
    try {
      if (await this.load()) await this.select(this.selected < 0 ? this.passing[0] : this.selected, this.selected >= 0);
      if (this.rows.facts.finished) return;
    } catch (error) {
      say(`${error.message}`);
    }
    setTimeout(() => this.poll(), POLL_MS);
  }

  describe() {
    const { facts, status, size } = this.rows;
    const counts = facts.rows.status.values.map((name, code) => [name, status.reduce((n, s) => n + (s === code), 0)]);
    const parts = counts.map(([name, n]) => `${n.toLocaleString("en")} ${name}`);
    if (!facts.finished) parts.push(`still being made: ${size.toLocaleString("en")} of ${facts.planned.toLocaleString("en")} rows`);
    document.title = `${facts.title} · brainsynth view`;
    byId("title").textContent = facts.title;
    byId("title").title = facts.model ? `made by ${facts.model.name} (${facts.model.licence})` : "";
    byId("counts").textContent = parts.join(" · ");
    const what = facts.synthetic ? "Synthetic" : "Real scans";
    byId("marking").textContent = `${what}; not for diagnosis`;
    byId("stamp").textContent = facts.synthetic ? "SYNTHETIC" : "";
    say(facts.note);
  }

  filter() {
    this.passing = this.filters.pass();
    const { active } = this.filters;
    byId("active").textContent = active ? `(${active} active)` : "";
    byId("clear").hidden = !active;
    byId("shown").textContent = `${this.passing.length.toLocaleString("en")} of ${this.rows.size.toLocaleString("en")}`;
    this.table.fill(this.passing);
    this.filters.redraw(this.passing);
    this.scatter.fill(this.passing, this.selected);
  }

  async select(i, quietly = false) {
    const { rows } = this;
    if (i === undefined || i < 0) return;
    this.selected = i;
    history.replaceState(null, "", `#${encodeURIComponent(rows.ids[i])}`);
    this.table.select(i);
    this.scatter.mark(i);
    showSubject(byId("panel"), rows, i);
    this.series.show(rows, i);
    if (!quietly || !rows.isOk(i)) await this.picture(i);
  }

  async picture(i) {
    const { rows, volume } = this;
    const absent = byId("absent");
    if (!rows.isOk(i)) {
      volume.hide();
      absent.textContent = `No picture: this row was ${rows.statusText(i) === "failed" ? "not made" : "rejected"}. ${rows.reason(i)}`;
      absent.hidden = false;
      return this.done(i);
    }
    const slow = setTimeout(() => (byId("busy").hidden = false), 300);
    try {
      if (!(await volume.show(rows.row[i]))) return;
      absent.hidden = true;
    } catch (error) {
      if (this.selected !== i) return;
      absent.textContent = `No picture: ${error.message}`;
      absent.hidden = false;
    } finally {
      clearTimeout(slow);
      if (this.selected === i) byId("busy").hidden = true;
    }
    this.done(i);
    const beside = this.series.members.length ? this.series.ahead(AHEAD) : [this.table.beside(1), this.table.beside(-1)];
    volume.expect(beside.filter((k) => k >= 0 && rows.isOk(k)).map((k) => rows.row[k]));
  }

  // For whoever watches the page, as its tests do: which subject is on the screen now.
  done(i) {
    document.body.dataset.shown = this.rows.ids[i];
  }

  key(event) {
    const { target } = event;
    if (target.id === "volume") event.stopPropagation(); // NiiVue's own keys change the view mode
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = target.matches?.("input:not([type=checkbox]), select, textarea");
    if (typing) return target.id === "search" && event.key === "Escape" ? target.blur() : undefined;
    const page = Math.max(1, Math.floor(byId("table").clientHeight / 26) - 2);
    const steps = { ArrowUp: -1, ArrowDown: 1, PageUp: -page, PageDown: page, Home: -Infinity, End: Infinity };
    const acts = {
      ArrowLeft: () => this.series.step(-1),
      ArrowRight: () => this.series.step(1),
      p: () => this.series.toggle(),
      P: () => this.series.toggle(),
      "/": () => byId("search").focus(),
    };
    if (event.key in steps) this.select(this.table.beside(steps[event.key]));
    else if (event.key in acts) acts[event.key]();
    else return;
    event.preventDefault();
  }
}

function say(text) {
  byId("note").textContent = text;
  byId("note").hidden = !text;
}

new App().start().catch((error) => {
  say(error.message);
  document.body.dataset.ready = "failed";
  console.error(error);
});
