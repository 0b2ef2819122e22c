"""remora.inference.v1.Adapters: what an operator on the device does with adapters."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from remora_agent.runtime.adapters import AdapterInfo
from remora_agent.runtime.model import ModelAdapters
from remora_agent.serving import adapter_wire
from remora_agent.serving.router import Router
from remora_agent.serving.rpc_errors import translated
from remora_agent.serving.served_model import ServedModel
from remora_agent.serving.wire import refuse_unknown_fields
from remora_contract.adapter import ADAPTER_JSON
from remora_contract.errors import RequestInvalid
from remora_protos.inference.v1 import inference_pb2 as pb
from remora_protos.inference.v1 import inference_pb2_grpc as rpc

T = TypeVar("T")


class AdaptersService(rpc.AdaptersServicer):
    """`workers` run what waits for the disk or the step thread."""

    def __init__(self, router: Router[ServedModel], workers: ThreadPoolExecutor) -> None:
        self._router = router
        self._workers = workers

    @translated
    async def Register(self, request: pb.RegisterAdapterRequest, context: Any) -> pb.AdapterInfo:
        refuse_unknown_fields(request)
        path = Path(request.path)
        if not path.is_absolute():
            raise RequestInvalid(f"path {request.path[:200]!r}: give an absolute path")
        name, revision = _name(request.name), request.revision or None

        def register(adapters: ModelAdapters) -> AdapterInfo:
            _check_converted(path)
            return adapters.register(name, revision, path, set_alias=request.set_alias)

        return adapter_wire.adapter_info(await self._call(register))

    @translated
    async def Load(self, request: pb.LoadAdapterRequest, context: Any) -> pb.AdapterInfo:
        refuse_unknown_fields(request)
        remaining = context.time_remaining()
        limit: dict[str, Any] = {} if remaining is None else {"timeout_s": max(remaining, 0.0)}
        info = await self._call(
            lambda adapters: adapters.load(_name(request.name), request.revision or None, **limit)
        )
        return adapter_wire.adapter_info(info)

    @translated
    async def Unload(self, request: pb.UnloadAdapterRequest, context: Any) -> pb.AdapterInfo:
        refuse_unknown_fields(request)
        mode = adapter_wire.unload_mode(request.mode)
        info = await self._call(
            lambda adapters: adapters.unload(
                _name(request.name), request.revision or None, mode, forget=request.forget
            )
        )
        return adapter_wire.adapter_info(info)

    @translated
    async def SetAlias(self, request: pb.SetAliasRequest, context: Any) -> pb.AliasInfo:
        refuse_unknown_fields(request)
        if not request.revision:
            raise RequestInvalid("revision: name the revision the alias is to point to")
        epoch = request.expected_epoch if request.HasField("expected_epoch") else None
        alias = await self._call(
            lambda adapters: adapters.set_alias(_name(request.name), request.revision, epoch)
        )
        return adapter_wire.alias_info(alias)

    @translated
    async def Pin(self, request: pb.PinAdapterRequest, context: Any) -> pb.AdapterInfo:
        refuse_unknown_fields(request)
        info = await self._call(
            lambda adapters: adapters.pin(
                _name(request.name), request.revision or None, pinned=request.pinned
            )
        )
        return adapter_wire.adapter_info(info)

    @translated
    async def List(self, request: pb.ListAdaptersRequest, context: Any) -> pb.ListAdaptersResponse:
        refuse_unknown_fields(request)
        infos, aliases = await self._call(lambda a: (a.list(), a.directory.aliases()))
        return pb.ListAdaptersResponse(
            adapters=[adapter_wire.adapter_info(i) for i in infos],
            aliases=[adapter_wire.alias_info(a) for a in aliases],
        )

    @translated
    async def Capacity(self, request: pb.CapacityRequest, context: Any) -> pb.CapacityResponse:
        refuse_unknown_fields(request)
        if request.rank < 1:
            raise RequestInvalid("rank: ask for at least 1")
        return adapter_wire.capacity(await self._call(lambda a: a.capacity(request.rank)))

    async def _call(self, work: Callable[[ModelAdapters], T]) -> T:
        """Waits while the model is being switched, but does not hold a switch up: an operation
        that meets one in its middle ends with Unavailable."""
        async with self._router.entering() as model:
            adapters = model.runtime.adapters
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._workers, lambda: work(adapters))


def _name(name: str) -> str:
    if not name:
        raise RequestInvalid("name: name the adapter")
    return name


def _check_converted(directory: Path) -> None:
    """The caller's mistake, not damage to an adapter. Raises RequestInvalid."""
    try:
        found = (directory / ADAPTER_JSON).is_file()
    except OSError:  # this process may not look there
        found = False
    if not found:
        raise RequestInvalid(
            f"path {str(directory)[:200]!r} is no converted adapter: there is no {ADAPTER_JSON} "
            "that the agent can read; convert it with remora-build adapter PEFT_DIR OUT --base "
            "BUNDLE"
        )
