"""A bundle with an engine folder of TensorRT Edge-LLM, as this device reads it. No process here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from remora_agent.edgellm.child import Child, End
from remora_agent.edgellm.module import BACKEND, require_installed
from remora_agent.edgellm.request import CANNOT_DEFAULT, Question
from remora_agent.runtime.defaults import load_generation_defaults
from remora_agent.text.pipeline import TextPipeline
from remora_contract.bundle import EDGELLM_DIR, Bundle, load_bundle
from remora_contract.dialects import dialect_refusals
from remora_contract.digests import canonical_json, digest_bytes
from remora_contract.errors import Incompatible, Refusal
from remora_contract.release import SamplingDefaults

NOTES = "edgellm"


@dataclass(frozen=True)
class EdgeBundle:
    directory: Path
    bundle: Bundle
    text: TextPipeline
    version: str  # of the wheel
    sampling: SamplingDefaults  # the bundle's, as far as they are honoured
    warnings: tuple[str, ...]

    @classmethod
    def load(cls, directory: Path) -> EdgeBundle:
        """Raises Unsupported without the wheel, Incompatible for a bundle of graphs or of another
        version's engine, ArtifactInvalid, DocumentInvalid."""
        version, bundle = require_installed(), load_bundle(directory)
        refusals = dialect_refusals(bundle.dialects, {BACKEND: version})
        refusals = refusals or _version_refusals(bundle, version)
        if refusals:
            raise Incompatible(refusals)
        generation = load_generation_defaults(directory)
        left_out = {n: None for n in CANNOT_DEFAULT if getattr(generation.sampling, n) is not None}
        ignored = tuple(f"{name}: backend {BACKEND} has no such field" for name in left_out)
        sampling = replace(generation.sampling, **left_out)
        text = TextPipeline.load(directory)
        return cls(directory, bundle, text, version, sampling, (*generation.warnings, *ignored))

    @property
    def engine_directory(self) -> Path:
        return self.directory / EDGELLM_DIR

    @property
    def engine_digest(self) -> str:
        """Of the folder's files and the wheel that runs them."""
        files = {
            f.path: f.digest for f in self.bundle.files if f.path.startswith(f"{EDGELLM_DIR}/")
        }
        return digest_bytes(canonical_json({"files": files, BACKEND: self.version}))

    @property
    def context(self) -> int:
        return self.bundle.graph.context

    @property
    def max_input(self) -> int:
        """Tokens of a prompt; the engine was built for so many."""
        return int(self._notes.get("max_input_len", self.context))

    @property
    def bos(self) -> str:
        """The text of the token that a prompt may begin with; empty where there is none."""
        if self.bundle.bos_token_id is None:
            return ""
        return self.text.decode([self.bundle.bos_token_id], keep_special_tokens=True)

    @property
    def probe_prompt(self) -> str:
        return "1"

    def answer_of(self, child: Child, prompt: str, adapter: str, tokens: int) -> Answer:
        """The greedy answer to a text, as a request with this prompt gets it. Raises as Child.ask,
        PromptTooLong."""
        ids = self.text.encode(prompt).token_ids
        texts: list[str] = []
        found: list[int] = []

        def chunk(text: str, new: tuple[int, ...]) -> None:
            texts.append(text)
            found.extend(new)

        whole = self.text.decode(ids, keep_special_tokens=True)
        asked = Question(whole, len(ids), self.bos, adapter, 1.0, 1, 1.0, tokens)
        end = child.ask(asked, chunk, lambda: None)
        return Answer("".join(texts), tuple(found), end)

    @property
    def _notes(self) -> dict[str, Any]:
        notes = self.bundle.notes.get(NOTES, {})
        return notes if isinstance(notes, dict) else {}


@dataclass(frozen=True)
class Answer:
    text: str
    ids: tuple[int, ...]
    end: End


def _version_refusals(bundle: Bundle, version: str) -> list[Refusal]:
    """An engine folder opens in the version that built it."""
    notes = bundle.notes.get(NOTES, {})
    built = notes.get("version") if isinstance(notes, dict) else None
    if built is None or built == version:
        return []
    return [Refusal("edgellm_version", f"tensorrt-edgellm {built}", version)]
