"""Release documents on this device, and a release made concrete: digests become directories.

Also the one derived view of the record outside state.db: the link `current`.
"""

from __future__ import annotations

from pathlib import Path

from remora_agent.control.activation import Desired, Record
from remora_agent.control.layout import StateLayout, point_link, replace_file
from remora_agent.control.staging import Wanted
from remora_agent.host import AssignedAdapter, Assignment
from remora_contract.adapter import load_adapter
from remora_contract.bundle import load_bundle, read_document
from remora_contract.compat import adapter_refusals, quant_refusals
from remora_contract.digests import canonical_json
from remora_contract.errors import DocumentInvalid, Incompatible, Refusal
from remora_contract.release import Release
from remora_contract.strict import loads


def parse_release(desired: Desired) -> Release:
    """Raises DocumentInvalid when the document is not what its id says."""
    release = loads(Release, desired.release_json, f"release {str(desired.release_id)[:140]}")
    if release.release_id != desired.release_id:
        raise DocumentInvalid(
            f"release {desired.release_id} came with the document of {release.release_id}"
        )
    return release


def store_release(layout: StateLayout, release: Release) -> None:
    replace_file(layout.release(release.release_id), canonical_json(release))


def read_release(layout: StateLayout, release_id: str) -> Release:
    """Raises ArtifactInvalid or DocumentInvalid."""
    path = layout.release(release_id)
    return loads(Release, read_document(path), str(path))


def wanted_artifacts(release: Release) -> list[Wanted]:
    """Each artifact once, the bundle first."""
    digests = dict.fromkeys(a.digest for a in release.adapters)
    return [Wanted("bundle", release.bundle), *(Wanted("adapter", d) for d in digests)]


def make_assignment(layout: StateLayout, release: Release) -> Assignment:
    return Assignment(
        release_id=release.release_id,
        bundle_digest=release.bundle,
        bundle_directory=layout.artifact(release.bundle),
        adapters=tuple(
            AssignedAdapter(a.name, a.revision, a.digest, layout.artifact(a.digest))
            for a in release.adapters
        ),
        use_cases=release.use_cases,
        sampling=release.sampling,
        golden=release.gates.golden if release.gates else (),
        experiments=release.experiments or (),
        engines=tuple(p for p in map(layout.artifact, release.engines or ()) if p.is_dir()),
    )


def check_fits_together(layout: StateLayout, release: Release) -> None:
    """The bundle is what the release says, and every adapter goes on it. Raises Incompatible with
    all refusals of all adapters."""
    bundle = load_bundle(layout.artifact(release.bundle))
    refusals = quant_refusals(release.quant, bundle.stored)
    for adapter in release.adapters:
        document = load_adapter(layout.artifact(adapter.digest))
        refusals += [
            Refusal(f"{r.code} of {adapter.name}", r.need, r.have)
            for r in adapter_refusals(bundle, document)
        ]
    if refusals:
        raise Incompatible(refusals)


def link_current(layout: StateLayout, record: Record | None) -> None:
    """`current` shows what the record says is committed; repaired at every start."""
    if record is None or record.committed is None:
        layout.current.unlink(missing_ok=True)
        return
    target = Path("releases") / layout.release(record.committed).name
    point_link(layout.current, str(target))
