"""Which tests prove the rows of docs/support.md. Data only; paths are relative to tests/.

A test asserts that every file is there and speaks of its row.
"""

from __future__ import annotations

from collections.abc import Mapping

FIELDS_TEST = "buildhost/test_adapter_fields.py"
LOGITS = "buildhost/test_adapter_logits.py"
ALGEBRA = "buildhost/test_adapter_algebra.py"
KINDS = "buildhost/test_adapter_kinds.py"
EXPERTS = "buildhost/test_adapter_experts.py"
TRAINING = "buildhost/test_adapter_training_fields.py"
INITIAL = "buildhost/test_adapter_initial.py"
ACTIVATED = "agent/runtime/test_activated_real_engine.py"
MERGE = "buildhost/test_merge.py"

# LoraConfig's fields that are honoured, and those that are accepted and whose other values PEFT
# itself can save; the rest of the table is held by FIELDS_TEST, which walks all of it.
FIELDS: Mapping[str, tuple[str, ...]] = {
    "r": (ALGEBRA, LOGITS),
    "lora_alpha": (ALGEBRA, LOGITS),
    "use_rslora": (ALGEBRA, LOGITS),
    "rank_pattern": (ALGEBRA, LOGITS),
    "alpha_pattern": (ALGEBRA, LOGITS),
    "target_modules": (ALGEBRA, KINDS),
    "exclude_modules": (ALGEBRA,),
    "layers_to_transform": (ALGEBRA,),
    "layers_pattern": (ALGEBRA,),
    "target_parameters": (KINDS, EXPERTS),
    "use_dora": (KINDS,),
    "bias": (KINDS,),
    "lora_bias": (KINDS,),
    "trainable_token_indices": (KINDS,),
    "ensure_weight_tying": (KINDS,),
    "alora_invocation_tokens": (ACTIVATED,),
    "init_lora_weights": (INITIAL,),
    "modules_to_save": (FIELDS_TEST, MERGE),
    "fan_in_fan_out": (TRAINING, MERGE),
    "velora_config": (TRAINING,),
    "monteclora_config": (TRAINING,),
    "lora_dropout": (TRAINING,),
    "revision": (TRAINING,),
}

# Rope scaling -> forms of tests/buildhost/family_forms.py that have it.
ROPE_FORMS: Mapping[str, tuple[str, ...]] = {
    "none": ("llama",),
    "linear": ("llama-linear", "gemma3_text"),
    "llama3": ("llama-llama3",),
    "yarn": ("llama-yarn", "llama-yarn-tuned", "ministral3"),
    "longrope": ("phi3",),
}

# Adapter format -> the tests of its reader or writer.
FORMATS: Mapping[str, tuple[str, ...]] = {
    "peft": (ALGEBRA, "buildhost/test_adapter_convert.py"),
    "remora": ("buildhost/test_formats_translate.py",),
    "edgellm": ("buildhost/test_formats_edgellm.py", "buildhost/test_formats_edgellm_peer.py"),
    "trtllm": ("buildhost/test_formats_trtllm.py", "buildhost/test_formats_dora.py"),
}
