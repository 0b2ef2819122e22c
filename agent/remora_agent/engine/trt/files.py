"""What a TensorRT build leaves in its folder, and the facts that loading needs. Pure.

OUT/engine.plan   the serialised engine, weights in it

Facts are strings (`EngineManifest.facts`): what the profiles allow, in TensorRT's order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from remora_contract.digests import canonical_json
from remora_contract.errors import ArtifactInvalid, DocumentInvalid
from remora_contract.strict import loads

PLAN = "engine.plan"
FACT_PROFILES = "profiles"  # JSON: list of Profile, at its TensorRT index
FACT_CONTEXT = "context"  # tokens a row's cache holds
FACT_MAX_BANK_RANK = "max_bank_rank"  # 0: the graph has no bank
# For people and for the memory plan; absent where the builder did not say.
FACT_LAYERS = "layers"  # JSON: kind -> how many, of the network before fusion
FACT_WARNINGS = "warnings"  # JSON: lines of the builder that nobody has judged
FACT_WEIGHTS = "weights_bytes"
FACT_ACTIVATION = "activation_bytes"  # of the larger profile, beside weights, cache and bank

ProfileKind = Literal["prefill", "decode"]


@dataclass(frozen=True)
class Profile:
    """Rows and tokens run from 1 to these; a bank's columns from 0 to max_bank_rank x parts."""

    kind: ProfileKind
    rows: int
    tokens: int

    def __post_init__(self) -> None:
        if self.rows < 1 or self.tokens < 1:
            raise ValueError(f"a {self.kind} profile of {self.rows} rows, {self.tokens} tokens")


@dataclass(frozen=True)
class _Profiles:
    profiles: tuple[Profile, ...]


@dataclass(frozen=True)
class EngineFacts:
    profiles: tuple[Profile, ...]  # index = TensorRT's profile index
    context: int
    max_bank_rank: int

    @property
    def chunk(self) -> int:
        """Tokens of a prompt's step. Raises ArtifactInvalid."""
        return self.profiles[self.index("prefill")].tokens

    def index(self, kind: ProfileKind) -> int:
        """TensorRT's index of the profile of this kind. Raises ArtifactInvalid."""
        for i, profile in enumerate(self.profiles):
            if profile.kind == kind:
                return i
        raise ArtifactInvalid(f"the engine has no {kind} profile; build it again")


def written(facts: EngineFacts) -> dict[str, str]:
    """As EngineManifest keeps them."""
    return {
        FACT_PROFILES: canonical_json(facts.profiles).decode(),
        FACT_CONTEXT: str(facts.context),
        FACT_MAX_BANK_RANK: str(facts.max_bank_rank),
    }


def read(facts: Mapping[str, str], where: str) -> EngineFacts:
    """The reverse; `where` names the engine in errors. Raises ArtifactInvalid."""
    try:
        document = f'{{"profiles":{facts[FACT_PROFILES]}}}'
        return EngineFacts(
            loads(_Profiles, document, where).profiles,
            int(facts[FACT_CONTEXT]),
            int(facts[FACT_MAX_BANK_RANK]),
        )
    except (KeyError, ValueError, DocumentInvalid) as e:
        raise ArtifactInvalid(f"{where}: facts of no TensorRT engine ({e}); build it again") from e
