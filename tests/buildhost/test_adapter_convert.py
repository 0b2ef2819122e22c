"""What the converter binds, and what it refuses: each refusal names the thing."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from remora_build.adapters import budget
from remora_build.adapters.convert import convert_adapter
from remora_build.adapters.matching import module_path, target_of
from remora_contract.adapter import ADAPTER_JSON, WEIGHTS_FILE, Adapter, load_adapter
from remora_contract.errors import (
    AdapterInvalid,
    ArtifactInvalid,
    Conflict,
    DocumentInvalid,
    Exhausted,
    Refused,
    Unsupported,
)
from remora_contract.targets import PROJECTIONS, AdapterTarget
from tests.buildhost.documents import (
    decoder_spec,
    peft_tensors,
    plain_config,
    write_bundle,
    write_peft,
)

STEM = "base_model.model.model.layers.1.self_attn.q_proj"
Tensors = dict[str, np.ndarray]


@pytest.fixture
def convert(tmp_path: Path) -> Callable[..., Adapter]:
    """Converts the given config and tensors for a small base into tmp_path/out."""
    decoder = decoder_spec()
    write_bundle(tmp_path / "base", decoder)

    def run(config: Any = None, tensors: Tensors | None = None, **options: Any) -> Adapter:
        config = plain_config() if config is None else config
        tensors = peft_tensors(decoder) if tensors is None else tensors
        peft_dir = write_peft(tmp_path / "peft", config, tensors)
        return convert_adapter(peft_dir, tmp_path / "out", base=tmp_path / "base", **options)

    return run


def changed(**changes: Any) -> Tensors:
    """The tensors of a good adapter with some replaced (None: taken away)."""
    tensors: dict[str, Any] = peft_tensors(decoder_spec()) | changes
    return {name: value for name, value in tensors.items() if value is not None}


@given(st.integers(0, 999_999), st.sampled_from(PROJECTIONS))
def test_module_paths_have_an_inverse(layer: int, projection: Any) -> None:
    target = AdapterTarget(layer, projection)
    assert target_of(module_path(target)) == target


@given(st.text())
def test_any_other_path_is_no_target(text: str) -> None:
    target = target_of(text)
    assert target is None or module_path(target) == text


def test_equal_input_gives_equal_bytes(convert: Callable[..., Adapter], tmp_path: Path) -> None:
    first = convert()
    written = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    second = convert(replace=True)

    assert first.digest == second.digest
    assert written == {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert set(written) == {ADAPTER_JSON, WEIGHTS_FILE}


def test_the_scale_is_folded_before_the_cast(
    convert: Callable[..., Adapter], tmp_path: Path
) -> None:
    """In float16 first, 3e-5 would be subnormal and lose digits that scaling cannot restore."""
    small = np.full((32, 2), 3.0001e-5, np.float32)
    config = plain_config(lora_alpha=2048)

    convert(config, changed(**{f"{STEM}.lora_B.weight": small}), dtype="float16")

    b = load_file(tmp_path / "out" / WEIGHTS_FILE)["layers.1.q.b"]
    assert b.dtype == np.float16
    assert np.array_equal(b, (small.T * np.float32(1024)).astype(np.float16))


def test_the_dtype_is_the_bundles_unless_given(convert: Callable[..., Adapter]) -> None:
    assert convert().dtype == "float32"
    assert convert(dtype="float16", replace=True).dtype == "float16"


@pytest.mark.parametrize("part", ["A", "B"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_is_refused_with_its_tensor(
    convert: Callable[..., Adapter], part: str, value: float, tmp_path: Path
) -> None:
    name = f"{STEM}.lora_{part}.weight"
    bad = peft_tensors(decoder_spec())[name]
    bad[0, 1] = value

    with pytest.raises(AdapterInvalid, match=f"{name}.*NaN or infinity"):
        convert(tensors=changed(**{name: bad}))
    assert not (tmp_path / "out").exists()


def test_what_float16_cannot_hold_is_refused_with_the_way_out(
    convert: Callable[..., Adapter],
) -> None:
    large = changed(**{f"{STEM}.lora_B.weight": np.full((32, 2), 40_000, np.float32)})

    with pytest.raises(AdapterInvalid, match=r"layers\.1\.q\.b reaches 8e\+04.*--dtype float32"):
        convert(tensors=large, dtype="float16")
    assert convert(tensors=large, dtype="float32").rank == 2


def test_what_scaling_takes_out_of_float32_is_refused(convert: Callable[..., Adapter]) -> None:
    large = changed(**{f"{STEM}.lora_B.weight": np.full((32, 2), 1e38, np.float32)})
    with pytest.raises(AdapterInvalid, match=r"lora_B.*leaves float32"):
        convert(plain_config(lora_alpha=64), large)


@pytest.mark.parametrize(
    ("name", "shape", "error", "what"),
    [
        (f"{STEM}.lora_magnitude_vector", (32,), AdapterInvalid, "use_dora"),
        (f"{STEM}.lora_B.bias", (32,), AdapterInvalid, "lora_bias"),
        (f"{STEM}.lora_diag.weight", (2,), Unsupported, "KaSA"),
        (f"{STEM}.lora_embedding_A", (2, 32), AdapterInvalid, "target_modules"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", (2, 64), AdapterInvalid, "select"),
        ("base_model.model.lm_head.lora_A.weight", (2, 32), AdapterInvalid, "does not select"),
        ("base_model.model.model.norm.weight", (32,), Unsupported, "modules_to_save.*merge"),
        ("base_model.model.score.modules_to_save.weight", (2, 32), Unsupported, "modules_to_save"),
        (f"{STEM}.base_layer.weight", (32, 32), Unsupported, "modules_to_save.*merge"),
        (f"{STEM}.base_layer.bias", (32,), AdapterInvalid, "trained bias, and the config says"),
        (f"{STEM}.token_adapter.trainable_tokens_delta", (1, 32), AdapterInvalid, "not name"),
    ],
)
def test_a_tensor_of_a_feature_the_config_does_not_say_is_refused(
    convert: Callable[..., Adapter], name: str, shape: Any, error: Any, what: str
) -> None:
    with pytest.raises(error, match=what) as raised:
        convert(tensors=changed(**{name: np.zeros(shape, np.float32)}))
    assert name.split(".lora_")[0].removeprefix("base_model.model.") in str(raised.value)


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.layers.1.self_attn.qkv_proj.lora_A.weight",
        "base_model.model.layers.1.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.layers.01.self_attn.q_proj.lora_A.weight",
        f"{STEM}.lora_A.default.weight",
        "garbage",
    ],
)
def test_a_tensor_that_cannot_be_bound_is_an_error(
    convert: Callable[..., Adapter], name: str, tmp_path: Path
) -> None:
    with pytest.raises(AdapterInvalid, match="cannot be bound") as error:
        convert(tensors=changed(**{name: np.zeros((2, 32), np.float32)}))
    assert name in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["A", "B"])
def test_a_selected_module_without_its_tensor_is_an_error(
    convert: Callable[..., Adapter], part: str
) -> None:
    with pytest.raises(AdapterInvalid, match=rf"missing: .*1\.self_attn\.q_proj\.lora_{part}"):
        convert(tensors=changed(**{f"{STEM}.lora_{part}.weight": None}))


def test_modules_the_config_selects_must_all_be_there(convert: Callable[..., Adapter]) -> None:
    with pytest.raises(AdapterInvalid, match=r"missing: .* and 16 more"):
        convert(plain_config(target_modules="all-linear"))


def test_tensors_the_config_does_not_select_are_an_error(convert: Callable[..., Adapter]) -> None:
    with pytest.raises(AdapterInvalid, match=r"does not select: .*layers\.0\.self_attn\.v_proj"):
        convert(plain_config(target_modules=["q_proj"]))


def test_a_config_that_selects_nothing_is_an_error(convert: Callable[..., Adapter]) -> None:
    with pytest.raises(AdapterInvalid, match="selects no projection"):
        convert(plain_config(target_modules=["c_attn"]), {})


@pytest.mark.parametrize("pattern", ["(q_proj", "*q_proj"])
def test_a_broken_pattern_is_shown(convert: Callable[..., Adapter], pattern: str) -> None:
    with pytest.raises(AdapterInvalid, match="no regular expression"):
        convert(plain_config(target_modules=pattern))
    with pytest.raises(AdapterInvalid, match="no regular expression"):
        convert(plain_config(rank_pattern={pattern: 2}))


@pytest.mark.parametrize("thread", ["main", "another"])
@pytest.mark.parametrize("field", ["target_modules", "rank_pattern"])
def test_a_pattern_that_never_ends_is_an_error(
    convert: Callable[..., Adapter], field: str, thread: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "MATCHING_S", 0.3)
    started, start = [], budget._start
    monkeypatch.setattr(budget, "_start", lambda: started.append(start()) or started[-1])
    pattern = r"((([a-z_.0-9]+)+)+)+!"
    config = plain_config(**{field: pattern if field == "target_modules" else {pattern: 3}})

    def check() -> None:
        with pytest.raises(AdapterInvalid, match=r"need more than 0\.3 s"):
            convert(config)

    if thread == "main":
        check()
    else:  # Python tells signals to the main thread alone, and matches cannot be interrupted
        with ThreadPoolExecutor(1) as pool:
            pool.submit(check).result()
    assert [p.returncode for p in started] == [-signal.SIGVTALRM]


def test_a_rank_the_config_does_not_say_is_an_error(convert: Callable[..., Adapter]) -> None:
    with pytest.raises(AdapterInvalid, match=r"has rank 2, the config says 4"):
        convert(plain_config(r=4))
    with pytest.raises(AdapterInvalid, match=r"layers\.1.*q_proj.* rank 2, the config says 3"):
        convert(plain_config(rank_pattern={r"layers\.1\.self_attn\.q_proj": 3}))


def test_factors_are_never_transposed_to_fit(convert: Callable[..., Adapter]) -> None:
    name = f"{STEM}.lora_A.weight"
    turned = np.ascontiguousarray(peft_tensors(decoder_spec())[name].T)
    with pytest.raises(AdapterInvalid, match=rf"{name} is \[32, 2\], this base needs \[2, 32\]"):
        convert(tensors=changed(**{name: turned}))


@pytest.mark.parametrize("difference", [{"hidden": 64}, {"kv_heads": 4}, {"layers": 3}])
def test_an_adapter_for_another_base_is_recognised(
    convert: Callable[..., Adapter], difference: dict[str, int]
) -> None:
    other = peft_tensors(decoder_spec(**difference))
    with pytest.raises(AdapterInvalid, match=r"another base \(its config says 'somewhere/base'\)"):
        convert(tensors=other)


def test_a_shallower_adapter_lacks_layers_of_this_base(convert: Callable[..., Adapter]) -> None:
    with pytest.raises(AdapterInvalid, match=r"missing: model\.layers\.1"):
        convert(tensors=peft_tensors(decoder_spec(layers=1)))


def test_more_rank_than_the_bank_is_refused(tmp_path: Path) -> None:
    peft_dir = write_peft(tmp_path / "peft", plain_config(), peft_tensors(decoder_spec()))
    write_bundle(tmp_path / "narrow", decoder_spec(), max_bank_rank=1)
    write_bundle(tmp_path / "none", decoder_spec(), max_bank_rank=0)
    write_bundle(tmp_path / "exact", decoder_spec(), max_bank_rank=2)

    with pytest.raises(Refused, match=r"rank 2, the bundle's bank holds 1.*--max-bank-rank"):
        convert_adapter(peft_dir, tmp_path / "out", base=tmp_path / "narrow")
    with pytest.raises(Refused, match="takes no adapters"):
        convert_adapter(peft_dir, tmp_path / "out", base=tmp_path / "none")
    assert convert_adapter(peft_dir, tmp_path / "out", base=tmp_path / "exact").rank == 2


def test_pickled_weights_give_the_same_adapter_as_safetensors(
    convert: Callable[..., Adapter], tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file

    adapter = convert()
    plain = tmp_path / "peft" / "adapter_model.safetensors"
    torch.save(load_file(plain), tmp_path / "peft" / "adapter_model.bin")
    plain.unlink()
    other = convert_adapter(tmp_path / "peft", tmp_path / "other", base=tmp_path / "base")
    assert other.digest == adapter.digest


def test_a_directory_without_weights_or_config_is_no_adapter(tmp_path: Path) -> None:
    write_bundle(tmp_path / "base", decoder_spec())
    (tmp_path / "peft").mkdir()
    with pytest.raises(ArtifactInvalid, match=r"adapter_config\.json does not exist"):
        convert_adapter(tmp_path / "peft", tmp_path / "out", base=tmp_path / "base")
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(plain_config()))
    with pytest.raises(AdapterInvalid, match=r"no adapter_model\.safetensors"):
        convert_adapter(tmp_path / "peft", tmp_path / "out", base=tmp_path / "base")


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"peft_type": NaN}', "[" * 100_000])
def test_a_damaged_config_is_a_document_error(tmp_path: Path, text: str) -> None:
    write_bundle(tmp_path / "base", decoder_spec())
    peft_dir = write_peft(tmp_path / "peft", {}, peft_tensors(decoder_spec()))
    (peft_dir / "adapter_config.json").write_text(text)
    with pytest.raises(DocumentInvalid, match=r"adapter_config\.json"):
        convert_adapter(peft_dir, tmp_path / "out", base=tmp_path / "base")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights_are_recognised(
    convert: Callable[..., Adapter], tmp_path: Path, keep: int
) -> None:
    convert()
    path = tmp_path / "peft" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(AdapterInvalid, match=r"adapter_model\.safetensors.*truncated"):
        convert_adapter(tmp_path / "peft", tmp_path / "other", base=tmp_path / "base")


def test_integer_weights_are_refused(convert: Callable[..., Adapter]) -> None:
    name = f"{STEM}.lora_A.weight"
    with pytest.raises(Unsupported, match="I8"):
        convert(tensors=changed(**{name: np.zeros((2, 32), np.int8)}))


def test_an_existing_output_is_kept_unless_forced(
    convert: Callable[..., Adapter], tmp_path: Path
) -> None:
    first = convert()
    with pytest.raises(Conflict, match="--force"):
        convert(plain_config(lora_alpha=8))
    assert load_adapter(tmp_path / "out") == first
    assert convert(plain_config(lora_alpha=8), replace=True) != first
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_force_never_deletes_what_is_no_adapter(
    convert: Callable[..., Adapter], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years")
    with pytest.raises(Conflict, match=r"no adapter\.json"):
        convert(replace=True)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years"


def test_a_failed_write_leaves_nothing_behind(
    convert: Callable[..., Adapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    first = convert()
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(Exhausted, match=r"out; free some"):
        convert(plain_config(lora_alpha=8), replace=True)
    assert load_adapter(tmp_path / "out") == first
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(Exhausted):
        convert()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "peft"]


@pytest.mark.parametrize(
    ("value", "word"),
    [("1e999", "finite"), ('"\\ud800"', "Unicode"), ("[" * 700 + "]" * 700, "nested")],
)
def test_what_adapter_json_could_not_repeat_is_refused(
    convert: Callable[..., Adapter], tmp_path: Path, value: str, word: str
) -> None:
    convert()
    config = tmp_path / "peft" / "adapter_config.json"
    config.write_text(json.dumps(plain_config())[:-1] + f', "auto_mapping": {value}}}')
    with pytest.raises(DocumentInvalid, match=rf"auto_mapping.*{word}|{word}"):
        convert_adapter(tmp_path / "peft", tmp_path / "two", base=tmp_path / "base")
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.removeprefix("base_model.model."),
        lambda name: name.replace(".weight", ".default.weight"),
    ],
    ids=["no-prefix", "adapter-name"],
)
def test_names_that_peft_itself_would_not_load_say_how_it_names_them(
    convert: Callable[..., Adapter], rename: Callable[[str], str]
) -> None:
    tensors = {rename(name): value for name, value in peft_tensors(decoder_spec()).items()}
    with pytest.raises(AdapterInvalid, match=r"base_model\.model\.<module>\.lora_A\.weight"):
        convert(tensors=tensors)
