// The volume: NiiVue on a canvas, sliders for its three planes, its label map over it, and volumes kept for going back and
// forth.

import { number } from "./columns.js";
import { element } from "./elements.js";
import { ask } from "./source.js";

const KEPT_BYTES = 384e6;
const AXES = [
  { axis: 0, name: "Left – right", letter: "x" },
  { axis: 1, name: "Back – front", letter: "y" },
  { axis: 2, name: "Down – up", letter: "z" },
];

export class Volume {
  constructor(facts) {
    const { shape, spacing_mm: spacing, origin_mm: origin } = facts.volume;
    Object.assign(this, { shape, spacing, origin, kept: new Map(), loading: new Map(), wanted: null, bright: 1 });
    Object.assign(this, { labels: facts.labels, opacity: 0 });
  }

  async attach(canvas, controls) {
    const { Niivue, SHOW_RENDER, MULTIPLANAR_TYPE, SLICE_TYPE } = globalThis.niivue;
    this.nv = new Niivue({
      logLevel: "warn",
      loadingText: "",
      dragAndDropEnabled: false,
      backColor: [0, 0, 0, 1],
      crosshairColor: [0.36, 0.75, 1, 0.7],
      crosshairWidth: 0.6,
      crosshairWidthUnit: "mm",
      crosshairGap: 6,
      fontColor: [0.75, 0.78, 0.82, 1],
      textHeight: 0.035,
      multiplanarLayout: MULTIPLANAR_TYPE.GRID,
      multiplanarShowRender: SHOW_RENDER.ALWAYS,
      multiplanarPadPixels: 6,
      sliceType: SLICE_TYPE.MULTIPLANAR,
    });
    await this.nv.attachToCanvas(canvas);
    this.nv.onLocationChange = () => this.follow();
    this.nv.onIntensityChange = (image) => this.light(image.cal_max, false);
    this.controls(controls, SHOW_RENDER);
  }

  controls(box, { ALWAYS, NEVER }) {
    this.sliders = AXES.map(({ axis, name, letter }) => {
      const slider = element("input", { type: "range", min: 0, max: this.shape[axis] - 1, step: 1, aria: { label: name } });
      const output = element("output");
      slider.addEventListener("input", () => this.move(axis, Number(slider.value)));
      return { axis, letter, slider, output, label: element("label", {}, element("span", { textContent: name }), slider, output) };
    });
    this.brightness = element("input", { type: "range", min: 0.1, max: 1.5, step: 0.01, value: 1, aria: { label: "White at" } });
    this.brightText = element("output");
    this.brightness.addEventListener("input", () => this.light(Number(this.brightness.value), true));
    const bright = element("label", {}, element("span", { textContent: "White at" }), this.brightness, this.brightText);
    const render = element("input", { type: "checkbox", checked: true });
    render.addEventListener("change", () => {
      this.nv.opts.multiplanarShowRender = render.checked ? ALWAYS : NEVER;
      this.nv.drawScene();
    });
    const reset = element("button", { type: "button", textContent: "Reset view" });
    reset.addEventListener("click", () => this.reset());
    const more = element("div", { className: "more" }, element("label", { className: "check" }, render, " rendering"), reset);
    const labels = this.labels.length ? [this.labelControl(more)] : [];
    box.replaceChildren(...this.sliders.map(({ label }) => label), bright, ...labels, more);
    this.light(1, false);
  }

  // A switch for the label map, and how opaque it is.
  labelControl(more) {
    const shown = element("input", { type: "checkbox", id: "labels" });
    const slider = element("input", { type: "range", min: 0.1, max: 1, step: 0.05, value: 0.5, aria: { label: "Labels" } });
    const output = element("output");
    const apply = async () => {
      [output.textContent, output.title] = [`${Math.round(100 * slider.value)} %`, ""];
      const before = this.opacity;
      this.opacity = shown.checked ? Number(slider.value) : 0;
      if (this.wanted === null) return;
      if (before && this.opacity) return this.nv.setOpacity(1, this.opacity);
      try {
        await this.show(this.wanted);
      } catch (error) {
        [shown.checked, this.opacity, output.textContent, output.title] = [false, 0, "lost", error.message];
      }
    };
    shown.addEventListener("change", apply);
    slider.addEventListener("input", apply);
    output.textContent = "50 %";
    more.prepend(element("label", { className: "check" }, shown, " labels"));
    return element("label", {}, element("span", { textContent: "Labels" }), slider, output);
  }

