"""`python -m remora_agent.engine.build_child PIPE BUNDLE_DIR RECIPE_JSON OUT_DIR KEPT`: one build.

KEPT is a file that outlives the engine: what the builder measured, for the next build by the same
recipe. A backend that measures nothing leaves it alone.

A malformed graph may crash a native parser, so nothing native sees it before `onnx.checker` did,
and whatever happens here happens to a child.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import onnx

from remora_agent.engine.child_side import child_main
from remora_agent.engine.recipe import Recipe, build_files, graph_file
from remora_agent.host import Progress
from remora_contract.bundle import load_bundle, read_document, verify_files
from remora_contract.errors import EngineFault, Unsupported
from remora_contract.strict import loads


def build(
    bundle_dir: Path, recipe_path: Path, out_dir: Path, kept: Path, progress: Progress
) -> dict[str, Any]:
    """Builds into `out_dir`; the facts that loading needs.

    Raises ArtifactInvalid (graph damaged), EngineFault (graph not understood), Unsupported.
    """
    recipe = loads(Recipe, read_document(recipe_path), str(recipe_path))
    bundle = load_bundle(bundle_dir)
    progress("verifying the graph", 0.0)
    verify_files(bundle_dir, build_files(bundle, recipe))
    check_graph(bundle_dir / graph_file(recipe))
    if recipe.backend == "onnxruntime":
        from remora_agent.engine.ort.builder import build_ort

        return build_ort(bundle_dir, bundle, recipe, out_dir, progress)
    if recipe.backend in ("tensorrt", "tensorrt_rtx"):
        from remora_agent.engine.trt.builder import build_trt

        return build_trt(bundle_dir, bundle, recipe, out_dir, progress, kept)
    raise Unsupported(f"no builder for backend {recipe.backend!r}")


def check_graph(path: Path) -> None:
    """Raises EngineFault when the model is no valid ONNX."""
    try:
        onnx.checker.check_model(str(path))
    except (onnx.checker.ValidationError, ValueError) as e:
        raise EngineFault(f"{path} is not valid ONNX: {str(e).splitlines()[0][:300]}") from e


def main() -> int:
    descriptor, *paths = sys.argv[1:]
    bundle_dir, recipe_path, out_dir, kept = map(Path, paths)
    return child_main(
        int(descriptor), lambda progress: build(bundle_dir, recipe_path, out_dir, kept, progress)
    )


if __name__ == "__main__":
    sys.exit(main())
