"""Where a device's artifact lies: published, or uploaded by another device. Reads only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from remora_controller.repository import Repository
from remora_controller.sharing.depot import Depot


@dataclass(frozen=True)
class Shelves:
    """Both name things by their bytes, so it does not matter which one answers."""

    repository: Repository
    depot: Depot

    def manifest_json(self, digest: str) -> bytes:
        if self.depot.has(digest):
            return self.depot.manifest_json(digest)
        return self.repository.manifest_json(digest)

    def chunk(self, digest: str) -> tuple[Path, int]:
        if self.depot.has_chunk(digest):
            return self.depot.chunk(digest)
        return self.repository.chunk(digest)
