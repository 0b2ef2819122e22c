"""Chat templates, held against transformers' own rendering, and their sandbox."""

import json
from datetime import datetime

import pytest

from remora_agent.text.chat import ChatTemplate
from remora_agent.text.pipeline import TextPipeline
from remora_contract.errors import ArtifactInvalid, PromptTooLong, Refused, RequestInvalid
from tests.support.runtime import byte_tokenizer

CHATML = """\
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' + m.content | trim + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

LLAMA = """\
{{ bos_token }}
{%- if not date_string is defined %}{% set date_string = strftime_now("%Y") %}{% endif %}
{% if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{% else %}
    {%- set system = "" %}
{% endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: " ~ date_string ~ "\\n" }}
{{- system + eos_token }}
{%- for m in messages if m.role in ('user', 'assistant') %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate, <b> not repeat') }}
    {%- endif %}
    {{- "<|start_header_id|>" + m.role + "<|end_header_id|>\\n\\n" + m.content + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}
{%- endif %}
"""

QWEN = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}
        {{- "\\n" }}{{- tool | tojson }}{{- tool | tojson(indent=2) }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1, seen=false) %}
{%- for m in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if m.role == "user" and not ns.seen %}
        {%- set ns.seen = true %}{%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for m in messages %}
    {%- if m.role == "assistant" %}
        {%- if m.reasoning_content is string %}
            {{- '<think>' + m.reasoning_content.strip('\\n') + '</think>' }}
        {%- endif %}
        {% generation %}{{ m.content.split('</think>')[-1].lstrip('\\n') }}{% endgeneration %}
    {%- elif m.role == "skip" %}{% continue %}
    {%- else %}
        {{- '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' }}
        {{- loop.index0 > ns.last }}
    {%- endif %}
{%- endfor %}
{%- for d in documents or [] %}{{ d.title }}{% endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
{{ dict(a=1).a }}{{ unk_token is defined }}
"""

SYSTEM = {"role": "system", "content": " You are a fish. "}
USER = {"role": "user", "content": "<b>Ünïcode & 'quotes' 🐟</b>\n"}
SAID = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nblub", "thinking": "\nwell\n"}
TOOL = {"type": "function", "function": {"name": "swim", "parameters": {"type": "object"}}}

CASES = [
    (CHATML, [SYSTEM, USER], {}),
    (CHATML, [USER], {"add_generation_prompt": False}),
    (LLAMA, [SYSTEM, USER, SAID, USER], {}),
    (LLAMA, [USER], {"date_string": "1 Jul 2024"}),
    (QWEN, [SYSTEM, USER, SAID, USER], {}),
    (QWEN, [USER, {"role": "skip", "content": ""}], {"enable_thinking": False}),
    (QWEN, [USER], {"enable_thinking": True, "tools": [TOOL, TOOL]}),
    (QWEN, [USER], {"documents": [{"title": "Fins", "text": "…"}]}),
]
BOTH = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": QWEN}]


@pytest.fixture
def bundle(tmp_path):
    """Makes a bundle directory; `config` goes into tokenizer_config.json."""

    def make(config, template=None):
        directory = tmp_path / "tokenizer"
        directory.mkdir(exist_ok=True)
        byte_tokenizer().save(str(directory / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": {"content": "<pad>", "__type": "AddedToken"},
            "eos_token": "<eos>",
            "pad_token": None,
            "add_bos_token": True,
            **config,
        }
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
        if template is not None:
            (directory / "chat_template.jinja").write_text(template)
        return tmp_path

    return make


def ours(bundle_directory, messages, arguments):
    arguments = dict(arguments)
    prompt = arguments.pop("add_generation_prompt", True)
    return TextPipeline.load(bundle_directory).encode_chat(
        messages, add_generation_prompt=prompt, arguments=arguments
    )


def theirs(bundle_directory, messages, arguments):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bundle_directory / "tokenizer")
    arguments = {"add_generation_prompt": True, **arguments}
    text = tokenizer.apply_chat_template(messages, tokenize=False, **arguments)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return text, tuple(ids)


@pytest.mark.parametrize(("template", "messages", "arguments"), CASES)
@pytest.mark.parametrize("place", ["config", "file"])
def test_a_chat_renders_as_transformers_renders_it(bundle, template, messages, arguments, place):
    directory = (
        bundle({"chat_template": template})
        if place == "config"
        else bundle({"chat_template": "the file wins"}, template)
    )
    encoded = ours(directory, messages, arguments)
    assert (encoded.text, encoded.token_ids) == theirs(directory, messages, arguments)


@pytest.mark.parametrize("arguments", [{}, {"tools": [TOOL]}])
def test_named_templates_are_chosen_as_transformers_chooses(bundle, arguments):
    directory = bundle({"chat_template": BOTH})
    encoded = ours(directory, [USER], arguments)
    assert (encoded.text, encoded.token_ids) == theirs(directory, [USER], arguments)
    assert ("swim" in encoded.text) == bool(arguments)


def test_special_tokens_written_by_a_template_become_one_token(bundle):
    directory = bundle({"chat_template": "{{ eos_token }}{{ messages[0].content }}"})
    assert ours(directory, [{"role": "user", "content": "a"}], {}).token_ids[0] == 256


def test_a_template_s_own_refusal_is_the_caller_s_error(bundle):
    directory = bundle({"chat_template": LLAMA})
    with pytest.raises(RequestInvalid, match="Roles must alternate, <b> not repeat"):
        ours(directory, [USER, USER], {})


@pytest.mark.parametrize("message", [{"role": "user"}, {"role": "user", "content": None}])
def test_messages_a_template_stumbles_over_are_the_caller_s_error(bundle, message):
    directory = bundle({"chat_template": "{{ messages[0].content + 'x' }}"})
    with pytest.raises(RequestInvalid, match="chat template refuses"):
        ours(directory, [message], {})


def test_a_bundle_without_template_says_what_works_instead(bundle):
    with pytest.raises(Refused, match="send text or token ids"):
        ours(bundle({}), [USER], {})


@pytest.mark.parametrize("value", [7, [{"name": "default"}], {"default": CHATML}])
def test_a_template_of_another_form_is_named(bundle, value):
    with pytest.raises(ArtifactInvalid, match="chat_template"):
        TextPipeline.load(bundle({"chat_template": value}))


def test_a_template_that_is_no_jinja_names_its_line(bundle):
    with pytest.raises(ArtifactInvalid, match="line 2"):
        TextPipeline.load(bundle({"chat_template": "a\n{% if %}"}))


@pytest.mark.parametrize("name", ["messages", "add_generation_prompt"])
def test_arguments_cannot_replace_the_request(bundle, name):
    directory = bundle({"chat_template": CHATML})
    with pytest.raises(RequestInvalid, match=name):
        TextPipeline.load(directory).encode_chat([USER], arguments={name: []})


def test_an_empty_chat_is_refused(bundle):
    with pytest.raises(RequestInvalid, match="messages"):
        ours(bundle({"chat_template": CHATML}), [], {})


ATTACKS = [
    "{{ ''.__class__.__mro__ }}{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.append(1) }}",
    "{{ 'x' * 1000000000 }}",
    "{{ 1000000000 * [1] }}",
    "{{ 9 ** 9999999 }}",
    "{% for i in range(99999999) %}x{% endfor %}",
    "{% for i in range(99999) %}{{ messages[0].content }}{% endfor %}",
    "{{ namespace(_x=1) }}",
    "{% set ns = namespace() %}{% set ns._x = 1 %}",
    "{{ raise_exception.__globals__['os'] }}",
]


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_hostile_template_gets_neither_python_nor_memory(attack):
    chat = ChatTemplate({"default": attack}, {}, 10_000)
    with pytest.raises(RequestInvalid):
        chat.render([USER])


def test_dates_come_from_the_clock_that_was_handed_in():
    chat = ChatTemplate(
        {"default": "{{ strftime_now('%d %b %Y') }}"}, {}, 100, lambda: datetime(2024, 7, 26)
    )
    assert chat.render([USER]) == "26 Jul 2024"


def test_a_rendered_chat_past_the_bound_is_refused(bundle):
    directory = bundle({"chat_template": CHATML})
    text = TextPipeline.load(directory, max_text_bytes=40)
    with pytest.raises((RequestInvalid, PromptTooLong), match="40"):
        text.encode_chat([USER] * 3)
