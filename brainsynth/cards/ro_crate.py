"""ro-crate-metadata.json: an RO-Crate 1.1 that describes the generation as a Process Run (profile 0.5)."""

from __future__ import annotations

from typing import Any

from brainsynth.cards.facts import DIGITAL_SOURCE, MARK, Facts
from brainsynth.version import __version__

_PROFILE = "https://w3id.org/ro/wfrun/process/0.5"
_SOFTWARE = "#brainsynth"
_DESCRIBED = {
    "README.md": ("Dataset card", "text/markdown"),
    "MODEL_CARD.md": ("Model card", "text/markdown"),
    "LICENSE": ("Licence", "text/plain"),
    "CITATION.cff": ("Citation", "application/yaml"),
    "croissant.json": ("Croissant description", "application/ld+json"),
    "dataset_description.json": ("BIDS description", "application/json"),
    "participants.tsv": ("Covariates of every volume", "text/tab-separated-values"),
    "participants.json": ("What the columns of participants.tsv mean", "application/json"),
}


def ro_crate(facts: Facts) -> dict[str, Any]:
    """The document."""
    config = facts.config
    people = [{"@id": f"#creator-{i}", **person} for i, person in enumerate(facts.people())]
    for person in people:  # an affiliation in a crate is an entity of its own
        if "affiliation" in person:
            person["description"] = person.pop("affiliation")
    model = f"urn:sha256:{facts.model.bundle}"
    data = {"@id": "data/", "@type": "Dataset", "name": "The volumes"} if config.data == "zarr" else None
    files = [
        {"@id": path, "@type": "File", "name": name, "description": name, "encodingFormat": kind}
        for path, (name, kind) in _DESCRIBED.items()
    ]
    parts = [{"@id": e["@id"]} for e in [*files, *([data] if data else [])]]
    root = {
        "@id": "./",
        "@type": "Dataset",
        "name": config.title,
        "description": f"{MARK} {config.description}",
        "datePublished": config.published,
        "version": config.version,
        "license": {"@id": facts.licence_url},
        "url": config.url,
        "identifier": f"https://doi.org/{config.doi}" if config.doi else f"urn:sha256:{facts.manifest.shards_digest}",
        "conformsTo": {"@id": _PROFILE},
        "author": [{"@id": person["@id"]} for person in people],
        "publisher": {"@id": people[0]["@id"]},
        "keywords": ", ".join(facts.keywords),
        "digitalSourceType": {"@id": DIGITAL_SOURCE},
        "usageInfo": " ".join(facts.limits),
        "mentions": {"@id": "#generation"},
        "hasPart": parts,
    }
    return {
        "@context": [
            "https://w3id.org/ro/crate/1.1/context",
            {"digitalSourceType": "http://schema.org/digitalSourceType"},
        ],
        "@graph": [
            {
                "@id": "ro-crate-metadata.json",
                "@type": "CreativeWork",
                "about": {"@id": "./"},
                "conformsTo": [{"@id": "https://w3id.org/ro/crate/1.1"}],
            },
            root,
            _generation(facts, model, people[0]["@id"]),
            *_context(facts, model),
            *people,
            *([data] if data else []),
            *files,
        ],
    }


def _generation(facts: Facts, model: str, agent: str) -> dict[str, Any]:
    return {
        "@id": "#generation",
        "@type": "CreateAction",
        "name": "Generation of the volumes",
        "description": f"Plan {facts.manifest.plan_fingerprint}",
        "instrument": {"@id": _SOFTWARE},
        "object": [{"@id": model}],
        "result": [{"@id": "data/" if facts.config.data == "zarr" else "./"}],
        "agent": {"@id": agent},
        "startTime": facts.began,
        "endTime": facts.ended,
        "actionStatus": "http://schema.org/CompletedActionStatus",
    }


def _context(facts: Facts, model: str) -> list[dict[str, Any]]:
    return [
        {
            "@id": _SOFTWARE,
            "@type": "SoftwareApplication",
            "name": "brainsynth",
            "version": __version__,
            "softwareVersion": __version__,
            "license": {"@id": "https://spdx.org/licenses/Apache-2.0"},
        },
        {
            "@id": model,
            "@type": "CreativeWork",
            "name": f"Model {facts.model.name}",
            "description": f"Trained on: {facts.model.training_data}",
            "usageInfo": facts.model.licence,
        },
        {
            "@id": facts.licence_url,
            "@type": "CreativeWork",
            "name": facts.config.licence,
            "description": f"Licence of the dataset: {facts.config.licence}",
        },
        {"@id": DIGITAL_SOURCE, "@type": "DefinedTerm", "name": "Created by a trained algorithm (AI-generated)"},
        {
            "@id": _PROFILE,
            "@type": "CreativeWork",
            "name": "Process Run Crate",
            "version": "0.5",
        },
    ]
