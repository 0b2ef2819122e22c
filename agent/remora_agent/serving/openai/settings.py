"""Where the HTTP surface listens and who may call it. Needs no HTTP library."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from remora_agent.serving.address import Address, parse_address
from remora_agent.serving.openai.keys import ApiKeys, load_keys
from remora_agent.serving.tls import ServerTls
from remora_contract.errors import Refused


@dataclass(frozen=True)
class OpenAiOptions:
    """`tls`: certificate and key; clients prove themselves with an API key, not a certificate.
    `adapter_directory`: adapters below it may be loaded and unloaded by callers; None: none."""

    address: Address
    tls: ServerTls | None = None
    keys: ApiKeys = field(default_factory=ApiKeys)
    adapter_directory: Path | None = None
    allowed_users: frozenset[int] | None = None  # of a unix socket; None: whom its mode lets in


def check_exposure(options: OpenAiOptions) -> None:
    """Raises Refused for an address that other machines reach without TLS, or without a key."""
    target = options.address.target()
    if options.address.local:
        return
    if options.tls is None:
        raise Refused(
            f"{target} can be reached from other machines: give a TLS certificate and its key "
            "(--tls-cert and --tls-key), or listen on 127.0.0.1 or unix:/path"
        )
    if not options.keys:
        raise Refused(
            f"{target} can be reached from other machines: give API keys "
            "(--openai-api-key-file), or listen on 127.0.0.1 or unix:/path"
        )


def openai_options(
    listen: str | None,
    tls: ServerTls | None,
    api_key_file: Path | str | None,
    adapter_directory: Path | str | None,
    environment: Mapping[str, str] = os.environ,
) -> OpenAiOptions | None:
    """None where it is off. Raises RequestInvalid (the address), DocumentInvalid (the keys),
    Refused (as check_exposure)."""
    if listen is None:
        return None
    options = OpenAiOptions(
        parse_address(listen),
        tls,
        load_keys(Path(api_key_file) if api_key_file else None, environment),
        Path(adapter_directory) if adapter_directory else None,
    )
    check_exposure(options)
    return options
