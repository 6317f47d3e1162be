"""One noise under many covariates: an ordinary dataset by the ordinary line, and pictures of it. The noise is drawn, or that
of a person's scan.

```
<output>/dataset/          what `generate` makes of the table: verify, open_dataset and export know it
<output>/series.tsv        the points in order: covariates, extrapolated, differences; of a scan, what the gate measures
<output>/measures.json     of a scan: composition, reversibility and what the rest of series.tsv is relative to
<output>/grid.png differences.png montage.gif
```
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from brainsynth.bundle.files import bundle_folder
from brainsynth.bundle.generator import ModelSpec, model_spec
from brainsynth.bundle.recommended import recommended, recommended_generation
from brainsynth.bundle.spec import GATE_FILE, BundleSpec
from brainsynth.cohort.scan import ScanRejected, prepared_scan
from brainsynth.config.load import load_config
from brainsynth.config.schema import SHIPPED_BUNDLE, GenerateConfig, SynthesisConfig
from brainsynth.covariates.sweep import Sweep, check_not_held, held_values, parse_sweep, refuse_outside, sweep_rows
from brainsynth.covariates.words import Value
from brainsynth.errors import UserError
from brainsynth.evaluation.counterfactual import TEXTURE, composition, point, reversibility
from brainsynth.executors.preflight import check_layout
from brainsynth.gate.file import load_bundle_gate
from brainsynth.gate.gate import QualityGate
from brainsynth.models.counterfactual import ScanGenerator
from brainsynth.models.sampler_rules import check_inversion
from brainsynth.places import user_path
from brainsynth.plan import ROW_COLUMNS, PersonScan, Plan, ScanIdentity, generation_identity
from brainsynth.reading.dataset import open_dataset
from brainsynth.report import case_figures
from brainsynth.report.montage import Volume
from brainsynth.stages import generate
from brainsynth.storage.commit import read_plan
from brainsynth.storage.filesystem import LocalStore, local_folder, open_store
from brainsynth.storage.finalise import pretty_json
from brainsynth.storage.tsv import tsv_text
from brainsynth.volume import voxel_sha256

log = logging.getLogger(__name__)
DATASET, MEASURES = "dataset", "measures.json"
STEPS = 16
"""Of the flow in either direction; a sampler with more steps has its own number."""
_COLUMNS = 4


class ScanFile(NamedTuple):
    """A person's scan as a user names it."""

    path: str
    mask: str | None
    covariates: str
    """`age=63,sex=F,…`: all that the model knows."""


