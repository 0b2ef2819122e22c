"""`python -m examples.demo`: arguments, the folder, and how it ends."""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from examples.demo.account import WIDTH, Account
from examples.demo.cast import Cast, reference_cast, world_cast
from examples.demo.processes import DemoFailed, Workshop
from examples.demo.story import Story
from remora_contract.errors import RemoraError

_TRAIN = ("python", "-m", "examples.demo.train", "trained")
_REFERENCE = ("python", "-m", "examples.demo.reference")
_ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    options = _parser().parse_args()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    account = Account(console)
    try:
        with _folder(options.keep) as folder:
            environment = {
                "COLUMNS": str(console.width - 2),
                "PYTHONPATH": str(_ROOT),
                "OMP_WAIT_POLICY": "PASSIVE",  # training beside other work: do not spin
            }
            if console.is_terminal:
                environment["FORCE_COLOR"] = "1"
            with Workshop(folder, environment, account.running) as shop:
                tell(shop, account, options)
    except (DemoFailed, RemoraError) as e:
        account.failed(str(e))
        return 1
    except KeyboardInterrupt:
        account.failed("interrupted; every process it started has been ended")
        return 130
    return 0


def tell(shop: Workshop, account: Account, options: argparse.Namespace) -> None:
    account.title(
        "Remora",
        "One model on a fleet, changed by shipping small adapters.\n"
        f"Everything happens in {shop.folder}, on loopback.",
    )
    cast = _own(shop, account, options.checkpoint) if options.checkpoint else None
    cast = cast or _trained(shop, account, options.trained)
    facts = Story(shop, account, cast).tell()
    account.summary([*facts, ("whole demo", f"{account.elapsed_s:.0f} s")])


def _trained(shop: Workshop, account: Account, trained: Path | None) -> Cast:
    if trained is not None:
        return world_cast(trained.absolute())
    with account.step("A tiny Qwen3 model and three LoRA adapters are trained, for real"):
        account.quote(shop.run(*_TRAIN, timeout_s=900).stdout)
    return world_cast(shop.folder / "trained")


def _own(shop: Workshop, account: Account, checkpoint: Path) -> Cast:
    checkpoint = checkpoint.absolute()
    if not (checkpoint / "config.json").is_file():
        raise DemoFailed(f"{checkpoint} is no Hugging Face checkpoint: it has no config.json")
    shop.patience_s = 1800.0  # it may be large
    with account.step("Random adapters for your checkpoint, and what transformers + peft answer"):
        account.quote(shop.run(*_REFERENCE, str(checkpoint), "reference").stdout)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", checkpoint.name).strip(".-_")[:64] or "model"
    return reference_cast(checkpoint, shop.folder / "reference", name)


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    """`keep`, which stays, or a temporary folder, which does not."""
    if keep is not None:
        if keep.exists() and any(keep.iterdir()):
            raise DemoFailed(f"{keep} is not empty; name a new folder")
        keep.mkdir(parents=True, exist_ok=True)
        yield keep.absolute()
        return
    folder = Path(tempfile.mkdtemp(prefix="remora-demo-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo",
        description="Trains a tiny model and adapters, and takes them through a whole fleet.",
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        help="a Hugging Face checkpoint directory to use instead of training one",
    )
    parser.add_argument(
        "--trained", type=Path, help="what an earlier `python -m examples.demo.train` wrote"
    )
    parser.add_argument("--keep", type=Path, help="work in this new folder and leave it there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
