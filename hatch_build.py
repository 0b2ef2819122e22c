"""Builds the operator's library with the package, where a C compiler is; goes on without it.

The library lies beside its source, in a wheel as in an editable installation. A wheel that has it
is of this machine's platform.
"""

from __future__ import annotations

import importlib.util
import os
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NATIVE = Path("agent", "remora_agent", "engine", "ort", "native")


class NativeOperator(BuildHookInterface):  # type: ignore[type-arg, unused-ignore]
    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        builder = _load(Path(self.root, NATIVE, "build.py"))
        try:
            library = Path(builder.build())
        except builder.NotBuilt as e:
            if os.environ.get("REMORA_NATIVE") == "require":
                raise
            self.app.display_warning(f"adapters will use the grouped form: {e}")
            return
        if version == "editable":
            return
        build_data["pure_python"] = False
        build_data["tag"] = (
            f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
        )
        inside = Path("remora_agent", *NATIVE.parts[2:], library.name)
        build_data["force_include"][str(library)] = str(inside)


def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("native_build", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
