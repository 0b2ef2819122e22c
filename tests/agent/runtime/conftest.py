"""A ModelRuntime on the reference engine, with real adapter files."""

from types import SimpleNamespace

import pytest

from remora_agent.bank.directory import AdapterDirectory
from remora_agent.runtime.model_runtime import ModelRuntime
from remora_agent.runtime.options import RuntimeOptions
from tests.support.reference_engine import ReferenceEngine
from tests.support.runtime import VOCAB, Listener, add_adapter, byte_text, make_bundle


@pytest.fixture
def serve(tmp_path):
    """Makes a runtime with the adapters given as name -> rank; closed after the test."""
    open_runtimes = []

    def make(
        adapters=None,
        rows=4,
        context=64,
        max_bank_rank=16,
        options=None,
        invocations=None,
        scored=16,
        copies_kv=True,
        switch=None,
        **more,
    ):
        bundle = make_bundle(context, max_bank_rank)
        directory = AdapterDirectory(bundle)
        digests = {}
        for i, (name, rank) in enumerate((adapters or {}).items()):
            path = tmp_path / f"{len(open_runtimes)}-{name}"
            digests[name] = add_adapter(
                directory,
                bundle,
                path,
                name,
                "r1",
                seed=i,
                r=rank,
                invocation_tokens=(invocations or {}).get(name, ()),
            ).digest
        engine = ReferenceEngine(
            rows, context, VOCAB, max_bank_rank, scored, copies_kv=copies_kv, switch=switch
        )
        runtime = ModelRuntime(
            engine, bundle, byte_text(), directory, options or RuntimeOptions(), **more
        )
        open_runtimes.append(runtime)

        def submit(request):
            listener = Listener()
            runtime.submit(request, listener)
            return listener

        return SimpleNamespace(
            runtime=runtime,
            engine=engine,
            bundle=bundle,
            digests=digests,
            submit=submit,
            solo=lambda request: engine.solo(
                request.prompt,
                request.stopping.max_tokens,
                {digests[a.name]: a.weight for a in request.adapters},
            ),
        )

    yield make
    for runtime in open_runtimes:
        runtime.close()
