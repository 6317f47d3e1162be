"""One noise under many covariates: an ordinary dataset by the ordinary line, and pictures of it.

```
<output>/dataset/          what `generate` makes of the table: verify, open_dataset and export know it
<output>/series.tsv        the points in order: covariates, extrapolated, mean absolute difference from the reference
<output>/grid.png differences.png montage.gif
```
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from brainsynth.bundle.generator import ModelSpec, model_spec
from brainsynth.config.load import load_config
from brainsynth.config.schema import GenerateConfig
from brainsynth.covariates.sweep import Sweep, check_not_held, held_values, parse_sweep, refuse_outside, sweep_rows
from brainsynth.errors import UserError
from brainsynth.executors.preflight import check_layout
from brainsynth.plan import ROW_COLUMNS
from brainsynth.reading.dataset import open_dataset
from brainsynth.report import case_figures
from brainsynth.report.montage import Volume
from brainsynth.stages import generate
from brainsynth.storage.filesystem import LocalStore, local_folder
from brainsynth.storage.tsv import tsv_text

log = logging.getLogger(__name__)
DATASET = "dataset"
_COLUMNS = 4


class Case:
    """What is to be made: the sweeps, their rows, and which of them are extrapolated. Writes nothing."""

    def __init__(
        self,
        config: GenerateConfig,
        output: str,
        sweeps: Sequence[str],
        hold: Sequence[str] = (),
        seed: int = 0,
        reference: str = "first",
        allow_extrapolation: bool = False,
    ) -> None:
        self.output = local_folder(output, "output")
        self.bundle: ModelSpec = model_spec(config.bundle)
        schema = self.bundle.covariates
        check_not_held(sweeps, hold)
        held = held_values(schema, self.bundle.distribution, hold)
        self.sweeps: list[Sweep] = [parse_sweep(text, schema, held) for text in sweeps]
        self.rows = schema.validate(sweep_rows(self.sweeps, held, seed), "the rows of this case", True, ROW_COLUMNS)
        self.outside = self.bundle.extrapolated(self.rows)
        if not allow_extrapolation:
            refuse_outside(self.rows, self.outside, [sweep.name for sweep in self.sweeps])
        self.reference = {"first": 0, "middle": len(self.rows) // 2, "last": len(self.rows) - 1}[reference]
        if config.gate is not None:
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


def describe_case(case: Case) -> str:
    """What would be made."""
    made = generate.describe(case.config, case.rows)
    names = " and ".join(sweep.name for sweep in case.sweeps)
    return f"{len(case.rows)} points of {names}, {case.outside.sum()} extrapolated\n{made}"


def make_case(case: Case) -> Path:
    """Generate what is missing, then write the table and the pictures again. Returns the output folder."""
    generate.run(case.config, case.rows)
    volumes = _volumes(case)
    captions, marked = case.captions(), case.outside.tolist()
    side = len(case.sweeps[1].values) if len(case.sweeps) == 2 else 0
    columns = side or min(_COLUMNS, len(volumes))
    changes = case_figures.change(volumes, case.reference)
    series = case.rows.drop(columns="noise_seed").assign(
        extrapolated=case.outside,
        mean_absolute_difference=[np.nan if c is None else float(np.abs(c).mean()) for c in changes],
    )
    frames = [slice(i, i + (side or 1)) for i in range(0, len(volumes), side or 1)]
    folder = LocalStore(case.output)
    folder.write("series.tsv", _tsv(series))
    folder.write("grid.png", case_figures.grid(volumes, captions, marked, columns))
    changed = case_figures.differences(volumes, captions, marked, columns, case.reference)
    folder.write("differences.png", changed)
    montage = case_figures.animation(
        [volumes[frame] for frame in frames], [captions[frame] for frame in frames], [marked[frame] for frame in frames]
    )
    folder.write("montage.gif", montage)
    return case.output


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
    config = load_config(arguments.config, GenerateConfig, arguments.set)
    check_layout(config.runtime)
    case = Case(
        config,
        arguments.output,
        sweeps=arguments.sweep,
        hold=arguments.hold,
        seed=arguments.seed,
        reference=arguments.reference,
        allow_extrapolation=arguments.allow_extrapolation,
    )
    if arguments.dry_run:
        print(describe_case(case))
        return 0
    folder = make_case(case)
    print(
        f"{len(case.rows)} points, {case.outside.sum()} extrapolated: {folder}/grid.png, differences.png, montage.gif"
    )
    return 0
