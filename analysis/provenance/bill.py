"""A software bill of materials of an artifact, in CycloneDX 1.6 (ECMA-424): https://cyclonedx.org/docs/1.6/json/

The model is the subject; its files, the kernels, and the libraries it was compiled with are its components. There is no
clock and no chance in it: the serial number follows from the contents, so that the same artifact has the same bill.
"""

from __future__ import annotations

import re
import uuid
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moec.compiler.artifact import MANIFEST, Artifact, file_digest
from moec.compiler.errors import UserError
from moec.compiler.extras import require

if TYPE_CHECKING:
    from cyclonedx.model.component import Component
    from cyclonedx.model.license import License

_SERIALS = uuid.UUID(
    "6d0e4c55-6a55-5a8e-9a3c-7f0b52f0c1a4"
)  # the namespace of our serial numbers (RFC 9562, version 5)
# What runs in `.pte` files. Everything else that a manifest names was at work while compiling.
_RUNS = {"executorch"}
_STATED_IN_TEXT = {"torchao": "BSD-3-Clause"}  # wheels that hold the licence's text and name it in no field


def artifact_bill(artifact: Artifact, *, license: str | None = None) -> str:
    """The bill as JSON text. Reads every file of the artifact.

    license: of the model, an SPDX identifier or expression, which no checkpoint states reliably; None leaves it out.
    MissingExtra without cyclonedx-python-lib; ArtifactError for contents that are not the manifest's; UserError for a
    licence that is no SPDX expression.
    """
    require("cyclonedx", "sbom", "a bill of materials")
    from cyclonedx.model import Property
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.output.json import JsonV1Dot6

    artifact.check_contents()
    manifest = artifact.manifest
    digests = {f"moec:digest:{name}": value for name, value in manifest.digests.model_dump().items() if value}
    facts = {"moec:target": manifest.target, "moec:contents": manifest.contents, **digests}
    subject = Component(
        type=ComponentType.MACHINE_LEARNING_MODEL,
        name=manifest.name,
        version=manifest.contents[:16],
        bom_ref="artifact",
        licenses=_model_license(license),
        properties=[Property(name=name, value=value) for name, value in facts.items()],
    )
    files = [_file(f.name, f.sha256, f.bytes) for f in manifest.files]
    of_manifest = artifact.folder / MANIFEST
    files.append(_file(MANIFEST, file_digest(of_manifest), of_manifest.stat().st_size))
    runs_in_executorch = any(Path(f.name).suffix == ".pte" for f in manifest.files)
    packages = {"moec": manifest.moec, **{k: v for k, v in manifest.versions.items() if k != "python"}}
    libraries = {name: _library(name, packages[name], runs=runs_in_executorch and name in _RUNS) for name in packages}
    needed = [libraries[name] for name in _RUNS if runs_in_executorch and name in libraries]
    bom = Bom(serial_number=uuid.uuid5(_SERIALS, f"{file_digest(of_manifest)} {license or ''}"))
    bom.metadata.timestamp = None  # type: ignore[assignment]  # the schema lets it be left out, the library's type does not
    bom.metadata.component = subject
    components = [*files, *libraries.values()]
    if manifest.digests.kernel:
        kernels = _kernels(manifest.moec, manifest.digests.kernel)
        components.append(kernels)
        bom.register_dependency(kernels, needed)
        needed = [kernels, *needed]
    for component in components:
        bom.components.add(component)
    bom.register_dependency(subject, [*files, *needed])
    return str(JsonV1Dot6(bom).output_as_string(indent=2)) + "\n"


def _file(name: str, sha256: str, size: int) -> Component:
    from cyclonedx.model import HashAlgorithm, HashType, Property
    from cyclonedx.model.component import Component, ComponentType

    return Component(
        type=ComponentType.FILE,
        name=name,
        bom_ref=f"file:{name}",
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=sha256)],
        properties=[Property(name="moec:bytes", value=str(size))],
    )


def _kernels(version: str, digest: str) -> Component:
    """The library with the operators of a `.pte`, identified by the digest of its source at compile time."""
    from cyclonedx.model import Property
    from cyclonedx.model.component import Component, ComponentScope, ComponentType

    return Component(
        type=ComponentType.LIBRARY,
        name="moec-kernels",
        version=version,
        bom_ref="moec-kernels",
        scope=ComponentScope.REQUIRED,
        licenses=_licenses("moec", version),
        properties=[Property(name="moec:digest:source", value=digest)],
    )


def _library(name: str, version: str, *, runs: bool) -> Component:
    """A Python distribution: needed to run the artifact, or only to compile it (scope `excluded`)."""
    from cyclonedx.model.component import Component, ComponentScope, ComponentType
    from packageurl import PackageURL

    return Component(
        type=ComponentType.LIBRARY,
        name=name,
        version=version,
        bom_ref=f"{name}=={version}",
        scope=ComponentScope.REQUIRED if runs else ComponentScope.EXCLUDED,
        licenses=_licenses(name, version),
        purl=PackageURL(type="pypi", name=name, version=version),
    )


def _licenses(name: str, version: str) -> list[License]:
    """As the distribution states it, where this very version is installed; else nothing is known."""
    from cyclonedx.contrib.license.factories import LicenseFactory

    try:
        found = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return []
    stated: Any = found.metadata
    text = stated.get("License-Expression") or stated.get("License") or _STATED_IN_TEXT.get(name)
    if found.version != version or not text or "\n" in text:
        return []
    return [LicenseFactory().make_from_string(text)]


def _model_license(text: str | None) -> list[License]:
    from cyclonedx.contrib.license.factories import LicenseFactory
    from cyclonedx.spdx import is_expression, is_supported_id

    if text is None:
        return []
    known = re.fullmatch(r"LicenseRef-[A-Za-z0-9.-]+", text) or is_supported_id(text) or is_expression(text)
    if not known:
        what = "is no SPDX licence identifier or expression"
        raise UserError(what, place=text, remedy="name it as https://spdx.org/licenses does, or as LicenseRef-NAME")
    return [LicenseFactory().make_from_string(text)]
