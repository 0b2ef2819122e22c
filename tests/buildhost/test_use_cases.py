"""`remora-build use-cases` as a user runs it: QAIRT's YAML in, all adapters converted, YAML out."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from remora_build.cli import build_app
from remora_build.export.exporter import export_checkpoint
from remora_build.export.options import ExportOptions
from remora_contract.adapter import load_adapter
from remora_contract.bundle import verify_files
from remora_contract.errors import (
    AdapterInvalid,
    ArtifactInvalid,
    Conflict,
    DocumentInvalid,
    Incompatible,
    NotFound,
    Refused,
    Unsupported,
    UsageWrong,
)
from remora_contract.release import ReleaseUseCase, WeightedName
from remora_contract.use_case_forms import parse_use_cases
from remora_contract.use_cases import load_use_cases
from tests.buildhost.documents import (
    decoder_spec,
    peft_tensors,
    plain_config,
    write_bundle,
    write_peft,
)
from tests.support.adapters import make_peft_adapter
from tests.support.checkpoints import make_checkpoint

DOCUMENT: dict[str, Any] = {
    "adapter": [
        {"name": "polite", "lora_config": "meta/polite.json"},
        {"name": "terse", "lora_config": "meta/terse.json"},
        {"name": "sql", "lora_config": "meta/sql.json"},
    ],
    "attach_point_onnx_mapping": "base/mapping.json",
    "use-case": [
        {
            "name": "base",
            "adapter_names": [],
            "model_name": "base/base.onnx",
            "quant_overrides": "base/base.encodings",
        },
        {
            "name": "polite+terse",
            "adapter_names": ["polite", "terse"],
            "adapter_alphas": [0.75, -0.25],
            "model_name": "both.onnx",
            "quant_overrides": {"encodings": "both.json"},
        },
        {"name": "sql", "adapter_names": ["sql"], "model_name": "sql.onnx"},
    ],
}
RANKS = {"polite": 2, "terse": 4, "sql": 8}


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def world(tmp_path: Path) -> SimpleNamespace:
    """A bundle, three PEFT adapters of different ranks, and QAIRT's documents for them."""
    decoder = decoder_spec()
    write_bundle(tmp_path / "bundle", decoder, max_bank_rank=12)
    for name, rank in RANKS.items():
        tensors = peft_tensors(decoder, rank=rank)
        write_peft(tmp_path / "peft" / name, plain_config(r=rank), tensors)
        said = {"name": name, "rank": rank, "alpha": 4, "target_modules": ["q_proj", "v_proj"]}
        (tmp_path / "meta").mkdir(exist_ok=True)
        (tmp_path / "meta" / f"{name}.json").write_text(json.dumps(said))
    file = tmp_path / "lora_config.yaml"
    file.write_text(yaml.safe_dump(DOCUMENT))
    return SimpleNamespace(
        root=tmp_path,
        bundle=tmp_path / "bundle",
        peft=tmp_path / "peft",
        file=file,
        decoder=decoder,
    )


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(build_app(), ["use-cases", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def text_of(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return " ".join(result.stdout.split())


def convert(world: SimpleNamespace, *more: object, out: str = "out") -> Any:
    options = ("--base", world.bundle, "--adapters", world.peft)
    return run("convert", world.file, world.root / out, *options, *more)


def rewrite(world: SimpleNamespace, **changes: Any) -> None:
    world.file.write_text(yaml.safe_dump({**DOCUMENT, **changes}))


def test_a_qairt_document_becomes_adapters_and_use_cases(world):
    convert(world)
    document, home = load_use_cases(world.root / "out")
    assert document.release_use_cases() == (
        ReleaseUseCase("base", ()),
        ReleaseUseCase(
            "polite+terse", (WeightedName("polite", 0.75), WeightedName("terse", -0.25))
        ),
        ReleaseUseCase("sql", (WeightedName("sql", 1.0),)),
    )
    for entry in document.adapters:
        adapter = load_adapter(home / str(entry.directory))
        assert (adapter.digest, adapter.rank) == (entry.digest, RANKS[entry.name])
    verify_files(home, document.files)
    assert len(document.files) == 6
    carried = document.use_cases[1]
    assert (carried.quant_overrides, carried.model_name) == (
        {"encodings": "both.json"},
        "both.onnx",
    )
    assert document.attach_point_onnx_mapping == "base/mapping.json"


def test_equal_input_gives_equal_bytes(world):
    convert(world, out="one")
    convert(world, out="two")
    files = sorted(p.relative_to(world.root / "one") for p in (world.root / "one").rglob("*.*"))
    assert len(files) == 7
    for name in files:
        one, two = (world.root / out / name for out in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()


def test_the_table_counts_adapters_ranks_columns_and_what_fits(world):
    answer = json.loads(convert(world, "--json").stdout)
    assert answer["counts_by_use_case"] == {"base": 0, "polite+terse": 2, "sql": 1}
    rows = {row["name"]: row for row in answer["use_cases"]}
    assert [rows[n]["columns"] for n in ("base", "polite+terse", "sql")] == [0, 6, 8]
    assert rows["polite+terse"]["ranks"] == [2, 4]
    sizes = {a["name"]: a["bytes"] for a in answer["adapters"]}
    assert rows["polite+terse"]["bytes"] == sizes["polite"] + sizes["terse"]
    assert all(row["fits"] for row in answer["use_cases"])
    assert (answer["max_bank_rank"], answer["all_adapters_columns"]) == (12, 14)
    shown = text_of("show", world.root / "out", "--base", world.bundle)
    assert "polite 0.75, terse -0.25" in shown
    assert "14 columns, more than the bank" in shown
    assert "the base model alone" in shown


def test_a_document_is_shown_before_it_is_converted(world):
    answer = json.loads(text_of("show", world.file, "--json"))
    assert answer["counts_by_use_case"] == {"base": 0, "polite+terse": 2, "sql": 1}
    assert [row["columns"] for row in answer["use_cases"]] == [0, 6, 8]  # as QAIRT's files say
    assert answer["use_cases"][1]["fits"] is None
    (world.root / "meta" / "sql.json").unlink()
    assert json.loads(text_of("show", world.file, "--json"))["use_cases"][2]["columns"] is None


def test_a_use_case_wider_than_the_bank_is_refused_with_the_rank_it_needs(world):
    wide = {"name": "all", "adapter_names": ["polite", "terse", "sql"]}
    rewrite(world, **{"use-case": [*DOCUMENT["use-case"], wide]})
    with pytest.raises(Refused, match=r"all \(14\).*--max-bank-rank 14"):
        convert(world)
    assert not (world.root / "out").exists()


def test_written_for_qairt_it_says_what_it_said(world):
    convert(world)
    run("to-qairt", world.root / "out", world.root / "back" / "lora_config.yaml")
    back = yaml.safe_load((world.root / "back" / "lora_config.yaml").read_text())
    assert parse_use_cases(back, "back") == parse_use_cases(DOCUMENT, "given")
    assert [p.name for p in (world.root / "back").iterdir()] == ["lora_config.yaml"]
    with pytest.raises(Conflict, match="--force"):
        run("to-qairt", world.root / "out", world.root / "back" / "lora_config.yaml")
    run("to-qairt", world.root / "out", world.root / "back" / "lora_config.yaml", "--force")


def test_adapters_that_never_were_qairts_get_its_adapter_file_and_gaps_are_named(world):
    plain = {
        "adapters": [{"name": n} for n in RANKS],
        "use_cases": [{"name": "both", "adapter_names": ["polite", "sql"]}],
    }
    world.file.write_text(yaml.safe_dump(plain))
    convert(world)
    result = run("to-qairt", world.root / "out", world.root / "back" / "l.yaml")
    for gap in ("attach_point_onnx_mapping", "named base", "model_name (an ONNX graph) of both"):
        assert gap in result.stderr
    said = json.loads((world.root / "back" / "sql.json").read_text())
    assert said == {
        "name": "sql",
        "rank": 8,
        "alpha": 4,
        "target_modules": ["q_proj", "v_proj"],
    }
    back = yaml.safe_load((world.root / "back" / "l.yaml").read_text())
    assert back["adapter"][2] == {"name": "sql", "lora_config": "sql.json"}
    # And it is what QAIRT's own documents are: it converts to the same adapters.
    answer = run(
        "convert", world.root / "back" / "l.yaml", world.root / "again", "--json",
        "--base", world.bundle, "--adapters", world.peft,
    )  # fmt: skip
    assert json.loads(answer.stdout)["notes"] == []
    first, again = (load_use_cases(world.root / out)[0] for out in ("out", "again"))
    assert [a.digest for a in first.adapters] == [a.digest for a in again.adapters]


def test_an_adapter_that_qairts_file_cannot_describe_is_refused_by_what_it_has(world):
    config = plain_config(r=4, use_rslora=True)
    write_peft(world.peft / "terse", config, peft_tensors(world.decoder, rank=4))
    plain = {
        "adapter": [{"name": "terse"}],
        "use-case": [{"name": "u", "adapter_names": ["terse"]}],
    }
    world.file.write_text(yaml.safe_dump(plain))
    convert(world)
    with pytest.raises(Refused, match="adapter terse has use_rslora"):
        run("to-qairt", world.root / "out", world.root / "l.yaml")
    assert not list(world.root.glob("*l.yaml*"))
    with pytest.raises(Refused, match="convert first"):
        run("to-qairt", world.file, world.root / "l.yaml")
    with pytest.raises(UsageWrong, match=r"\.yaml"):
        run("to-qairt", world.root / "out", world.root / "l.json")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rank": 4}, r"meta/polite.json says rank '4', the adapter has 2"),
        ({"alpha": 8}, r"says alpha '8', the adapter has 4"),
        ({"name": "rude"}, r"says name 'rude', the adapter has polite"),
    ],
)
def test_an_adapter_that_is_not_the_one_qairt_describes_is_refused(world, change, said):
    path = world.root / "meta" / "polite.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(AdapterInvalid, match=said):
        convert(world)
    assert not (world.root / "out").exists()


def test_a_missing_description_is_told_and_not_an_error(world):
    (world.root / "meta" / "sql.json").unlink()
    answer = json.loads(convert(world, "--json").stdout)
    assert answer["notes"] == [
        "sql: meta/sql.json is not there; its rank and alpha are not compared"
    ]


def test_adapters_are_found_by_option_by_folder_or_where_the_document_says(world):
    moved = world.root / "elsewhere"
    (world.peft / "sql").rename(moved)
    with pytest.raises(NotFound, match="adapter polite: nothing says where it lies"):
        run("convert", world.file, world.root / "out", "--base", world.bundle)
    with pytest.raises(NotFound, match=r"adapter sql: .*there: polite, terse.*--adapter NAME=DIR"):
        convert(world)
    convert(world, "--adapter", f"sql={moved}", out="by-option")
    entries = [{"name": "polite", "lora_config": "peft/polite/adapter_config.json"}]
    entries += [{"name": "terse", "lora_config": "peft/terse"}]
    entries += [{"name": "sql", "directory": "elsewhere"}]
    rewrite(world, adapter=entries)
    run("convert", world.file, world.root / "by-document", "--base", world.bundle)
    one, two = (load_use_cases(world.root / o)[0] for o in ("by-option", "by-document"))
    assert [a.digest for a in one.adapters] == [a.digest for a in two.adapters]


def test_adapters_that_are_converted_already_are_taken_as_they_are(world):
    convert(world)
    document, home = load_use_cases(world.root / "out")
    run("convert", world.root / "out", world.root / "again", "--base", world.bundle)
    again, _ = load_use_cases(world.root / "again")
    assert [a.digest for a in again.adapters] == [a.digest for a in document.adapters]
    verify_files(world.root / "again", again.files)
    with pytest.raises(AdapterInvalid, match="--dtype"):
        run(
            "convert", world.root / "out", world.root / "third", "--base", world.bundle,
            "--dtype", "float16",
        )  # fmt: skip
    weights = home / "adapters" / "sql" / "adapter.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    with pytest.raises(ArtifactInvalid, match="damaged"):
        run("convert", world.root / "out", world.root / "third", "--base", world.bundle)


def test_a_digest_in_the_document_pins_the_adapter(world):
    convert(world)
    pinned = load_use_cases(world.root / "out")[0].adapters[0].digest
    for name, ok in (("polite", True), ("terse", False)):
        entry = {"name": name, "digest": pinned}
        use_case = {"name": "u", "adapter_names": [name]}
        world.file.write_text(yaml.safe_dump({"adapter": [entry], "use-case": [use_case]}))
        if ok:
            convert(world, out="pinned")
        else:
            with pytest.raises(AdapterInvalid, match="the document says"):
                convert(world, out="other")


def test_an_adapter_changed_after_it_was_converted_is_not_shown_as_it_was(world):
    convert(world)
    adapters = world.root / "out" / "adapters"
    (adapters / "sql" / "adapter.json").write_bytes((adapters / "terse/adapter.json").read_bytes())
    with pytest.raises(ArtifactInvalid, match="convert again"):
        run("show", world.root / "out")


def test_a_bundle_of_another_base_is_refused(world):
    convert(world)
    other = decoder_spec(layers=1)
    write_bundle(world.root / "other", other, max_bank_rank=12)
    with pytest.raises(Incompatible, match="adapter_layer"):
        run("show", world.root / "out", "--base", world.root / "other")
    with pytest.raises(AdapterInvalid, match="another base"):
        run(
            "convert", world.file, world.root / "no", "--base", world.root / "other",
            "--adapters", world.peft,
        )  # fmt: skip
    assert not (world.root / "no").exists()


def test_force_replaces_only_what_this_command_wrote(world):
    convert(world)
    with pytest.raises(Conflict, match="--force"):
        convert(world)
    convert(world, "--force")
    (world.root / "out" / "mine.txt").write_text("mine")
    with pytest.raises(Conflict, match=r"mine\.txt"):
        convert(world, "--force")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--adapter", "sql"], "give NAME=DIR"),
        (["--adapter", "sql=a", "--adapter", "sql=b"], "given twice"),
        (["--adapter", "zzz=peft"], "names no such adapter"),
    ],
)
def test_options_that_mean_nothing_are_wrong_usage(world, options, said):
    with pytest.raises(UsageWrong, match=said):
        convert(world, *options)


