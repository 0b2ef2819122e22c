"""API keys: read once from a file or the environment, compared in constant time, never logged."""

from __future__ import annotations

import hashlib
import hmac
import logging
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from remora_contract.errors import DocumentInvalid

log = logging.getLogger(__name__)
VARIABLE = "REMORA_OPENAI_API_KEY"
MIN_KEY_CHARS = 16
_MAX_FILE_BYTES = 64 << 10


@dataclass(frozen=True)
class ApiKeys:
    """Digests of the keys, so that comparing tells nothing of their length."""

    digests: tuple[bytes, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.digests)

    def admits(self, authorization: str | None) -> bool:
        """Of the header Authorization; every key is compared, whichever fits."""
        scheme, _, key = (authorization or "").partition(" ")
        given, fits = _digest(key.strip()), False
        for digest in self.digests:
            fits |= hmac.compare_digest(digest, given)
        return fits and scheme.lower() == "bearer"


def load_keys(path: Path | None, environment: Mapping[str, str]) -> ApiKeys:
    """One key a line of the file, and the environment's. Raises DocumentInvalid."""
    keys = [] if path is None else _of_file(path)
    if environment.get(VARIABLE):
        keys.append(_checked(environment[VARIABLE].strip(), VARIABLE))
    return ApiKeys(tuple(map(_digest, keys)))


def _of_file(path: Path) -> list[str]:
    try:
        with path.open("rb") as f:
            data, mode = f.read(_MAX_FILE_BYTES + 1), stat.S_IMODE(path.stat().st_mode)
        lines = data.decode().splitlines()
    except OSError as e:
        raise DocumentInvalid(f"{path} cannot be read: {e.strerror or e}") from e
    except UnicodeDecodeError as e:
        raise DocumentInvalid(f"{path} is no text file with a key on each line") from e
    if mode & stat.S_IROTH:
        raise DocumentInvalid(f"{path} can be read by everybody: chmod o-r it")
    keys = [_checked(line.strip(), str(path)) for line in lines if line.strip()]
    if not keys or len(data) > _MAX_FILE_BYTES:
        raise DocumentInvalid(
            f"{path} must hold a key on each line, {_MAX_FILE_BYTES} bytes at most"
        )
    return keys


def _checked(key: str, where: str) -> str:
    if len(key) < MIN_KEY_CHARS or not key.isprintable() or not key.isascii() or " " in key:
        raise DocumentInvalid(
            f"{where}: a key has at least {MIN_KEY_CHARS} printable ASCII characters without "
            "spaces; make one with: openssl rand -hex 32"
        )
    return key


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()
