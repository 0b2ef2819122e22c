"""Each dialect spells the decoder's operations with the nodes recorded in listings/.

After a deliberate change: `python -m tests.buildhost.test_dialects` records them again; read the
difference before committing it.
"""

from __future__ import annotations

import pytest

from remora_build.graph.decoder import build_graph
from remora_build.graph.layout import lay_out
from remora_contract.bundle import DecoderSpec, GraphSpec, QuantSpec, RopeSpec
from tests.buildhost.listing import LISTINGS, listing, recorded

SPEC = DecoderSpec(
    family="qwen3",
    layers=1,
    hidden=64,
    heads=4,
    kv_heads=2,
    head_dim=16,
    intermediate=96,
    vocab=320,
    norm_eps=1e-5,
    rope=RopeSpec(1e4),
    qkv_bias=True,
    qk_norm="head",
)
GRAPHS = {"native": GraphSpec("native", "float16", 128, 8, 24, QuantSpec("int4", 32))}


def lines_of(name: str) -> list[str]:
    graph = GRAPHS[name]
    return listing(build_graph(SPEC, graph, lay_out(SPEC, graph)))


@pytest.mark.parametrize("name", GRAPHS)
def test_the_graph_of_a_plain_decoder_is_the_recorded_one(name):
    assert lines_of(name) == recorded(name)


if __name__ == "__main__":
    for graph_name in GRAPHS:
        (LISTINGS / f"{graph_name}.txt").write_text("\n".join(lines_of(graph_name)) + "\n")
