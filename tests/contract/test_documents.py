"""Bundles, adapters, manifests and releases: identities, safe paths, refusals."""

import os
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remora_contract.adapter import FORMAT_VERSION as ADAPTER_FORMAT
from remora_contract.adapter import Adapter, TargetRank
from remora_contract.artifact import ArtifactFile, Chunk, Manifest, chunk_key, name_key
from remora_contract.bundle import (
    FORMAT_VERSION,
    Bundle,
    BundleFile,
    GraphSpec,
    SourceInfo,
    check_relative,
    read_document,
    verify_files,
)
from remora_contract.compat import adapter_refusals
from remora_contract.decoder import DecoderSpec, RopeSpec
from remora_contract.digests import canonical_json, check_digest, digest_bytes, digest_document
from remora_contract.errors import ArtifactInvalid, DocumentInvalid
from remora_contract.join_token import JoinToken
from remora_contract.release import Release, ReleaseAdapter, ReleaseUseCase, WeightedName
from remora_contract.strict import parse, plain

BASE = digest_bytes(b"base")


def a_bundle(**changes):
    decoder = DecoderSpec("qwen3", 2, 64, 4, 2, 16, 96, 320, 1e-6, RopeSpec(1e4))
    bundle = Bundle(
        FORMAT_VERSION,
        BASE,
        decoder,
        GraphSpec("native", "float16", 128, 16, 24),
        (BundleFile("model.onnx", 3, digest_bytes(b"abc")),),
        (1,),
        None,
        None,
        SourceInfo("tiny", "qwen3", "float32"),
        "remora test",
    )
    return replace(bundle, **changes)


def an_adapter(**changes):
    adapter = Adapter(
        ADAPTER_FORMAT,
        BASE,
        "float16",
        (TargetRank(0, "q", 8, 2.0), TargetRank(1, "v", 4, 2.0)),
        (BundleFile("adapter.safetensors", 3, digest_bytes(b"abc")),),
        {},
        "remora test",
    )
    return replace(adapter, **changes)


def test_a_bundle_round_trips_with_its_digest():
    bundle = a_bundle()
    assert parse(Bundle, plain(bundle), "t").digest == bundle.digest
    assert a_bundle(eos_token_ids=(2,)).digest != bundle.digest


def test_another_format_version_says_what_to_do():
    with pytest.raises(DocumentInvalid, match="export the checkpoint again"):
        parse(Bundle, plain(a_bundle()) | {"format_version": FORMAT_VERSION + 1}, "bundle.json")


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../x", "a/../b", "a//b", "", ".", "a\\b", "a\0b", "a/."]
)
def test_a_path_that_could_leave_the_directory_is_refused(path):
    with pytest.raises(DocumentInvalid, match="unsafe path"):
        check_relative(path)


@pytest.mark.parametrize(
    "digest",
    ["sha256:../../etc", "sha256:" + "A" * 64, "md5:" + "0" * 64, "sha256:" + "0" * 64 + "\n"],
)
def test_a_digest_that_could_become_another_path_is_refused(digest):
    with pytest.raises(DocumentInvalid):
        check_digest(digest)
    with pytest.raises(DocumentInvalid):
        chunk_key(digest)


def test_a_truncated_and_a_damaged_file_are_told_apart(tmp_path):
    files = (BundleFile("f", 3, digest_bytes(b"abc")),)
    with pytest.raises(ArtifactInvalid, match="missing"):
        verify_files(tmp_path, files)
    (tmp_path / "f").write_bytes(b"ab")
    with pytest.raises(ArtifactInvalid, match="truncated"):
        verify_files(tmp_path, files)
    (tmp_path / "f").write_bytes(b"abd")
    with pytest.raises(ArtifactInvalid, match="damaged"):
        verify_files(tmp_path, files)
    (tmp_path / "f").write_bytes(b"abc")
    verify_files(tmp_path, files)


def test_an_adapter_knows_its_ranks():
    adapter = an_adapter()
    assert (adapter.rank, adapter.rank_of("q"), adapter.rank_of("k")) == (8, 8, 0)
    assert adapter.projections() == ("q", "v")
    with pytest.raises(ValueError, match="listed twice"):
        an_adapter(targets=(TargetRank(0, "q", 8, 1.0), TargetRank(0, "q", 4, 1.0)))


def test_compatibility_answers_with_all_refusals_at_once():
    bundle = a_bundle()
    assert adapter_refusals(bundle, an_adapter()) == []
    wrong = an_adapter(base_digest=digest_bytes(b"other"), targets=(TargetRank(7, "q", 17, 1.0),))
    assert [r.code for r in adapter_refusals(bundle, wrong)] == [
        "adapter_base",
        "adapter_rank",
        "adapter_layer",
    ]