def test_what_an_adapter_asks_for_and_cannot_have_is_refused_by_name(world):
    config = plain_config(r=8, peft_type="LOHA")
    write_peft(world.peft / "sql", config, peft_tensors(world.decoder, rank=8))
    with pytest.raises(Unsupported, match="peft_type"):
        convert(world)
    assert not (world.root / "out").exists()
    assert not list(world.root.glob(".out*"))


def test_inspect_says_which_command_explains_it(world):
    convert(world)
    result = CliRunner().invoke(build_app(), ["inspect", str(world.root / "out")])
    assert "remora-build use-cases show" in str(result.exception)


def test_a_document_that_is_no_yaml_is_refused_with_its_place(world):
    world.file.write_text("adapter: [{name: a, name: b}]")
    with pytest.raises(DocumentInvalid, match=r"lora_config\.yaml: line 1: key 'name' is there"):
        convert(world)


def test_a_use_case_that_composes_dora_is_refused(tmp_path: Path) -> None:
    """No engine would answer it: DoRA's norms hold for its own weights alone."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", "qwen3")
    options = ExportOptions(golden=False, max_context=32, dora=True)
    export_checkpoint(checkpoint, tmp_path / "bundle", options)
    for name in ("plain", "dora"):
        chosen = {"target_modules": ["q_proj"], "use_dora": name == "dora"}
        make_peft_adapter(checkpoint, tmp_path / "peft" / name, seed=1, **chosen)

    def outcome(names: list[str], alphas: list[float]) -> str:
        case = {"name": "case", "adapter_names": names, "adapter_alphas": alphas}
        adapters = [{"name": n, "lora_config": "-"} for n in names]
        file = tmp_path / "lora_config.yaml"
        file.write_text(yaml.safe_dump({"adapter": adapters, "use-case": [case]}))
        where = ("--base", tmp_path / "bundle", "--adapters", tmp_path / "peft")
        return run("convert", file, tmp_path / "out", *where, "--force").stdout

    for names, alphas in ((["dora"], [0.5]), (["dora", "plain"], [1.0, 1.0])):
        with pytest.raises(Refused, match="use case case: dora is a DoRA adapter"):
            outcome(names, alphas)
        assert not (tmp_path / "out").exists()
    assert outcome(["dora"], [1.0])
