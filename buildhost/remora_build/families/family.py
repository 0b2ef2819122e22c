"""One family: a title for people, how its config.json is read, what it calls its tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from remora_build.families.fields import ConfigFields
from remora_build.families.naming import PLAIN, Words
from remora_contract.decoder import DecoderSpec


@dataclass(frozen=True)
class Family:
    """`own` is what sets it apart, in a few words for the table in the documentation. `words` are
    the vocabularies in which its checkpoints are found, the usual one first."""

    model_type: str
    title: str
    own: str
    read: Callable[[ConfigFields], DecoderSpec]
    words: tuple[Words, ...] = (PLAIN,)
