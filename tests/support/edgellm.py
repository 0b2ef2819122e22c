"""Bundles for TensorRT Edge-LLM, and its wheel as an emulator (`edgellm_emulator`)."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

from remora_agent.control.facts import installed_backends
from remora_agent.edgellm.module import installed_version
from remora_contract.bundle import (
    BUNDLE_JSON,
    EDGELLM_VERSION,
    Bundle,
    BundleFile,
    GraphSpec,
    SourceInfo,
)
from remora_contract.digests import canonical_json, digest_file
from tests.support import edgellm_emulator
from tests.support.runtime import byte_tokenizer, make_bundle
from tests.support.serving import TEMPLATE, World

MAX_RANK = 16


def write_wheel(site: Path, version: str = "0.11.0") -> Path:
    """A directory for `sys.path` in which the wheel is installed."""
    package = site / "tensorrt_edgellm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    shutil.copy(edgellm_emulator.__file__, package / "runtime.py")
    metadata = site / f"tensorrt_edgellm-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.2\nName: tensorrt-edgellm\nVersion: {version}\n"
    )
    return site


def install_wheel(site: Path, monkeypatch, version: str = "0.11.0") -> None:
    """In this process and in those that it starts."""
    write_wheel(site, version)
    monkeypatch.syspath_prepend(str(site))
    paths = [str(site), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    forget_installed()


def forget_installed() -> None:
    installed_version.cache_clear()
    installed_backends.cache_clear()


def write_engine(
    folder: Path, tokenizer: Path, context: int = 256, engine: bytes = b"ENGINE"
) -> Path:
    """As Edge-LLM's builder leaves it."""
    folder.mkdir(parents=True)
    (folder / "llm.engine").write_bytes(engine)
    shutil.copy(tokenizer, folder / "tokenizer.json")
    builder = {
        "max_batch_size": 4,
        "max_input_len": context // 2,
        "max_kv_cache_capacity": context,
        "max_lora_rank": MAX_RANK,
    }
    (folder / "config.json").write_text(json.dumps({"builder_config": builder}))
    return folder


def write_edge_bundle(
    directory: Path,
    name: str = "tiny",
    context: int = 256,
    engine: bytes = b"ENGINE",
    bos: int | None = None,
    **notes,
) -> Bundle:
    tokenizer = directory / "tokenizer"
    tokenizer.mkdir(parents=True)
    byte_tokenizer().save(str(tokenizer / "tokenizer.json"))
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    write_engine(directory / "edgellm", tokenizer / "tokenizer.json", context, engine)
    files = tuple(
        BundleFile(p.relative_to(directory).as_posix(), p.stat().st_size, digest_file(p))
        for p in sorted(directory.rglob("*"))
        if p.is_file()
    )
    bundle = replace(
        make_bundle(context, MAX_RANK),
        format_version=EDGELLM_VERSION,
        graph=GraphSpec("edgellm", "float16", context, MAX_RANK, 0),
        files=files,
        bos_token_id=bos,
        source=SourceInfo(name, "llama", "float16"),
        notes={"edgellm": {"max_input_len": context // 2, **notes}},
    )
    (directory / BUNDLE_JSON).write_bytes(canonical_json(bundle))
    return bundle


class EdgeWorld(World):
    """`engine` and `notes` by a bundle's name."""

    engine: dict[str, bytes] = {}  # noqa: RUF012
    notes: dict[str, dict[str, object]] = {}  # noqa: RUF012
    bos: int | None = None

    def bundle(self, name: str) -> Bundle:
        if name not in self.bundles:
            self.bundles[name] = write_edge_bundle(
                self.root / "b" / name,
                name,
                self.context,
                self.engine.get(name, b"ENGINE"),
                self.bos,
                **self.notes.get(name, {}),
            )
        return self.bundles[name]
