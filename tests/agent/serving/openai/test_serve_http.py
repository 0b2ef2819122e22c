"""`remora-agent serve --openai-listen` as a real process on a real engine."""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import openai
import pytest

from remora_agent.client import Client
from remora_agent.serving.openai.keys import VARIABLE
from tests.agent.serving.test_serve_command import command

KEY = "a-key-of-the-environment"
GREEDY = {"max_tokens": 12, "temperature": 0, "extra_body": {"ignore_eos": True}}


@contextmanager
def serving(bundles, monkeypatch, *more: object) -> Iterator[tuple[subprocess.Popen, str, str]]:
    """The process, its gRPC address and its HTTP base URL."""
    monkeypatch.setenv(VARIABLE, KEY)
    arguments = command(
        *("serve", bundles.plain, "--listen", "127.0.0.1:0", "--cache-dir", bundles.cache),
        *("--threads", 1, "--openai-listen", "127.0.0.1:0", *more),
    )
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            match = re.fullmatch(r"serving \S+ \(.*\) on (\S+) and (http://\S+/v1)\n", line)
            assert match, line
            yield process, match[1], match[2]
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0


def test_both_surfaces_answer_with_the_same_model_and_adapters(real_bundles, monkeypatch):
    adapter = f"a={real_bundles.adapter_dir('a')}"
    with serving(real_bundles, monkeypatch, "--adapter", adapter) as (_, grpc, url):
        with openai.OpenAI(base_url=url, api_key=KEY) as client, Client(grpc) as own:
            base = client.models.list().data[0].id
            for model, name in ((base, None), ("a", "a")):
                said = client.completions.create(model=model, prompt="hello", **GREEDY)
                wanted = own.generate(
                    "hello", adapter=name, max_tokens=12, temperature=0.0, ignore_eos=True
                )
                assert said.choices[0].text == wanted.text
            stream = client.completions.create(model=base, prompt="hello", stream=True, **GREEDY)
            text = "".join(chunk.choices[0].text for chunk in stream)
            assert (
                text == own.generate("hello", max_tokens=12, temperature=0.0, ignore_eos=True).text
            )
        stranger = openai.OpenAI(base_url=url, api_key="x" * 20)
        with stranger, pytest.raises(openai.AuthenticationError):
            stranger.models.list()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--openai-listen", "0.0.0.0:0"), "TLS"),
        (("--openai-listen", "nowhere"), "HOST:PORT"),
        (("--openai-api-key-file", "/nowhere/keys"), "--openai-listen"),
        (("--openai-listen", "127.0.0.1:0", "--openai-api-key-file", "/nowhere"), "cannot be read"),
        (
            ("--openai-listen", "127.0.0.1:0", "--openai-adapter-dir", "/nowhere"),
            "is no directory",
        ),
        (("--tool-format", "smoke"), "hermes"),
    ],
)
def test_what_is_wrong_with_the_options_is_said_in_one_line(real_bundles, arguments, named):
    done = subprocess.run(
        command("serve", real_bundles.plain, *arguments), capture_output=True, text=True
    )
    assert done.returncode in (1, 2)
    assert named in done.stderr
    assert "Traceback" not in done.stderr
