"""What agent.toml becomes for the serving half."""

from __future__ import annotations

import pytest

from remora_agent.config import AdaptersConfig, AgentConfig, OpenAiConfig, ServingConfig
from remora_agent.control.layout import StateLayout
from remora_agent.control.service import stack_options
from remora_contract.errors import Refused


def made(tmp_path, **sections):
    config = AgentConfig(state_dir=str(tmp_path), **sections)
    return stack_options(config, StateLayout(tmp_path))


def test_a_missing_directory_of_adapters_is_refused_at_start(tmp_path):
    folder = tmp_path / "adapters"
    openai = OpenAiConfig("127.0.0.1:0", adapter_directory=str(folder))
    with pytest.raises(Refused, match=r"openai\.adapter_directory .* is no directory"):
        made(tmp_path, openai=openai)
    folder.mkdir()
    assert made(tmp_path, openai=openai).openai.adapter_directory == folder


def test_settings_reach_the_parts_that_honour_them(tmp_path):
    options = made(
        tmp_path,
        serving=ServingConfig(rows=3, max_waiting=7, kserve=False, tool_format="hermes"),
        adapters=AdaptersConfig(turn_s=0.5),
    )
    assert options.engines.options.rows == 3 and not options.kserve
    assert options.host.runtime.max_waiting == 7 and options.host.runtime.patience_s == 0.5
    assert options.host.tool_format is not None and options.openai is None
