"""`remora releases`: what devices can be told to run."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from remora_contract.digests import canonical_json, short
from remora_contract.errors import DocumentInvalid, NotFound, UsageWrong
from remora_contract.release import Release
from remora_contract.strict import loads
from remora_contract.use_cases import (
    MAX_DOCUMENT_BYTES,
    USE_CASES_JSON,
    UseCaseDocument,
    only_for_qairt,
)
from remora_controller.operator_cli import completion, render
from remora_controller.operator_cli.alone import is_alone
from remora_controller.operator_cli.release_document import (
    ReleaseFile,
    from_flags,
    read_release_file,
    read_use_cases,
    to_release,
)
from remora_controller.operator_cli.session import Session, connect
from remora_protos.operator.v1 import operator_pb2 as pb

app = typer.Typer(help="Create and list releases.")
ReleaseName = Annotated[
    str,
    typer.Argument(
        help="A release id, or a name for its newest.", autocompletion=completion.releases
    ),
]


def register(root: typer.Typer) -> None:
    root.add_typer(app, name="releases")


@app.callback(invoke_without_command=True)
def releases(context: typer.Context, as_json: render.Json = None) -> None:
    """Create and list releases. Alone: list them."""
    if is_alone(context, as_json):
        list_(context, as_json)


@app.command()
def create(
    context: typer.Context,
    name: Annotated[
        str | None, typer.Option(help="Name of the release.", show_default=False)
    ] = None,
    bundle: Annotated[
        str | None,
        typer.Option(help="Bundle: NAME, NAME@REVISION or digest.", show_default=False),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="NAME=REF, an adapter by the name requests use; repeat for more."),
    ] = None,
    use_case: Annotated[
        list[str] | None,
        typer.Option(help="NAME=A:0.7,B:0.3, adapters with weights under one name; repeat."),
    ] = None,
    use_cases: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="QAIRT's lora_config.yaml, or what `remora-build use-cases convert` wrote: its "
            "use cases, and its adapters where --adapter does not say otherwise.",
            show_default=False,
        ),
    ] = None,
    engine: Annotated[
        list[str] | None,
        typer.Option(
            help="Engine built elsewhere: NAME, NAME@REVISION or digest; devices whose build key "
            "it has do not build. Repeat for more."
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            help="release.yaml with name, bundle, quant, adapters, use_cases, experiments, "
            "engines, sampling, constraints, gates, windows; instead of the options above.",
            show_default=False,
        ),
    ] = None,
    as_json: render.Json = None,
) -> None:
    """Create a release. References are resolved to digests now and stay so."""
    wanted = _wanted(name, bundle, adapter or [], use_case or [], use_cases, engine or [], file)
    session = connect(context)
    made = create_release(session, to_release(wanted, list_artifacts(session)))
    if as_json is not None:
        render.print_data(render.plain(made), as_json)
    else:
        render.console().print(f"created release {made.release_id}")


def _wanted(
    name: str | None,
    bundle: str | None,
    adapters: list[str],
    use_cases: list[str],
    use_case_file: Path | None,
    engines: list[str],
    file: Path | None,
) -> ReleaseFile:
    if file is None:
        if name is None or bundle is None:
            raise UsageWrong("give --name and --bundle, or --file release.yaml")
        document = None if use_case_file is None else _use_cases(use_case_file)
        made = from_flags(name, bundle, adapters, use_cases, document)
        return replace(made, engines=tuple(engines))
    if name or bundle or adapters or use_cases or use_case_file or engines:
        raise UsageWrong("--file says everything: leave the other options out")
    return read_release_file(_read(file), str(file))


def _use_cases(path: Path) -> UseCaseDocument:
    file = path / USE_CASES_JSON if path.is_dir() else path
    document = read_use_cases(_read(file), str(file))
    for what in only_for_qairt(document):
        typer.echo(f"not in the release, only QAIRT reads it: {what}", err=True)
    return document


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as f:
            data = f.read(MAX_DOCUMENT_BYTES + 1)
    except OSError as e:
        raise NotFound(f"{path} cannot be read: {e.strerror or e}") from e
    if len(data) > MAX_DOCUMENT_BYTES:
        raise DocumentInvalid(f"{path}: larger than {MAX_DOCUMENT_BYTES >> 20} MiB")
    return data


@app.command("list")
def list_(context: typer.Context, as_json: render.Json = None) -> None:
    """List releases, newest first."""
    session = connect(context)
    found = session.call(session.stub.ListReleases, pb.ListReleasesRequest()).releases
    if as_json is not None:
        render.print_data(render.plain(found), as_json)
        return
    now = time.time()
    rows = []
    for info in found:
        document = release_of(info)
        adapters = ", ".join(f"{a.name}@{a.revision}" for a in document.adapters) or "-"
        engines = ", ".join(map(short, document.engines or ())) or "-"
        created = render.ago(info.created_at_unix_s, now)
        names = (info.release_id, short(document.bundle), adapters, engines)
        rows.append((*names, created, info.created_by))
    columns = ("RELEASE", "BUNDLE", "ADAPTERS", "ENGINES", "CREATED", "BY")
    render.console().print(render.table(columns, rows))


@app.command()
def show(
    context: typer.Context,
    release: ReleaseName,
    as_json: render.Json = True,
) -> None:
    """Show a release's document, as JSON if nothing else is asked for."""
    render.print_data(render.plain(find_release(connect(context), release)), as_json is not False)


@app.command()
def diff(
    context: typer.Context,
    before: ReleaseName,
    after: Annotated[
        str,
        typer.Argument(help="The release to compare it with.", autocompletion=completion.releases),
    ],
    as_json: render.Json = None,
) -> None:
    """Show what differs between two releases, artifact by artifact and rule by rule."""
    session = connect(context)
    request = pb.DiffReleasesRequest(before=before, after=after)
    found = session.call(session.stub.DiffReleases, request).differences
    if as_json is not None:
        render.print_data(render.plain(found), as_json)
        return
    if not found:
        render.console().print("no difference")
        return
    rows = [(d.path, d.before or "-", d.after or "-") for d in found]
    render.console().print(render.table(("WHAT", "BEFORE", "AFTER"), rows))


def create_release(session: Session, release: Release) -> pb.ReleaseInfo:
    request = pb.CreateReleaseRequest(release_json=canonical_json(release))
    made: pb.ReleaseInfo = session.call(session.stub.CreateRelease, request)
    return made


def list_artifacts(session: Session, kind: str = "") -> list[pb.Artifact]:
    """Newest first."""
    request = pb.ListArtifactsRequest(kind=kind)
    return list(session.call(session.stub.ListArtifacts, request).artifacts)


def find_release(session: Session, name_or_id: str) -> pb.ReleaseInfo:
    """By id, else the newest of that name. Raises NotFound."""
    answer: pb.ListReleasesResponse = session.call(
        session.stub.ListReleases, pb.ListReleasesRequest()
    )
    by_id = [info for info in answer.releases if info.release_id == name_or_id]
    by_name = [info for info in answer.releases if info.name == name_or_id]
    for info in [*by_id, *by_name]:
        return info
    raise NotFound(f"no release {name_or_id}; see `remora releases list`")


def release_of(info: pb.ReleaseInfo) -> Release:
    return loads(Release, info.release_json, info.release_id)