def test_a_manifest_whose_chunks_do_not_add_up_is_refused():
    chunk = Chunk(digest_bytes(b"abc"), 3)
    with pytest.raises(ValueError, match="do not add up"):
        ArtifactFile("f", 4, BASE, (chunk,))
    with pytest.raises(ValueError, match="outside"):
        Chunk(BASE, 1 << 30)
    manifest = Manifest(
        1,
        "adapter",
        BASE,
        "a",
        "r1",
        BASE,
        (ArtifactFile("f", 6, BASE, (chunk, chunk)),),
        "2026-01-01T00:00:00Z",
    )
    assert parse(Manifest, plain(manifest), "t") == manifest
    assert manifest.chunks() == {chunk.digest: 3}


@pytest.mark.parametrize("name", ["", ".x", "a/b", "a b", "x" * 129, "ä"])
def test_names_that_cannot_be_file_names_are_refused(name):
    with pytest.raises(DocumentInvalid):
        name_key("bundle", name, "r")


def test_a_release_is_identified_by_what_it_says():
    release = Release(
        1,
        "r",
        BASE,
        (ReleaseAdapter("a", "1", BASE),),
        (ReleaseUseCase("u", (WeightedName("a", 0.5),)),),
    )
    assert release.release_id.startswith("r-")
    assert (
        replace(release, adapters=(ReleaseAdapter("a", "2", BASE),)).release_id
        != release.release_id
    )
    with pytest.raises(ValueError, match="unknown adapter b"):
        replace(release, use_cases=(ReleaseUseCase("u", (WeightedName("b"),)),))


@given(st.dictionaries(st.text(), st.integers()))
def test_canonical_json_does_not_depend_on_order(table):
    assert canonical_json(dict(reversed(table.items()))) == canonical_json(table)


def test_a_number_that_json_lacks_has_no_digest():
    with pytest.raises(ValueError):
        digest_document({"x": float("nan")})


def test_a_join_token_round_trips_and_is_never_echoed():
    token = JoinToken("s" * 43, "0" * 64)
    assert JoinToken.decode(token.encode() + "\n") == token
    with pytest.raises(DocumentInvalid) as caught:
        JoinToken.decode("remora-join-1.secretsecretsecretsecret.zz")
    assert "secretsecret" not in str(caught.value)


HOSTILE = ("../up", "/etc/passwd", "a/../b", "", "a\\b")


@pytest.mark.parametrize("path", HOSTILE)
def test_an_adapters_files_never_lie_outside_it(path):
    listed = [{"path": "adapter.safetensors", "size": 0, "digest": BASE}]
    listed.append({"path": path, "size": 0, "digest": BASE})
    document = plain(an_adapter()) | {"files": listed}
    with pytest.raises(DocumentInvalid, match=r"adapter\.json: files\[1\]"):
        parse(Adapter, document, "adapter.json")


@pytest.mark.parametrize("make", [a_bundle, an_adapter])
def test_a_file_is_listed_once_and_the_main_one_is_listed(make):
    files = make().files
    with pytest.raises(ValueError, match="twice"):
        make(files=files * 2)
    with pytest.raises(ValueError, match="not among its files"):
        make(files=())


@pytest.mark.parametrize(
    "change", [{"layers": 10**9}, {"layers": 0}, {"hidden": -1}, {"heads": 0}, {"vocab": 1 << 40}]
)
def test_a_decoders_numbers_are_bounded_before_anybody_computes_with_them(change):
    document = plain(a_bundle())
    document["decoder"] |= change
    with pytest.raises(DocumentInvalid, match=next(iter(change))):
        parse(Bundle, document, "bundle.json")


@pytest.mark.parametrize(
    "change",
    [
        {"context": 0},
        {"context": 1 << 40},
        {"max_bank_rank": -5},
        {"quant": {"kind": "int4"}},
        {"quant": {"kind": "none", "block": 32}},
        {"quant": {"kind": "int4", "block": 0}},
    ],
)
def test_a_graphs_numbers_are_bounded_and_agree(change):
    document = plain(a_bundle())
    document["graph"] |= change
    with pytest.raises(DocumentInvalid, match=r"bundle\.json: graph"):
        parse(Bundle, document, "bundle.json")


@pytest.mark.parametrize("change", [{"rank": 1 << 40}, {"rank": 0}, {"layer": 10**9}])
def test_an_adapters_numbers_are_bounded(change):
    document = plain(an_adapter())
    document["targets"][0] |= change
    with pytest.raises(DocumentInvalid, match=r"targets\[0\]"):
        parse(Adapter, document, "adapter.json")


def test_a_file_that_cannot_be_looked_at_is_an_artifact_error(tmp_path):
    listed = (BundleFile("x" * 300, 3, BASE),)  # longer than any file system's names
    with pytest.raises(ArtifactInvalid, match="cannot be read"):
        verify_files(tmp_path, listed)


def test_a_pipe_is_no_document(tmp_path):
    os.mkfifo(tmp_path / "bundle.json")
    with pytest.raises(ArtifactInvalid, match="no file"):
        read_document(tmp_path / "bundle.json")
