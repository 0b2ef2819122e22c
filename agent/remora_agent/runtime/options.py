"""The bounds a ModelRuntime works within. Frozen data."""

from __future__ import annotations

from dataclasses import dataclass

from remora_contract.release import MAX_MIX

# Of one request, on every surface.
MAX_ID_CHARS = 128
CHOICE_ID_CHARS = 4  # that the runtime's id of one of several answers has more
MAX_STOP_TOKENS = 256
MAX_DRAFT_TOKENS = 16  # of one step
MAX_EMBEDDINGS = 256  # inputs of one request
MAX_CLIENT_CHARS = 128
MAX_SALT_CHARS = 256

EXACT_DRAFTS_HELP = (
    "While one request decodes alone, read two tokens in every step, so that no answer depends on "
    "what was drafted; steps without a draft take longer."
)

_MAY_BE_ZERO = frozenset(
    ["prefix_bytes", "memory_floor_bytes", "draft_tokens", "exact_drafts", "spare_after_s"]
)


@dataclass(frozen=True)
class RuntimeOptions:
    """Every queue and buffer of the runtime has its bound here."""

    max_waiting: int = 256  # requests that wait for a row
    max_waiting_tokens: int = 1 << 18  # sum of their prompts
    prefill_chunk: int = 256  # most prompt tokens between two decode steps
    inter_token_s: float = 0.25  # chunks are cut so that running answers move at least as often
    patience_s: float = 2.0  # without room for its adapters for longer, it gets that of others
    aging_s: float = 30.0  # so long without a turn is worth one level of priority
    prefix_bytes: int = 256 << 20  # keys and values of prefixes kept in host memory; 0: no reuse
    memory_floor_bytes: int = 256 << 20  # of the system's memory, stay free; 0: not looked at
    host_bytes: int = 1 << 30  # adapter weights kept in host memory
    bank_rank: int | None = None  # of all resident adapters; None: what the engine takes
    bank_bytes: int | None = 2 << 30  # of all resident adapters, as float32; None: by rank alone
    max_mix: int = MAX_MIX  # adapters in one request
    default_max_tokens: int = 256  # where neither request nor release nor bundle says
    max_stop_strings: int = 16
    max_stop_chars: int = 256
    draft_tokens: int = 8  # guessed and proven in one step of a row that decodes alone; 0: none
    exact_drafts: bool = False  # an answer alone is the same bit for bit whatever was drafted
    spare_after_s: float = 0.25  # nobody's work begins when nobody was here for so long

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is None or (value == 0 and name in _MAY_BE_ZERO):
                continue
            if value <= 0:
                raise ValueError(f"{name} must be positive, not {value}")
        if self.draft_tokens > MAX_DRAFT_TOKENS:
            raise ValueError(f"draft_tokens must be at most {MAX_DRAFT_TOKENS}")
