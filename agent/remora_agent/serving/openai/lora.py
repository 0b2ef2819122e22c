"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter, vLLM's names: off unless a directory is
configured, and then a caller's path never leaves it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from remora_agent.bank.directory import AdapterDirectory
from remora_agent.runtime.adapters import UnloadMode
from remora_agent.runtime.model import ModelAdapters
from remora_agent.serving.openai.body import json_object
from remora_agent.serving.openai.errors import FieldInvalid
from remora_agent.serving.openai.exchange import read_body
from remora_agent.serving.openai.fields import Fields
from remora_agent.serving.openai.generating import Generator
from remora_agent.serving.served_model import ServedModel
from remora_contract.artifact import check_name
from remora_contract.errors import ArtifactInvalid, Forbidden, NotFound, RemoraError

_MAX_PATH_CHARS = 1024


class LoraAdapters:
    """`directory`: below it lie the adapters that may be loaded; None: none may."""

    def __init__(self, generator: Generator, directory: Path | None) -> None:
        self._generator, self._directory = generator, directory

    async def load(self, request: Request) -> Response:
        root = self._allowed()
        body = await read_body(request)
        fields = Fields(json_object(body))
        name = check_name(fields.text("lora_name") or "", "lora_name")
        path = fields.text("lora_path", _MAX_PATH_CHARS)
        again = fields.flag("load_inplace") or False
        fields.done()
        if not path:
            raise FieldInvalid("lora_path: name a directory of converted adapters", "lora_path")
        await self._call(lambda model: _load(model, name, inside(root, path), again))
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    async def unload(self, request: Request) -> Response:
        self._allowed()
        body = await read_body(request)
        fields = Fields(json_object(body))
        name = check_name(fields.text("lora_name") or "", "lora_name")
        fields.refuse({"lora_int_id": ((), "adapters go by their names")})
        fields.done()
        await self._call(lambda model: _unload(model.runtime.adapters, name))
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    def _allowed(self) -> Path:
        if self._directory is None:
            raise Forbidden(
                "adapters are not loaded over HTTP here; the operator sets openai.adapter_directory"
            )
        return self._directory

    async def _call(self, work: Callable[[ServedModel], None]) -> None:
        """Does not hold up a switch of models: one that meets it ends it with Unavailable."""
        async with self._generator.router.entering() as model:
            serving = model
        await self._generator.work(lambda: work(serving))


def inside(root: Path, path: str) -> Path:
    """The directory that `path` names below `root`, links resolved. Raises FieldInvalid with the
    same words whether something lies outside or not."""
    try:
        real_root = root.resolve(strict=True)
        found = (real_root / path).resolve(strict=True)
    except (OSError, ValueError, RuntimeError) as e:
        raise _not_there(path) from e
    if not found.is_relative_to(real_root) or not found.is_dir():
        raise _not_there(path)
    return found


def _not_there(path: str) -> FieldInvalid:
    return FieldInvalid(
        f"lora_path: the adapter directory holds no {path[:200]!r}; give a path below it",
        "lora_path",
    )


def check_free(name: str, base: str, directory: AdapterDirectory) -> None:
    """An adapter's name must mean it alone: others who call that name would no longer get what
    they mean. Raises FieldInvalid."""
    taken = {base: "the base model"}
    taken |= {use_case.name: "a use case" for use_case in directory.use_cases()}
    if name in taken:
        raise FieldInvalid(
            f"lora_name: {name} is the name of {taken[name]}; choose another", "lora_name"
        )


def _load(model: ServedModel, name: str, directory: Path, again: bool) -> None:
    """The name moves once the adapter is in the bank; what does not load leaves no name behind."""
    adapters = model.runtime.adapters
    known = {alias.name for alias in adapters.directory.aliases()}
    if name not in known:
        check_free(name, model.runtime.bundle.source.name, adapters.directory)
    if name in known and not again:
        raise FieldInvalid(
            f"lora_name: {name} is loaded; unload it first, or say load_inplace", "lora_name"
        )
    try:
        info = adapters.register(name, None, directory)
    except ArtifactInvalid as e:  # what the caller named, no fault of the agent
        raise FieldInvalid(f"lora_path: {e}", "lora_path") from e
    try:
        adapters.load(name, info.revision)
    except RemoraError:
        if name not in known:
            adapters.unload(name, info.revision, forget=True)
        raise
    if adapters.directory.alias(name).revision != info.revision:
        adapters.set_alias(name, info.revision)


def _unload(adapters: ModelAdapters, name: str) -> None:
    """All its revisions, the one its name points to last. Running requests end in peace."""
    target = adapters.directory.alias(name).revision
    revisions = [r.revision for r in adapters.directory.revisions() if r.name == name]
    if not revisions:
        raise NotFound(f"no adapter is named {name}")
    for revision in sorted(revisions, key=lambda r: r == target):
        adapters.unload(name, revision, UnloadMode.GRACEFUL, forget=True)
