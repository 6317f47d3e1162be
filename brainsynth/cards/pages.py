"""The pages for people: dataset card, model card, licence, citation."""

from __future__ import annotations

from typing import Any

import yaml

from brainsynth.bundle.generator import GeneratorSpec, ModelSpec
from brainsynth.cards.facts import MARK, PREVIEW_KEY, SOFTWARE, Facts, grid
from brainsynth.cards.scorecard import scorecard

_HUB_LICENCES = (
    "cc-by-4.0",
    "cc0-1.0",
    "cc-by-sa-4.0",
    "cc-by-nc-4.0",
    "cc-by-nc-sa-4.0",
    "cc-by-nd-4.0",
    "mit",
    "apache-2.0",
)
_SIZES = (
    (1_000, "n<1K"),
    (10_000, "1K<n<10K"),
    (100_000, "10K<n<100K"),
    (1_000_000, "100K<n<1M"),
    (10_000_000, "1M<n<10M"),
)
_PREVIEW = {"config_name": "preview", "data_files": [{"split": "preview", "path": PREVIEW_KEY}]}
"""What `datasets.load_dataset` opens of a release."""


def dataset_card(facts: Facts) -> str:
    """README.md, with the front matter that Hugging Face reads."""
    config, manifest = facts.config, facts.manifest
    hub = config.licence.lower() in _HUB_LICENCES
    licence = (
        {"license": config.licence.lower()} if hub else {"license": "other", "license_name": config.licence.lower()}
    )
    size = next((name for limit, name in _SIZES if manifest.num_ok < limit), "n>1M")
    front = {
        **licence,
        "pretty_name": config.title,
        "size_categories": [size],
        "tags": [*(word.lower() for word in facts.keywords), config.data],
        **({"configs": [_PREVIEW]} if config.preview else {}),
    }
    gate = "gate" in facts.plan.identity
    reading = (
        '```python\nimport brainsynth\n\ndataset = brainsynth.open_dataset("data")\n'
        'sample = dataset[0]  # sample["image"]: float32 (X, Y, Z) in [0, 1]; sample["affine"], and the covariates\n```\n'
        + ("" if facts.plan.labels is None else '`sample["labels"]`: the label map, uint8 (X, Y, Z); see dseg.tsv.\n')
        if config.data == "zarr"
        else "NIfTI in the layout of BIDS: `sub-<id>/anat/sub-<id>_T1w.nii.gz`.\n"
        + ("" if facts.plan.labels is None else "Label maps: `derivatives/labels`, with dseg.tsv.\n")
    )
    return "".join(
        [
            f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n\n",
            f"# {config.title}\n\n**{MARK}**\n\n{config.description}\n\n",
            f"- {manifest.num_ok} volumes of {grid(facts.plan)}, intensities in [0, 1]\n",
            f"- planned {manifest.num_samples} = {manifest.num_ok} ok + {manifest.num_rejected} rejected + "
            f"{manifest.num_failed} failed{'; a quality gate refused volumes' if gate else '; no quality gate'}\n",
            _labels(facts),
            f"- {facts.extrapolated} rows lie outside the training support (`extrapolated`)\n",
            f"- made by {SOFTWARE} with the model {facts.model.name} (MODEL_CARD.md); plan {manifest.plan_fingerprint}\n\n",
            f"## Reading it\n\n{reading}{_preview(facts)}\n## Columns of participants.tsv\n\n{_columns(facts)}\n",
            f"## What it is for\n\n{_list(config.intended_use)}\n## What it is not for\n\n{_list(facts.limits)}\n",
            f"## Was it checked\n\n- Everything was read back and compared before release: {facts.verified}\n",
            f"{_audit(facts)}\n{scorecard(facts)}\n## Licence and terms\n\n",
            f"- this dataset: [{config.licence}]({facts.licence_url})\n",
            f"- the model: {facts.model.licence}\n- what allows this release: {config.source_terms}\n\n",
            f"## Cite, ask, report\n\n{facts.citation}\n\n",
            f"Questions, errors and requests to take data down: {config.contact}\n",
            "`sha256sum -c SHA256SUMS` checks every file.\n",
        ]
    )


def _kind(spec: ModelSpec) -> str:
    if isinstance(spec, GeneratorSpec):
        return "A generator of T1-weighted brain MRI, conditioned on covariates, from another package than brainsynth."
    return (
        "A latent diffusion model of T1-weighted brain MRI: an autoencoder, and a denoiser that is conditioned on "
        "covariates."
    )


def _networks(spec: ModelSpec) -> str:
    if isinstance(spec, GeneratorSpec):
        return f"- weights and code: {spec.content}\n"
    return f"- denoiser: {getattr(spec.diffusion, 'kind', 'unet')}; prediction: {spec.schedule.prediction}\n"


