"""TensorRT-LLM's adapters: LoraWeights and LoraConfig as two .npy files, or two for each rank.

    model.lora_weights.npy   [1, rows, width] float16, bfloat16 or float32; a row is a module of a
                             layer (`trtllm_rows`), zeros up to the longest
    model.lora_config.npy    [1, rows, 3] int32: module id, layer, rank; [1, rows, 4] with a flag
                             for DoRA when a row has it

The runtime cuts the one pair itself for tensor parallelism. With a --tp-size above 1 each rank gets
its own pair, model.lora_weights.{rank}.npy, for programs that load what is theirs alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remora_build.adapters.formats.carried import Carried
from remora_build.adapters.formats.cast import cast, numpy_dtype
from remora_build.adapters.formats.npy import write_npy
from remora_build.adapters.formats.registry import StoredDtype
from remora_build.adapters.formats.trtllm_modules import shape_of
from remora_build.adapters.formats.trtllm_rows import Row, rows_of, split
from remora_contract.decoder import DecoderSpec

WEIGHTS = "model.lora_weights.npy"
CONFIG = "model.lora_config.npy"
_REMEDY = "convert with --dtype bfloat16 or float32"


def rank_file(name: str, rank: int) -> str:
    """`model.lora_weights.3.npy`."""
    return f"{name.removesuffix('.npy')}.{rank}.npy"


def write_trtllm(
    directory: Path, carried: Carried, decoder: DecoderSpec, dtype: StoredDtype, tp_size: int
) -> None:
    """Writes the files into `directory`. Raises AdapterInvalid for what `tp_size` ranks cannot
    share or `dtype` cannot hold, OSError."""
    rows = rows_of(carried.factors)
    shares = [split(row, shape_of(row.module, decoder, None), tp_size) for row in rows]
    for rank in range(tp_size):
        weights, config = WEIGHTS, CONFIG
        if tp_size > 1:
            weights, config = rank_file(WEIGHTS, rank), rank_file(CONFIG, rank)
        mine = [share[rank] for share in shares]
        write_weights(directory / weights, mine, dtype)
        write_config(directory / config, mine)


def write_weights(path: Path, rows: Sequence[Row], dtype: StoredDtype) -> None:
    """Raises AdapterInvalid naming the row a value of which `dtype` cannot hold."""
    width = max(row.values for row in rows)
    write_npy(path, dtype, (1, len(rows), width), _padded(rows, width, dtype))


def write_config(path: Path, rows: Sequence[Row]) -> None:
    """Three columns unless a row has DoRA: the older runtimes read no fourth."""
    table = [[row.module.id, row.layer, row.rank] for row in rows]
    if any(row.magnitude is not None for row in rows):
        table = [
            [*line, int(row.magnitude is not None)] for line, row in zip(table, rows, strict=True)
        ]
    values = np.array(table, "<i4")
    write_npy(path, "int32", (1, *values.shape), [values])


def _padded(rows: Sequence[Row], width: int, dtype: StoredDtype) -> Iterable[NDArray[Any]]:
    for row in rows:
        padded = np.zeros(width, numpy_dtype(dtype))
        padded[: row.values] = cast(row.flat(), dtype, row.name, remedy=_REMEDY)
        yield padded
