"""Which graphs are still of use to the fleet: the roots of what is kept of shared engines."""

from __future__ import annotations

from remora_contract.bundle import GRAPH_FILE
from remora_contract.release import Release
from remora_contract.strict import loads
from remora_controller.repository import Repository
from remora_controller.store.protocol import Store


def assigned_graphs(store: Store, repository: Repository) -> frozenset[str]:
    """Digests of the graphs of releases that devices are assigned, or that are rolled out."""
    named = {a.release_id for a in store.assignments().values()}
    named |= {r.release_id for r in store.open_rollouts()}
    documents = [store.release(r) for r in named if r is not None]
    manifests = repository.index().manifests
    found: set[str] = set()
    for record in filter(None, documents):
        bundle = manifests.get(loads(Release, record.document, record.release_id).bundle)
        if bundle is not None:
            found |= {f.digest for f in bundle.files if f.path == GRAPH_FILE}
    return frozenset(found)
