"""python llama_convert.py LLAMA_SOURCE CHECKPOINT OUT_GGUF: llama.cpp's own converter, told that
the checkpoint has no vocabulary: the benchmark's tokenizer is none that it knows, and llama-bench
feeds token ids. Imports nothing of Remora.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    source, checkpoint, out = map(Path, sys.argv[1:])
    sys.path[:0] = [str(source), str(source / "gguf-py")]
    import convert_hf_to_gguf as converter
    from conversion.qwen import Qwen2Model

    vocab = json.loads((checkpoint / "config.json").read_text())["vocab_size"]

    def set_vocab(model: Any) -> None:
        model.gguf_writer.add_tokenizer_model("no_vocab")
        model.gguf_writer.add_vocab_size(vocab)

    Qwen2Model.set_vocab = set_vocab
    sys.argv = ["convert", str(checkpoint), "--outfile", str(out), "--outtype", "f16"]
    converter.main()


if __name__ == "__main__":
    main()
