"""`remora-agent serve` as a real process on a real engine."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tritonclient.grpc import InferenceServerClient
from typer.testing import CliRunner

from remora_agent.cli import build_app
from remora_agent.client import Client, Retry
from remora_agent.runtime.api import FinishReason
from remora_agent.serving.standalone import parse_adapters, parse_use_case
from remora_contract.errors import RemoraError, RequestInvalid, Unavailable
from tests.support.triton import inputs, streaming, text_of

OPTIONS = {"max_tokens": 24, "ignore_eos": True, "temperature": 0.0}


def command(*arguments: object) -> list[str]:
    code = "from remora_agent.cli import main; main()"
    return [sys.executable, "-c", code, *map(str, arguments)]


@contextmanager
def notify_socket(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
        s.bind(str(path))
        s.settimeout(30)
        yield s


@contextmanager
def serve(bundles, *more: object, **environment: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """The process and its address, once it says that it serves."""
    arguments = command(
        *("serve", bundles.plain, "--listen", "127.0.0.1:0", "--cache-dir", bundles.cache),
        *("--threads", 1, *more),
    )
    with subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            match = re.fullmatch(r"serving \S+ \(.*\) on (\S+)\n", line)
            assert match, (line, process.stderr and process.stderr.read())
            yield process, match[1]
        finally:
            process.kill()


def test_it_serves_adapters_and_use_cases_and_ends_cleanly_on_sigterm(real_bundles, tmp_path):
    adapters = [f"--adapter={n}={real_bundles.adapter_dir(n)}" for n in "ab"]
    address_of = str(tmp_path / "notify")
    with (
        notify_socket(tmp_path / "notify") as systemd,
        serve(
            real_bundles,
            *adapters,
            "--use-case=mix=a:0.5,b",
            NOTIFY_SOCKET=address_of,
            WATCHDOG_USEC="200000",
        ) as (process, address),
        Client(address, timeout_s=30) as client,
    ):
        assert systemd.recv(100) == b"READY=1"
        assert systemd.recv(100) == b"WATCHDOG=1"
        plain = client.generate("hello", **OPTIONS)
        mixed = client.generate("hello", use_case="mix", **OPTIONS)
        assert {a.name: a.weight for a in mixed.provenance.adapters} == {"a": 0.5, "b": 1.0}
        assert plain.token_ids != mixed.token_ids
        assert client.status().backend == "onnxruntime"
        stream = client.stream("hello", **{**OPTIONS, "max_tokens": 200})
        next(stream)
        process.send_signal(signal.SIGTERM)
        list(stream)
        assert stream.result.finish_reason is FinishReason.LENGTH
        assert process.wait(30) == 0
        told = systemd.recv(100)
        while told == b"WATCHDOG=1":
            told = systemd.recv(100)
        assert told == b"STOPPING=1"
        with pytest.raises(Unavailable):
            client.generate("late")
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["--listen", "0.0.0.0:0"], 1, "--tls-cert"),
        (["--context", "100000"], 1, "context"),
        (["--context", "1"], 1, "2 to "),
        (["--rows", "many"], 2, "rows"),
        (["--threads", "0"], 1, "threads must be 1"),
        (["--drain-s", "-1"], 2, "drain-s"),
    ],
)
def test_what_cannot_work_ends_with_one_line_and_a_status(real_bundles, arguments, code, told):
    more = [] if "--listen" in arguments else ["--listen", "127.0.0.1:0"]
    done = subprocess.run(
        command("serve", real_bundles.plain, *arguments, *more, "--cache-dir", real_bundles.cache),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == code
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    if code == 1:
        assert done.stderr.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["/nowhere"], "/nowhere is no bundle"),
        (["{bundle}", "--listen", "nonsense"], "give HOST:PORT"),
        (["{bundle}", "--adapter", "a=/nowhere"], "/nowhere is no converted adapter"),
        (["{bundle}", "--adapter", "a"], "NAME=DIR"),
        (["{bundle}", "--use-case", "u=zzz"], "zzz"),
        (["{bundle}", "--tls-cert", "x.pem"], "together"),
        (["{bundle}", "--metrics-listen", "unix:/m"], "--metrics-listen"),
        (["{bundle}", "--log-level", "loud"], "--log-level"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_before_anything_starts(
    real_bundles, arguments, told
):
    given = [a.format(bundle=real_bundles.plain) for a in arguments]
    result = CliRunner().invoke(build_app(), ["serve", *given])
    assert isinstance(result.exception, RemoraError)
    assert told in str(result.exception)


def test_adapters_and_use_cases_are_read_from_their_options():
    assert parse_adapters(["a=/x", "b=y=z"]) == {"a": Path("/x"), "b": Path("y=z")}
    use_case = parse_use_case("u=a:0.7,b")
    assert [(a.name, a.weight) for a in use_case.adapters] == [("a", 0.7), ("b", 1.0)]
    for text in ("a", "a="):
        with pytest.raises(RequestInvalid):
            parse_adapters([text])
        with pytest.raises(RequestInvalid):
            parse_use_case(text)
    with pytest.raises(RequestInvalid, match="ADAPTER:WEIGHT"):
        parse_use_case("u=a,:0.5")
    with pytest.raises(RequestInvalid, match="twice"):
        parse_adapters(["a=x", "a=y"])
    with pytest.raises(RequestInvalid, match="no weight"):
        parse_use_case("u=a:heavy")


def test_an_unchanged_triton_client_reaches_the_process(real_bundles):
    adapters = [f"--adapter={n}={real_bundles.adapter_dir(n)}" for n in "ab"]
    with (
        serve(real_bundles, *adapters) as (_, address),
        Client(address, timeout_s=30) as client,
        InferenceServerClient(address) as triton,
    ):
        base = triton.get_model_repository_index().models[0].name
        for model, adapter in ((base, None), (f"{base}:a", "a"), ("ensemble:b", "b")):
            want = client.generate("hello", adapter=adapter, **OPTIONS).text
            assert text_of(triton.infer(model, inputs("hello", **OPTIONS))) == want
            with streaming(triton) as stream:
                stream.send(model, "hello", **OPTIONS)
                assert "".join(text_of(r) for r in stream.all()) == want


def test_it_serves_although_nothing_it_says_can_be_written(real_bundles, tmp_path):
    """Its output goes to a file on a disk that is full."""
    unix = tmp_path / "s"
    arguments = command(
        *("serve", real_bundles.plain, "--listen", f"unix:{unix}", "--threads", 1),
        *("--cache-dir", real_bundles.cache, "--log-level", "debug"),
    )
    with Path("/dev/full").open("w") as full:
        process = subprocess.Popen(arguments, stdout=full, stderr=full)
    retry = Retry(attempts=60, timeout_s=60)
    with process, Client(f"unix:{unix}", retry=retry) as client:
        try:
            assert len(client.generate("Hello", max_tokens=4, ignore_eos=True).text) > 0
            assert process.poll() is None
        finally:
            process.kill()
