"""`brainsynth audit`: describe dataset and cohort on any executor, then judge the descriptors here."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from brainsynth.audit.case import Case, open_case
from brainsynth.audit.descriptors import (
    Instruments,
    description_work,
    descriptors,
    template_scans,
    training_frame,
)
from brainsynth.audit.report import write_audit
from brainsynth.audit.verdict import REPORT_KEY, AuditRecord, judge
from brainsynth.config.audit import TRAIN, AuditConfig
from brainsynth.executors.dataset import dry_run, make_dataset
from brainsynth.instruments.alignment import Aligner
from brainsynth.instruments.measurement import open_volumes, weights_file
from brainsynth.models.device import choose_device, set_threads
from brainsynth.models.embedder import load_embedder, save_embedder
from brainsynth.records import digest, to_dict
from brainsynth.storage.commit import check_plan
from brainsynth.storage.filesystem import local_folder, open_store, resolve_uri
from brainsynth.storage.whole_file import replaced
from brainsynth.storage.work import Work
from brainsynth.training.embedder import EmbedderTraining, train_embedder
from brainsynth.volume import voxel_sha256

log = logging.getLogger(__name__)


def run(config: AuditConfig) -> AuditRecord:
    """Descriptors of dataset and reference → report.html, neighbours.tsv, audit.json. Returns the record."""
    set_threads(config.runtime.threads_per_worker, 1)
    case = open_case(config)
    instruments = _instruments(config, case, write=True)
    works = _works(config, case, instruments)
    for work in works:
        check_plan(work.store, work.plan)  # before an embedder is trained for minutes
    if instruments.embedder is not None and not Path(instruments.embedder).exists():
        _train(config, case, instruments)
        works = _works(config, case, instruments)
    for work in works:
        make_dataset(work, config.runtime)
    made, real = (descriptors(work.root) for work in works)
    judgement = judge(config, case, instruments, made, real)
    store = open_store(resolve_uri(config.output, "output"))
    write_audit(store, case, instruments.frame, judgement, config.pictures)
    for reason in judgement.record.reasons:
        log.info("%s", reason)
    log.info(
        "verdict: %s (%d volumes); report: %s/%s", judgement.record.verdict, len(judgement.table), store.uri, REPORT_KEY
    )
    return judgement.record


def exit_code(record: AuditRecord) -> int:
    """0 where the dataset passed, else 1: it gates a release."""
    return 0 if record.passed else 1


def describe(config: AuditConfig) -> str:
    """What audit would describe, and whom it would compare with."""
    set_threads(config.runtime.threads_per_worker, 1)
    case = open_case(config)
    works = _works(config, case, _instruments(config, case, write=False))
    people = case.people
    return "\n".join(
        [
            f"{len(people.training)} training and {len(people.held_out)} held-out scans calibrate a false-alarm rate of "
            f"{config.false_alarm_rate:g}",
            *(dry_run(work, config.runtime) for work in works),
        ]
    )


def _works(config: AuditConfig, case: Case, instruments: Instruments) -> list[Work]:
    root = resolve_uri(config.output.rstrip("/"), "output")
    return [
        description_work(f"{root}/described-dataset", case.dataset, instruments, config.runtime),
        description_work(f"{root}/described-reference", case.reference, instruments, config.runtime),
    ]


def _instruments(config: AuditConfig, case: Case, write: bool) -> Instruments:
    """The template, and where the embedder's weights are, or will be once it is trained."""
    embedder = config.embedder
    if embedder not in (None, TRAIN):
        embedder = weights_file(str(embedder), "embedder")
        load_embedder(Path(embedder), torch.device("cpu"))
    folder = local_folder(config.output, "output") if embedder == TRAIN else None
    train = open_volumes(config.reference, "reference", split="train")
    frame = training_frame(open_store(resolve_uri(config.output, "output")), train, case.plan.volume, write)
    if folder is not None:
        of = digest([voxel_sha256(frame.template), to_dict(EmbedderTraining(steps=config.embedder_steps))])
        embedder = str(folder / f"embedder-{of[:16]}.safetensors")
    return Instruments(frame=frame, embedder=embedder)


def _train(config: AuditConfig, case: Case, instruments: Instruments) -> None:
    """Train the embedder on aligned training scans; its file appears whole."""
    assert instruments.embedder is not None
    path = Path(instruments.embedder)
    train = open_volumes(config.reference, "reference", split="train")
    aligned = Aligner(instruments.frame).align(template_scans(train, case.plan.volume)).volumes
    device = choose_device(config.runtime.gpus_per_worker > 0)
    training = EmbedderTraining(steps=config.embedder_steps)
    embedder = train_embedder(aligned, instruments.frame.spacing_mm, training, device)
    with replaced(path) as temporary:
        save_embedder(embedder, temporary)
