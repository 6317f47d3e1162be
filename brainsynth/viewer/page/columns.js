// The document of the server as typed columns, and the fields that filters, table and sorting share.

const NUMBER = new Intl.NumberFormat("en", { maximumSignificantDigits: 4, useGrouping: false });
const SIGNED = new Intl.NumberFormat("en", { maximumSignificantDigits: 3, useGrouping: false, signDisplay: "exceptZero" });

export const number = (value) => (Number.isFinite(value) ? NUMBER.format(value) : "–");
export const signed = (value) => (Number.isFinite(value) ? SIGNED.format(value).replace("-", "−") : "–");
export const words = (name) => name.replaceAll("_", " ");

const numbers = (list) => Float64Array.from(list, (value) => (value === null ? NaN : value));

// A field: one value a row, either a number (NaN where missing) or the index of one of `values` (-1 where missing).
function field(group, key, title, column, extra) {
  return { group, key, title, unit: "", values: null, short: title, get: (i) => column[i], ...extra };
}

export class Rows {
  constructor(facts) {
    const rows = facts.rows;
    Object.assign(this, { facts, ids: rows.sample_id, row: rows.row, size: rows.row.length });
    this.covariates = facts.covariates;
    this.status = Int8Array.from(rows.status.codes);
    this.extrapolated = Uint8Array.from(rows.extrapolated);
    this.series = Int32Array.from(rows.series);
    this.asked = {};
    this.measured = {};
    for (const { name, numeric } of this.covariates) {
      this.asked[name] = numeric ? numbers(rows.asked[name]) : Int16Array.from(rows.asked[name].codes);
      if (rows.measured[name]) this.measured[name] = numbers(rows.measured[name]);
    }
    this.quality = Object.fromEntries(Object.entries(rows.quality).map(([name, list]) => [name, numbers(list)]));
    this.gateCheck = rows.gate_check;
    this.fields = this.makeFields();
    this.byId = new Map(this.ids.map((id, i) => [id, i]));
  }

  makeFields() {
    const { rows } = this.facts;
    const out = [field("Quality", "status", "status", this.status, { values: rows.status.values })];
    if (this.extrapolated.some(Boolean)) {
      out.push(field("Quality", "extrapolated", "extrapolated", this.extrapolated, { values: ["no", "yes"] }));
    }
    const known = { gate_score: "gate score", gate_attempts: "gate attempts" };
    for (const [key, title] of Object.entries(known)) {
      if (this.quality[key]) out.push(field("Quality", key, title, this.quality[key]));
    }
    for (const { name, unit, numeric } of this.covariates) {
      const values = numeric ? null : rows.asked[name].values;
      out.push(field("Covariates", name, words(name), this.asked[name], { unit, values }));
    }
    for (const { name, unit, numeric } of this.covariates) {
      if (!numeric || !this.measured[name]) continue;
      const extra = { unit, get: (i) => this.difference(name, i), short: `Δ ${words(name)}`, difference: true };
      out.push(field("Measured − asked", `difference:${name}`, words(name), null, extra));
    }
    return out;
  }

  difference(name, i) {
    return this.measured[name][i] - this.asked[name][i];
  }

  isOk(i) {
    return this.statusText(i) === "ok";
  }

  statusText(i) {
    return this.facts.rows.status.values[this.status[i]];
  }

  reason(i) {
    const { values, codes } = this.facts.rows.reason;
    return codes[i] < 0 ? "" : values[codes[i]];
  }

  // What a field says of a row, as a text without its unit.
  text(field, i) {
    const value = field.get(i);
    if (field.values) return value < 0 ? "–" : field.values[value];
    return field.difference ? signed(value) : number(value);
  }

  // The rows of the series that a row belongs to, in order of the table; empty where it belongs to none.
  seriesOf(i) {
    if (this.series[i] < 0) return [];
    const out = [];
    for (let k = 0; k < this.size; k++) if (this.series[k] === this.series[i]) out.push(k);
    return out;
  }
}
