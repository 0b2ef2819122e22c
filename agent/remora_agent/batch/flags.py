"""The options of `remora-agent generate` that `serve` has not, and what their help says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

BundleOption = Annotated[
    Path, typer.Option(metavar="BUNDLE", help="Directory made by `remora-build export`.")
]
Input = Annotated[
    Path,
    typer.Option("--input", metavar="FILE", help="Requests in TensorRT Edge-LLM's format."),
]
Output = Annotated[
    Path, typer.Option("--output", metavar="FILE", help="Where the answers go, as JSON.")
]
UseCases = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Directory made by `remora-build use-cases convert`: requests may name its "
        "adapters and use cases.",
    ),
]
Rows = Annotated[
    int | None,
    typer.Option(help="Requests decoded together (default: the file's batch_size, 8 at most)."),
]
Seed = Annotated[
    int | None,
    typer.Option(help="Makes sampling repeatable; request i gets seed + i (default: random)."),
]
MinP = Annotated[
    float | None,
    typer.Option(help="Least share of the likeliest token's probability (0 to 1)."),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(help="Above 1 against tokens of prompt and answer (0.01 to 100)."),
]
PresencePenalty = Annotated[
    float | None, typer.Option(help="Against tokens that the answer has (-2 to 2).")
]
FrequencyPenalty = Annotated[
    float | None, typer.Option(help="The same for each time they came (-2 to 2).")
]
MinTokens = Annotated[
    int | None, typer.Option(help="Tokens before which no answer ends by itself.")
]
Logprobs = Annotated[
    int | None,
    typer.Option(help="Write each token's logprob and those of that many of the likeliest."),
]
