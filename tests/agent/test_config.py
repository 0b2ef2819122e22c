"""agent.toml: strict, with every error naming key and file, and documented completely."""

from __future__ import annotations

import pytest

from remora_agent.config import check_address, load_config
from remora_contract.errors import DocumentInvalid


def write(tmp_path, text: str):
    path = tmp_path / "agent.toml"
    path.write_text(text)
    return path


def test_only_the_state_directory_is_required(tmp_path):
    config = load_config(write(tmp_path, 'state_dir = "/var/lib/remora-agent"'))
    assert config.serving.listen == "127.0.0.1:7450"
    assert config.controller.address is None
    assert config.labels == {}


def test_every_section_is_read(tmp_path):
    config = load_config(
        write(
            tmp_path,
            """
            state_dir = "/s"
            labels = { site = "berlin" }
            [controller]
            address = "[fd00::1]:7440"
            [serving]
            listen = "unix:/run/remora/agent.sock"
            rows = 4
            context = 2048
            threads = 2
            [telemetry]
            interval_s = 5
            metrics_listen = ""
            spool_events = 100
            [limits]
            disk_floor_bytes = 1
            download_bytes_per_s = 250000
            pinned_releases = ["a-1"]
            """,
        )
    )
    assert config.labels == {"site": "berlin"}
    assert config.telemetry.interval_s == 5.0
    assert config.limits.pinned_releases == ("a-1",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "missing key 'state_dir'"),
        ('state_dir = "relative"', "absolute"),
        ('state_dir = "/s"\nstatedir = 1', "unknown key 'statedir'"),
        ('state_dir = "/s"\n[serving]\nrow = 8', "unknown key 'serving.row'"),
        ('state_dir = "/s"\n[serving]\nrows = 0', "serving.rows must be at least 1"),
        ('state_dir = "/s"\n[serving]\nrows = "8"', "serving.rows must be a whole number"),
        ('state_dir = "/s"\n[serving]\nlisten = "nowhere"', "serving.listen"),
        ('state_dir = "/s"\n[serving]\ntls_key = "/k"', "belong together"),
        (
            'state_dir = "/s"\n[controller]\naddress = "host"',
            "controller.address must be HOST:PORT",
        ),
        ('state_dir = "/s"\n[telemetry]\nmetrics_listen = "0.0.0.0:1"', "loopback"),
        ('state_dir = "/s"\n[telemetry]\ninterval_s = 0', "interval_s must be at least"),
        ('state_dir = "/s"\n[limits]\ndownload_bytes_per_s = 3', "at least 1024"),
        ("state_dir = ", "not valid TOML"),
        ('state_dir = "/s"\n[serving]\ninter_token_s = nan', "inter_token_s"),
        ('state_dir = "/s"\n[serving]\ndrain_s = inf', "drain_s"),
        ('state_dir = "/s"\n[serving]\ntls_client_ca = "/ca"', "tls_client_ca needs"),
        ('state_dir = "/s"\n[serving]\nallowed_users = ["root"]', "allowed_users .* none is conf"),
        ('state_dir = "/s"\n[telemetry]\nmetrics_listen = "127.evil.example:1"', "loopback"),
    ],
)
def test_what_is_wrong_is_named_with_the_file(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(DocumentInvalid, match=message) as caught:
        load_config(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "serving",
    ['unix_socket = "/run/r.sock"', 'listen = "unix:/run/r.sock"', ""],
)
def test_allowed_users_go_with_any_unix_socket(tmp_path, serving):
    http = "" if serving else '[openai]\nlisten = "unix:/run/h.sock"'
    text = f'state_dir = "/s"\n[serving]\nallowed_users = ["root"]\n{serving}\n{http}'
    assert load_config(write(tmp_path, text)).serving.allowed_users == ("root",)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DocumentInvalid, match=r"none\.toml cannot be read"):
        load_config(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("text", "parts"),
    [("h:1", ("h", 1)), ("[::1]:7440", ("::1", 7440)), ("127.0.0.1:0", ("127.0.0.1", 0))],
)
def test_addresses_are_taken_apart(text, parts):
    assert check_address(text, "x") == parts
