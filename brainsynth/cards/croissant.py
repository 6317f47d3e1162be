"""croissant.json: Croissant 1.1 with its Responsible AI terms, and provenance in PROV-O."""

from __future__ import annotations

from typing import Any

from brainsynth.cards.facts import DIGITAL_SOURCE, MARK, Facts, grid
from brainsynth.labels import DSEG
from brainsynth.version import __version__

CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "arrayShape": "cr:arrayShape",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "containedIn": "cr:containedIn",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "description": {"@container": "@language"},
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileObject": "cr:fileObject",
    "fileProperty": "cr:fileProperty",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isArray": "cr:isArray",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "name": {"@container": "@language"},
    "parentField": "cr:parentField",
    "path": "cr:path",
    "prov": "http://www.w3.org/ns/prov#",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
_TABLE = "participants.tsv"


def croissant(facts: Facts) -> dict[str, Any]:
    """The document."""
    config = facts.config
    return {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.1",
        "name": config.title,
        "description": f"{MARK} {config.description}",
        "license": facts.licence_url,
        "url": config.url,
        "version": config.version,
        "datePublished": config.published,
        "citeAs": facts.citation,
        "creator": facts.people(),
        "publisher": facts.people(),
        "keywords": list(facts.keywords),
        "digitalSourceType": DIGITAL_SOURCE,
        "isLiveDataset": False,
        **_responsible(facts),
        **_provenance(facts),
        "distribution": _distribution(facts),
        "recordSet": [_participants(facts)],
    }


def _responsible(facts: Facts) -> dict[str, Any]:
    name, plan = facts.model.name, facts.plan
    return {
        "rai:dataCollection": f"Sampled from the latent diffusion model {name}, given covariates; no scan was taken.",
        "rai:dataCollectionType": "Others: sampling of a generative model",
        "rai:dataBiases": f"Those of the training data: {facts.model.training_data}",
        "rai:dataLimitations": list(facts.limits),
        "rai:dataUseCases": list(facts.config.intended_use),
        "rai:personalSensitiveInformation": f"None of a real person. Memorisation audit: {facts.audit.verdict}.",
        "rai:dataReleaseMaintenancePlan": f"Questions, errors and requests to take data down: {facts.config.contact}",
        "rai:dataManipulationProtocol": f"Intensities in [0, 1], rounded to the stored {plan.volume.dtype}; {grid(plan)}.",
    }


def _provenance(facts: Facts) -> dict[str, Any]:
    model = {
        "@type": "prov:Entity",
        "@id": f"urn:sha256:{facts.model.bundle}",
        "name": f"model {facts.model.name}",
        "license": facts.model.licence,
        "prov:wasDerivedFrom": {"@type": "prov:Entity", "name": facts.model.training_data},
    }
    software = {"@type": "prov:SoftwareAgent", "name": "brainsynth", "version": __version__}
    return {
        "prov:wasDerivedFrom": model,
        "prov:wasAttributedTo": [{"@type": "prov:Agent", "name": c.full_name} for c in facts.config.creators],
        "prov:wasGeneratedBy": {
            "@type": "prov:Activity",
            "@id": f"urn:sha256:{facts.manifest.plan_fingerprint}",
            "name": "generation by latent diffusion",
            "prov:startedAtTime": facts.began,
            "prov:endedAtTime": facts.ended,
            "prov:used": {"@id": f"urn:sha256:{facts.model.bundle}"},
            "prov:wasAssociatedWith": software,
        },
    }


def _distribution(facts: Facts) -> list[dict[str, Any]]:
    table, zarr = facts.file(_TABLE), facts.config.data == "zarr"
    # A release has no archive of its own: the whole is named by the digest of its data, so that file sets have a container.
    whole = {
        "@type": "cr:FileObject",
        "@id": "repository",
        "name": "repository",
        "description": "The folder of this release.",
        "contentUrl": facts.config.url,
        "encodingFormat": "git+https",
        "sha256": facts.manifest.shards_digest,
    }
    participants = {
        "@type": "cr:FileObject",
        "@id": _TABLE,
        "name": _TABLE,
        "description": "One line a volume: id, covariates asked of the model, split.",
        "contentUrl": _TABLE,
        "contentSize": f"{table.size_bytes} B",
        "encodingFormat": "text/tab-separated-values",
        "sha256": table.sha256,
    }
    volumes = {
        "@type": "cr:FileSet",
        "@id": "volumes",
        "name": "volumes",
        "description": f"float T1w volumes of {grid(facts.plan)}"
        + (f": one Zarr v3 array (N, X, Y, Z), {facts.plan.samples_per_shard} volumes an object" if zarr else ""),
        "containedIn": {"@id": "repository"},
        "encodingFormat": "application/vnd.zarr" if zarr else "application/x-nifti",
        "includes": "data/dataset.zarr/**" if zarr else "sub-*/anat/*_T1w.nii.gz",
    }
    return [whole, participants, volumes, *_label_maps(facts)]


def _label_maps(facts: Facts) -> list[dict[str, Any]]:
    labels, zarr = facts.plan.labels, facts.config.data == "zarr"
    if labels is None:
        return []
    maps = {
        "@type": "cr:FileSet",
        "@id": "label-maps",
        "name": "label-maps",
        "description": f"uint8 label maps of the volumes, {len(labels.labels)} structures, by {labels.source}",
        "containedIn": {"@id": "repository"},
        "encodingFormat": "application/vnd.zarr" if zarr else "application/x-nifti",
        "includes": f"data/dataset.zarr/{DSEG}/**" if zarr else "derivatives/labels/sub-*/anat/*_dseg.nii.gz",
    }
    return [maps]


def _participants(facts: Facts) -> dict[str, Any]:
    def field(name: str, kind: str, text: str) -> dict[str, Any]:
        return {
            "@type": "cr:Field",
            "@id": f"participants/{name}",
            "name": name,
            "description": text,
            "dataType": kind,
            "source": {"fileObject": {"@id": _TABLE}, "extract": {"column": name}},
        }

    fields = [field("participant_id", "sc:Text", "`sub-` and the sample's id.")]
    for c in facts.plan.covariates.covariates:
        unit = f" [{c.unit}]" if c.unit else ""
        text = f"{c.description or c.name}{unit}, asked of the model."
        fields.append(field(c.name, "sc:Float" if c.kind == "continuous" else "sc:Text", text))
    fields.append(field("split", "sc:Text", "Fixed part: train, validation or test."))
    for label in facts.plan.structures:
        fields.append(field(label.column, "sc:Float", f"Volume of {label.name} [ml], counted in the label map."))
    return {
        "@type": "cr:RecordSet",
        "@id": "participants",
        "name": "participants",
        "description": "One record a volume.",
        "key": {"@id": "participants/participant_id"},
        "field": fields,
    }
