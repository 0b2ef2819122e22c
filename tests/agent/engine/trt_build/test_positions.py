"""The graph that TensorRT is given: logits of many positions and states, by the same rules."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from remora_agent.engine.build import BuildControl, build_engine
from remora_agent.engine.cache import EngineCache
from remora_agent.engine.opening import EngineOptions, recipe_of
from remora_agent.engine.trt.files import PLAN
from remora_agent.engine.trt.positions import choose_positions
from remora_build.export.exporter import export_checkpoint
from remora_build.export.options import ExportOptions
from remora_build.families import FAMILIES
from remora_contract.bundle import GRAPH_FILE, GraphSpec, load_bundle
from remora_contract.errors import EngineFault
from remora_contract.graph_lint import findings
from tests.agent.engine.portable import FLOAT16, INT4, LLAMA, QWEN3, in_legacy, random_bundle
from tests.support.checkpoints import make_checkpoint


@pytest.mark.parametrize("graph", [FLOAT16, INT4, in_legacy(FLOAT16), in_legacy(INT4)])
@pytest.mark.parametrize("spec", [QWEN3, LLAMA])
def test_the_changed_graph_keeps_the_rules_of_its_dialect(tmp_path: Path, spec, graph: GraphSpec):
    model = ir.load(random_bundle(tmp_path / "b", spec, graph) / GRAPH_FILE)
    inputs = [v.name for v in model.graph.inputs]
    choose_positions(model, spec.hidden)
    assert findings(model, graph.dialect) == []
    inputs.remove("last_index")
    assert [v.name for v in model.graph.inputs] == [*inputs, "state_index", "logits_index"]
    shapes = {v.name: str(v.shape) for v in model.graph.outputs}
    assert shapes["logits"] == f"[k,{spec.vocab}]" and shapes["states"] == f"[n,{spec.hidden}]"


def _rename(name: str):
    def change(model: ir.Model) -> None:
        (node,) = [n for n in model.graph if n.name == name]
        node.name = "other"

    return change


def _whole_batch(model: ir.Model) -> None:
    (node,) = [n for n in model.graph if n.name == "head.select"]
    node.attributes["batch_dims"] = ir.AttrInt64("batch_dims", 0)


def _no_index(model: ir.Model) -> None:
    (value,) = [v for v in model.graph.inputs if v.name == "last_index"]
    value.name = "index"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_rename("norm"), "final norm"),
        (_whole_batch, "head.select.*batch_dims"),
        (_no_index, "last_index"),
    ],
)
def test_another_end_than_the_exporters_is_refused_by_name(tmp_path: Path, change, words: str):
    model = ir.load(random_bundle(tmp_path / "b") / GRAPH_FILE)
    change(model)
    with pytest.raises(EngineFault, match=words):
        choose_positions(model, QWEN3.hidden)


def tensorrt_builds(
    tmp_path: Path, family: str, processors: tuple[int, ...] = (86,), **more: Any
) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", family)
    more = {"int4_block": 32} | more
    options = ExportOptions(max_context=64, max_bank_rank=32, golden=False, **more)
    directory = tmp_path / "bundle"
    export_checkpoint(checkpoint, directory, options)
    bundle = load_bundle(directory)
    recipe = recipe_of(bundle, EngineOptions(rows=3, backend="tensorrt_rtx"), processors)
    cache = EngineCache(tmp_path / "engines", 1 << 40)
    result = build_engine(directory, bundle, recipe, cache, BuildControl())
    assert (result.entry.directory / PLAN).stat().st_size > 1000


needs_tensorrt = pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None,
    reason="tensorrt-rtx is not installed: pip install 'remora[tensorrt]'",
)


@needs_tensorrt
@pytest.mark.slow
@pytest.mark.parametrize("dialect", ["native", "legacy"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tensorrt_builds_it_for_every_family(tmp_path: Path, family: str, dialect: str):
    tensorrt_builds(tmp_path, family, dialect=dialect)


@needs_tensorrt
@pytest.mark.slow
@pytest.mark.parametrize("dialect", ["native", "legacy"])
def test_tensorrt_builds_it_with_adapters_on_embedding_and_head(tmp_path: Path, dialect: str):
    tensorrt_builds(tmp_path, "llama", dialect=dialect, adapt=("embed", "head"))


AROUND = {"dora": True, "adapter_bias": True}
EVERYTHING = AROUND | {"adapt": ("embed", "head", "experts")}
# Every option of the bank, alone and together.
BANKS: dict[str, tuple[str, dict[str, Any]]] = {
    "dora": ("qwen3", {"dora": True}),
    "biases": ("qwen2", {"adapter_bias": True}),
    "ends": ("llama", AROUND | {"adapt": ("embed", "head")}),
    "experts": ("mixtral", {"adapt": ("experts",)}),
    "everything": ("qwen3_moe", EVERYTHING),
    "everything-int4": ("qwen2_moe", EVERYTHING | {"int4_block": 32}),
}


@needs_tensorrt
@pytest.mark.slow
@pytest.mark.parametrize("dialect", ["native", "legacy"])
@pytest.mark.parametrize("bank", BANKS)
def test_tensorrt_builds_every_bank_for_every_processor(tmp_path: Path, bank: str, dialect: str):
    family, options = BANKS[bank]
    tensorrt_builds(
        tmp_path, family, (80, 86, 89, 120), **{"int4_block": None, "dialect": dialect} | options
    )
