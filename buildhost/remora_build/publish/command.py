"""`remora-build publish`."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path

import typer

HELP = """Publish a bundle, an adapter or a built engine into a repository folder.

Files are cut into content-addressed chunks, so a new revision adds only what changed. A published
revision of a name never changes. Interrupted, it continues where it stopped when run again.
"""


def register(app: typer.Typer) -> None:
    app.command("publish", help=HELP)(publish)


def publish(
    artifact: Path = typer.Argument(
        help="Bundle, adapter or engine directory.", exists=True, file_okay=False
    ),
    repository: Path = typer.Argument(help="Repository folder; made when it does not exist."),
    name: str | None = typer.Option(
        None, "--name", help="Name to publish under (default: the directory's name)."
    ),
    revision: str | None = typer.Option(
        None, "--revision", help="Revision of the name (default: 12 digits of the digest)."
    ),
    json: bool = typer.Option(False, "--json", help="Print a JSON object instead of text."),
) -> None:
    from remora_build.inspect.render import show
    from remora_build.inspect.repository import describe_published
    from remora_build.publish.publisher import publish as run
    from remora_build.publish.store import LocalStore

    store = LocalStore(repository)
    report = run(artifact, store, name=name, revision=revision, now=datetime.now(timezone.utc))
    show(describe_published(report), as_json=json)