  // Show the volume of a row; what is on the screen stays until it is there. Resolves to false when it was overtaken.
  async show(row) {
    this.wanted = row;
    const image = await this.image(row);
    const labels = this.opacity ? await this.image(row, "labels") : null;
    if (this.wanted !== row) return false;
    const first = !this.nv.volumes.length;
    image.cal_min = 0;
    image.cal_max = this.bright;
    // Crosshair, pan, zoom and the rendering's angle are the scene's, not the volume's: they stay.
    if (labels) labels.opacity = this.opacity;
    this.nv.volumes = labels ? [image, labels] : [image];
    this.nv.setVolume(image, 0);
    document.body.dataset.labels = labels ? row : "";
    if (first) this.reset();
    this.follow();
    return true;
  }

  hide() {
    this.wanted = null;
  }

  // Read ahead, quietly: a failure is told when the volume is wanted.
  expect(rows) {
    for (const row of rows) {
      this.image(row).catch(() => {});
      if (this.opacity) this.image(row, "labels").catch(() => {});
    }
  }

  async image(row, kind = "volumes") {
    const key = `${kind}/${row}.nii`;
    if (this.kept.has(key)) {
      const image = this.kept.get(key);
      this.kept.delete(key);
      this.kept.set(key, image);
      return image;
    }
    if (!this.loading.has(key)) this.loading.set(key, this.read(key, kind).finally(() => this.loading.delete(key)));
    return this.loading.get(key);
  }

  async read(key, kind) {
    const answer = await ask(key);
    if (!answer.ok) throw new Error(await reason(answer));
    const name = key.replace("/", "-");
    const image = await globalThis.niivue.NVImage.loadFromUrl({ url: await answer.arrayBuffer(), name });
    if (kind === "labels") image.setColormapLabel(this.colours());
    this.kept.set(key, image);
    const bytes = image.img.byteLength;
    while (this.kept.size > Math.max(4, KEPT_BYTES / bytes)) this.kept.delete(this.kept.keys().next().value);
    return image;
  }

  // NiiVue's table of colours: background is transparent.
  colours() {
    const all = [{ index: 0, name: "", color: [0, 0, 0] }, ...this.labels];
    const [R, G, B] = [0, 1, 2].map((k) => all.map(({ color }) => color[k]));
    return { R, G, B, A: all.map(({ index }) => (index ? 255 : 0)), I: all.map(({ index }) => index), labels: all.map(({ name }) => name) };
  }

  reset() {
    const { nv } = this;
    nv.scene.crosshairPos = [0.5, 0.5, 0.5];
    nv.scene.pan2Dxyzmm = [0, 0, 0, 1];
    nv.setRenderAzimuthElevation(130, 18);
    this.light(1, true);
    this.follow();
  }

  light(white, draw) {
    this.bright = white;
    this.brightness.value = white;
    this.brightText.textContent = number(white);
    const [image] = this.nv.volumes;
    if (!draw || !image) return;
    image.cal_min = 0;
    image.cal_max = white;
    this.nv.updateGLVolume();
  }

  move(axis, voxel) {
    const at = [...this.nv.scene.crosshairPos];
    at[axis] = (voxel + 0.5) / this.shape[axis];
    this.nv.scene.crosshairPos = at;
    this.nv.drawScene();
    this.follow();
  }

  // The crosshair, in voxels and mm, on the sliders.
  follow() {
    for (const { axis, letter, slider, output } of this.sliders) {
      const last = this.shape[axis] - 1;
      const voxel = Math.min(last, Math.max(0, Math.floor(this.nv.scene.crosshairPos[axis] * this.shape[axis])));
      slider.value = voxel;
      output.textContent = `${letter} ${Math.round(this.origin[axis] + voxel * this.spacing[axis])} mm`.replace("-", "−");
      slider.setAttribute("aria-valuetext", output.textContent);
    }
  }
}

export async function reason(answer) {
  const text = await answer.text();
  try {
    return JSON.parse(text).error;
  } catch {
    return text.trim() || `the server answered ${answer.status}`;
  }
}
