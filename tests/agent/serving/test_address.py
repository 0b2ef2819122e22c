"""Addresses, and who may be reached without TLS."""

from __future__ import annotations

import pytest

from remora_agent.serving.address import TcpAddress, UnixAddress, parse_address
from remora_agent.serving.tls import ClientTls, channel_credentials, server_credentials
from remora_contract.errors import DocumentInvalid, Refused, RequestInvalid


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:7450", TcpAddress("127.0.0.1", 7450)),
        ("[::1]:0", TcpAddress("::1", 0)),
        ("device.local:80", TcpAddress("device.local", 80)),
        ("unix:/run/remora.sock", UnixAddress("/run/remora.sock")),
    ],
)
def test_an_address_is_read_and_written_back(text, address):
    assert parse_address(text) == address
    assert address.target() == text


@pytest.mark.parametrize(
    "text", ["", "7450", "host:", "host:x", "host:70000", ":7450", "::1:7450", "unix:relative"]
)
def test_what_is_no_address_is_refused(text):
    with pytest.raises(RequestInvalid, match="address"):
        parse_address(text)


def test_a_socket_path_longer_than_the_kernel_takes_is_refused():
    with pytest.raises(RequestInvalid, match="107"):
        parse_address("unix:/" + "x" * 107)


@pytest.mark.parametrize("text", ["0.0.0.0:1", "[::]:1", "10.0.0.2:1", "example.org:1"])
def test_plaintext_is_refused_where_other_machines_reach(text):
    address = parse_address(text)
    with pytest.raises(Refused, match="--tls-cert"):
        server_credentials(address, None)
    with pytest.raises(Refused, match="ClientTls"):
        channel_credentials(address, None)


@pytest.mark.parametrize(
    "text", ["127.0.0.1:1", "127.9.9.9:1", "[::1]:1", "localhost:1", "unix:/s"]
)
def test_plaintext_is_allowed_where_only_this_machine_reaches(text):
    assert server_credentials(parse_address(text), None) is None
    assert channel_credentials(parse_address(text), None) is None


def test_a_missing_or_wrong_pem_file_is_named(tmp_path):
    with pytest.raises(DocumentInvalid, match="absent"):
        channel_credentials(parse_address("a:1"), ClientTls(tmp_path / "absent.pem"))
    (tmp_path / "not.pem").write_text("hello")
    with pytest.raises(DocumentInvalid, match="no PEM"):
        channel_credentials(parse_address("a:1"), ClientTls(tmp_path / "not.pem"))


def test_half_a_client_certificate_is_refused(tmp_path):
    with pytest.raises(RequestInvalid, match="together"):
        ClientTls(tmp_path / "ca.pem", certificate=tmp_path / "c.pem")
