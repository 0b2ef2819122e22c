"""Published artifacts of random bytes: a valid bundle or adapter, chunked, with its manifest."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path

from remora_contract.adapter import ADAPTER_JSON, WEIGHTS_FILE, Adapter, TargetRank
from remora_contract.adapter import FORMAT_VERSION as ADAPTER_FORMAT
from remora_contract.artifact import ArtifactFile, Chunk, Manifest, chunk_key, manifest_key
from remora_contract.bundle import (
    BUNDLE_JSON,
    FORMAT_VERSION,
    Bundle,
    BundleFile,
    GraphSpec,
    SourceInfo,
)
from remora_contract.decoder import DecoderSpec, RopeSpec
from remora_contract.digests import canonical_json, digest_bytes
from remora_contract.release import Release, ReleaseAdapter

BASE = "sha256:" + "ba" * 32


@dataclass(frozen=True)
class Repository:
    root: Path
    chunk_bytes: int = 100_000

    def bundle(self, seed: int = 1, size: int = 450_000) -> Manifest:
        """bundle.json, a small graph and `size` bytes of weights in several chunks."""
        weights = random.Random(seed).randbytes(size)
        files = {"model.onnx": b"graph %d" % seed, "model.onnx.data": weights}
        return self.publish("bundle", files, lambda listed: make_bundle(listed))

    def adapter(self, seed: int = 2, size: int = 30_000, base: str = BASE) -> Manifest:
        files = {WEIGHTS_FILE: random.Random(seed).randbytes(size)}
        return self.publish("adapter", files, lambda listed: make_adapter(listed, base))

    def publish(self, kind, files, document_of) -> Manifest:
        listed = tuple(BundleFile(p, len(d), digest_bytes(d)) for p, d in files.items())
        document = document_of(listed)
        name = BUNDLE_JSON if kind == "bundle" else ADAPTER_JSON
        contents = {name: canonical_json(document), **files}
        manifest = Manifest(
            format_version=1,
            kind=kind,
            digest=document.digest,
            name=f"{kind}-test",
            revision="r1",
            base_digest=document.base_digest,
            files=tuple(self._file(p, d) for p, d in contents.items()),
            published_at="2026-11-23T00:00:00Z",
        )
        self.write(manifest)
        return manifest

    def write(self, manifest: Manifest, digest: str | None = None) -> None:
        path = self.root / manifest_key(digest or manifest.digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(canonical_json(manifest))

    def tamper(self, manifest: Manifest, **changes: object) -> None:
        """Another manifest under the same digest."""
        self.write(replace(manifest, **changes), manifest.digest)

    def _file(self, path: str, data: bytes) -> ArtifactFile:
        pieces = [data[i : i + self.chunk_bytes] for i in range(0, len(data), self.chunk_bytes)]
        for piece in pieces:
            target = self.root / chunk_key(digest_bytes(piece))
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(piece)
        chunks = tuple(Chunk(digest_bytes(p), len(p)) for p in pieces)
        return ArtifactFile(path, len(data), digest_bytes(data), chunks)


def make_release(name: str, bundle: Manifest, *adapters: Manifest, **fields: object) -> Release:
    listed = tuple(ReleaseAdapter(f"adapter{i}", "r1", a.digest) for i, a in enumerate(adapters))
    return Release(format_version=1, name=name, bundle=bundle.digest, adapters=listed, **fields)


def make_bundle(files: tuple[BundleFile, ...]) -> Bundle:
    decoder = DecoderSpec(
        family="qwen3",
        layers=2,
        hidden=8,
        heads=2,
        kv_heads=1,
        head_dim=4,
        intermediate=16,
        vocab=32,
        norm_eps=1e-6,
        rope=RopeSpec(10000.0),
    )
    return Bundle(
        format_version=FORMAT_VERSION,
        base_digest=BASE,
        decoder=decoder,
        graph=GraphSpec("native", "float16", context=64, max_bank_rank=16, opset=24),
        files=files,
        eos_token_ids=(1,),
        bos_token_id=None,
        pad_token_id=None,
        source=SourceInfo("test", "qwen3", "float16"),
        exporter="test",
    )


def make_adapter(files: tuple[BundleFile, ...], base: str = BASE, rank: int = 4) -> Adapter:
    return Adapter(
        format_version=ADAPTER_FORMAT,
        base_digest=base,
        dtype="float16",
        targets=(TargetRank(0, "q", rank, 2.0),),
        files=files,
        source_config={},
        exporter="test",
    )