class Case:
    """What is to be made: the sweeps, their rows, and which of them are extrapolated. Writes nothing."""

    def __init__(
        self,
        config: SynthesisConfig,
        output: str,
        sweeps: Sequence[str],
        hold: Sequence[str] = (),
        seed: int = 0,
        reference: str = "first",
        allow_extrapolation: bool = False,
        scan: ScanFile | None = None,
    ) -> None:
        self.output = local_folder(output, "output")
        self.bundle: ModelSpec = model_spec(config.bundle)
        schema = self.bundle.covariates
        self.person: PersonScan | None = None
        self.gate: QualityGate | None = None
        if scan is None:
            check_not_held(sweeps, hold)
            held = held_values(schema, self.bundle.distribution, hold)
        else:
            self.person, self.gate = read_person(config, self.bundle, scan, allow_extrapolation)
            held = dict(self.person.identity.covariates)
        self.sweeps: list[Sweep] = [parse_sweep(text, schema, held) for text in sweeps]
        self.rows = schema.validate(sweep_rows(self.sweeps, held, seed), "the rows of this case", True, ROW_COLUMNS)
        self.outside = self.bundle.extrapolated(self.rows)
        if not allow_extrapolation:
            refuse_outside(self.rows, self.outside, [sweep.name for sweep in self.sweeps])
        self.reference = {"first": 0, "middle": len(self.rows) // 2, "last": len(self.rows) - 1}[reference]
        if config.gate is not None and scan is None:
            log.info("gate: left out, because a volume that is drawn again has another noise")
        self.config = dataclasses.replace(config, output=str(self.output / DATASET), gate=None)

    def captions(self) -> list[str]:
        """What each point is, in a line a sweep."""
        units = {c.name: c.unit for c in self.bundle.covariates.covariates}
        out = []
        for values in self.rows[[sweep.name for sweep in self.sweeps]].itertuples(index=False):
            lines = (
                f"{sweep.name} {v:.4g} {units[sweep.name]}".rstrip() if isinstance(v, float) else f"{sweep.name} {v}"
                for sweep, v in zip(self.sweeps, values, strict=True)
            )
            out.append("\n".join(lines))
        return out


def read_person(
    config: SynthesisConfig, bundle: ModelSpec, scan: ScanFile, allow_extrapolation: bool
) -> tuple[PersonScan, QualityGate | None]:
    """A scan prepared as the bundle's cohort was, with its covariates; and the bundle's gate, where there is one.

    Raises:
        UserError: a bundle that cannot take a scan, a scan that a cohort would reject or that does not lie in the grid as
            the bundle's cohort does, or covariates that are missing or wrong.
    """
    if not isinstance(bundle, BundleSpec) or config.sampler is None:
        raise UserError(f"--scan: {config.bundle} is a generator: only a bundle can be run backwards")
    check_inversion(bundle, config.sampler, config.decoder)
    folder = bundle_folder(config.bundle)
    preparation = recommended(folder, bundle).preparation
    if preparation is None:
        raise UserError(
            f"--scan: the bundle {folder} does not say how its cohort was prepared: export it again with "
            "recommended.preparation in its config; its digest stays"
        )
    path, mask = str(user_path(scan.path, "--scan")), str(user_path(scan.mask, "--mask")) if scan.mask else ""
    try:
        volume, source = prepared_scan(path, mask, bundle.volume, preparation)
    except ScanRejected as error:
        raise UserError(f"--scan: {path}: {error}") from None
    gate = load_bundle_gate(folder, bundle) if GATE_FILE in bundle.weights else None
    if gate is not None and config.gate is not None:
        judged = gate.exempting(*TEXTURE, *config.gate.exempt).check(volume)
        if not judged.passed:
            raise UserError(
                f"--scan: {path} does not look like a scan of the bundle's cohort: {judged.reason}. Is it registered as "
                "the cohort was, in the right orientation, and stripped (--mask)? --set gate=null takes it all the same"
            )
    covariates = _own_covariates(bundle, scan.covariates, allow_extrapolation, gate, volume)
    steps = max(STEPS, config.sampler.steps)
    identity = ScanIdentity(
        source_sha256=source, prepared_sha256=voxel_sha256(volume), covariates=covariates, steps=steps
    )
    return PersonScan(identity, volume), gate


def _own_covariates(
    bundle: BundleSpec, text: str, allow_extrapolation: bool, gate: QualityGate | None, volume: Volume
) -> dict[str, Value]:
    """The person's covariates. Raises UserError that says which are missing, and what the gate measures of them."""
    given = [part for part in text.split(",") if part.strip()]
    named = {part.partition("=")[0].strip() for part in given}
    missing = [c for c in bundle.covariates.covariates if c.name not in named]
    if missing:
        measured = {} if gate is None else gate.measure_covariates(volume)
        wanted = [
            f"{c.name} ({c.unit or ' or '.join(c.categories)}"
            + (f"; measured on this scan: {measured[c.name]:.4g})" if c.name in measured else ")")
            for c in missing
        ]
        raise UserError(f"--covariates: the model needs every covariate of the person; add {', '.join(wanted)}")
    values = held_values(bundle.covariates, None, given)
    row = bundle.covariates.validate(pd.DataFrame([values]), "--covariates", allow_extrapolation)
    if not allow_extrapolation:
        refuse_outside(row, bundle.extrapolated(row), bundle.covariates.names)
    return values


def describe_case(case: Case) -> str:
    """What would be made."""
    made = generate.describe(case.config, case.rows, case.person)
    names = " and ".join(sweep.name for sweep in case.sweeps)
    return f"{len(case.rows)} points of {names}, {case.outside.sum()} extrapolated\n{made}"


def make_case(case: Case) -> Path:
    """Generate what is missing, then write the tables and the pictures again. Returns the output folder."""
    generate.run(case.config, case.rows, case.person)
    volumes = _volumes(case)
    captions, marked = case.captions(), case.outside.tolist()
    plan = read_plan(open_store(case.config.output))
    whose = plan.whose
    side = len(case.sweeps[1].values) if len(case.sweeps) == 2 else 0
    columns = side or min(_COLUMNS, len(volumes))
    changes = case_figures.change(volumes, case.reference)
    series = case.rows.drop(columns="noise_seed").assign(
        extrapolated=case.outside,
        mean_absolute_difference=[np.nan if c is None else float(np.abs(c).mean()) for c in changes],
    )
    frames = [slice(i, i + (side or 1)) for i in range(0, len(volumes), side or 1)]
    folder = LocalStore(case.output)
    if case.person is not None:
        scan = case.person.volume
        own = {} if case.gate is None else case.gate.measure_covariates(scan)
        points = [{} if volume is None else point(case.gate, scan, own, volume) for volume in volumes]
        series = pd.concat([series, pd.DataFrame(points, index=series.index)], axis=1)
        _measure(case, plan, folder, volumes, own)
    folder.write("series.tsv", _tsv(series))
    folder.write("grid.png", case_figures.grid(volumes, captions, marked, columns, whose))
    changed = case_figures.differences(volumes, captions, marked, columns, case.reference, whose)
    folder.write("differences.png", changed)
    montage = case_figures.animation(
        [volumes[frame] for frame in frames],
        [captions[frame] for frame in frames],
        [marked[frame] for frame in frames],
        whose,
    )
    folder.write("montage.gif", montage)
    return case.output


def _measure(case: Case, plan: Plan, folder: LocalStore, volumes: list[Volume | None], own: dict[str, float]) -> None:
    """measures.json, unless it is there for this very dataset: composition, and reversibility of the series' two ends."""
    assert case.person is not None
    digest = str(open_dataset(case.config.output).manifest["shards_digest"])
    if (folder.path / MEASURES).is_file() and json.loads(folder.read(MEASURES))["shards_digest"] == digest:
        return
    source = bundle_folder(case.config.bundle)
    assert isinstance(case.bundle, BundleSpec)
    exact = case.config.runtime.exact_rewrites
    generator = ScanGenerator(source, case.bundle, generation_identity(plan), exact, case.person.volume)
    generator.load("cpu")
    ends = {index: volume for index in (0, len(volumes) - 1) if (volume := volumes[index]) is not None}
    measured: dict[str, Any] = {
        "derived_from_person": True,
        "shards_digest": digest,
        "composition_without_residual": composition(generator),
        "reversibility": {
            case.rows["sample_id"].iloc[index]: reversibility(generator, volume, case.rows.iloc[[index]])
            for index, volume in ends.items()
        },
        "measured_on_the_scan": own,
        "ruler_error": {} if case.gate is None else {ruler.name: ruler.mae for ruler in case.gate.spec.rulers},
    }
    folder.write(MEASURES, pretty_json(measured))


def _volumes(case: Case) -> list[Volume | None]:
    """The volumes in order; None for one that was rejected or failed. Raises UserError where none is left."""
    dataset = open_dataset(case.config.output)
    there = {sample_id: index for index, sample_id in enumerate(dataset.sample_ids)}
    if not there:
        raise UserError(f"{case.config.output}: no volume could be made; its rejects.tsv says why")
    return [dataset.volume(there[i]) if i in there else None for i in case.rows["sample_id"]]


def _tsv(table: pd.DataFrame) -> bytes:
    return tsv_text(table, float_format="%.6g").encode()


def command(arguments: argparse.Namespace) -> int:
    """Makes the series, or says what it would be."""
    scan = _scan(arguments)
    config: SynthesisConfig
    if arguments.config is None:
        bundle = arguments.bundle or SHIPPED_BUNDLE
        own = [] if scan is None else ["decoder=own"]  # the only one that can be run backwards
        config = recommended_generation(arguments.output, bundle, None, overrides=[*own, *arguments.set])
    elif arguments.bundle is None:
        config = load_config(arguments.config, GenerateConfig, arguments.set)
    else:
        raise UserError("--bundle: only without --config, which names one")
    check_layout(config.runtime)
    case = Case(
        config,
        arguments.output,
        sweeps=arguments.sweep,
        hold=arguments.hold,
        seed=arguments.seed,
        reference=arguments.reference,
        allow_extrapolation=arguments.allow_extrapolation,
        scan=scan,
    )
    if arguments.dry_run:
        print(describe_case(case))
        return 0
    folder = make_case(case)
    print(
        f"{len(case.rows)} points, {case.outside.sum()} extrapolated: {folder}/grid.png, differences.png, montage.gif"
    )
    if scan is not None:
        print(f"derived from a real person's scan: not to be published. Measures: {folder}/{MEASURES}, series.tsv")
    return 0


def _scan(arguments: argparse.Namespace) -> ScanFile | None:
    """What the options say of a scan. Raises UserError where they do not fit together."""
    if arguments.scan is None:
        if arguments.mask is not None or arguments.covariates is not None:
            raise UserError("--mask and --covariates are for --scan")
        return None
    if arguments.hold or arguments.seed:
        raise UserError("--hold and --seed: with --scan, --covariates says who it is, and the noise is the scan's")
    return ScanFile(arguments.scan, arguments.mask, arguments.covariates or "")