def model_card(facts: Facts) -> str:
    """MODEL_CARD.md: the model behind the images. Its weights are not part of the release."""
    spec, plan = facts.bundle, facts.plan
    sampler = ", ".join(f"{key} {value}" for key, value in plan.identity.get("sampler", {}).items())
    provenance = "".join(f"| {key} | {value} |\n" for key, value in sorted(spec.provenance.items()))
    people = f"{spec.distribution.n_rows} rows" if spec.distribution else "not known"
    return (
        f"# The model: {spec.name}\n\n{_kind(spec)} Its images are AI-generated and of no real person. **Not for "
        "diagnosis.**\n\n"
        f"- bundle digest {spec.digest}; weights are not part of this release\n- licence: {spec.licence}\n"
        f"- grid: {grid(plan)}\n- sampler here: {sampler or 'of the generator'}; precision {plan.identity['precision']}\n"
        f"{_networks(spec)}\n"
        f"## Training data\n\n{spec.training_data}\n\nCovariates were known of: {people}.\n\n"
        f"## Covariates\n\n{_columns(facts, split=False)}\n"
        f"## Use\n\n{_list(facts.config.intended_use)}\n## Limits\n\n{_list(facts.limits)}\n"
        f"## Privacy\n\n{_audit(facts)}\n## Provenance\n\n| | |\n| --- | --- |\n{provenance}"
    )


def licence_page(facts: Facts) -> str:
    """LICENSE: which licence, and whose terms stand behind it."""
    return (
        f"{facts.config.title}\n\nThis dataset is licensed under {facts.config.licence}: {facts.licence_url}\n"
        f"The model that made it ({facts.model.name}) is under: {facts.model.licence}\n"
        f"It was trained on: {facts.model.training_data}\nWhat allows this release: {facts.config.source_terms}\n\n"
        f"{MARK}\n"
    )


def citation_file(facts: Facts) -> str:
    """CITATION.cff, version 1.2.0."""
    config = facts.config
    authors: list[dict[str, Any]] = []
    for creator in config.creators:
        author = {"given-names": creator.given_names, "family-names": creator.family_names}
        if creator.name:
            author = {"name": creator.name}
        if creator.affiliation:
            author["affiliation"] = creator.affiliation
        if creator.orcid:
            author["orcid"] = f"https://orcid.org/{creator.orcid}"
        authors.append(author)
    document = {
        "cff-version": "1.2.0",
        "message": "If you use this dataset, please cite it as below.",
        "type": "dataset",
        "title": config.title,
        "version": config.version,
        "date-released": config.published,
        "license": config.licence,
        "url": config.url,
        "authors": authors,
        **({"doi": config.doi} if config.doi else {}),
    }
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True)


def _columns(facts: Facts, split: bool = True) -> str:
    lines = "| column | unit or values | training support | |\n| --- | --- | --- | --- |\n"
    for c in facts.plan.covariates.covariates:
        support = f"{c.low:g} to {c.high:g}" if c.kind == "continuous" else ""
        lines += f"| {c.name} | {_cell(c.unit or ', '.join(c.categories))} | {support} | {_cell(c.description)} |\n"
    for label in facts.plan.structures if split else ():
        lines += f"| {label.column} | ml | | volume of {_cell(label.name)}, counted in the label map |\n"
    return lines + ("| split | train, validation, test | | fixed, by subject |\n" if split else "")


def _preview(facts: Facts) -> str:
    count = min(facts.config.preview, facts.manifest.num_ok)
    return (
        f"\nThe first {count} volumes are in `{PREVIEW_KEY}`, too: `datasets.load_dataset(FOLDER)`.\n" if count else ""
    )


def _labels(facts: Facts) -> str:
    labels = facts.plan.labels
    if labels is None:
        return ""
    names = ", ".join(label.name for label in labels.labels)
    return f"- a label map of each, {len(labels.labels)} structures ({names}), by {labels.source}\n"


def _cell(text: str) -> str:
    """Any text in one cell of a Markdown table."""
    return " ".join(text.splitlines()).replace("|", "\\|")


def _audit(facts: Facts) -> str:
    a = facts.audit
    control = f"control {a.membership_control[0]:.3f} to {a.membership_control[1]:.3f}"
    return (
        f"- memorisation audit: {a.verdict}. {a.volumes} volumes against {a.training_people} people in training and "
        f"{a.held_out_people} held out: {a.outright_copies} outright copies; {a.flagged} flagged as near "
        f"({a.flagged_expected:.2f} without copies); membership inference AUC {a.membership_auc:.3f} ({control}, "
        f"p {a.membership_p_value:.2g}); covariates of {a.tuples_replayed} of {a.training_tuples} people replayed. "
        "A pass does not prove privacy.\n"
    )


def _list(items: tuple[str, ...]) -> str:
    return "".join(f"- {item}\n" for item in items)
