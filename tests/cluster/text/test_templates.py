import json

import pytest
from transformers import AutoTokenizer

from cluster.text.templates import ChatTemplate

HI = {"role": "user", "content": "Hi! <b>&</b>"}
HELLO = {"role": "assistant", "content": "Hello — how can I help?"}
PIRATE = {"role": "system", "content": "You are a pirate."}
CONVERSATIONS = [[HI], [PIRATE, HI], [HI, HELLO, HI], [PIRATE, HI, HELLO, HI, HELLO], [HELLO]]

# As Mistral's do: roles that alternate, text as JSON, loop control, tests for absent values.
STRICT = """{{- bos_token }}
{%- for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate: user, assistant, user, ...') }}
    {%- endif %}
    {%- if message.role == 'user' %}
        {%- if loop.last and tools is not none %}
            {{- raise_exception('Nobody has passed tools') }}
        {%- endif %}
        {{- '[INST] ' + (message.content | tojson) + '[/INST]' }}
        {%- continue %}
    {%- endif %}
    {{- ' ' + message.content + eos_token }}
{%- endfor %}
{% if mood is defined or documents is not none %}
    {{ mood }}
{% endif %}
"""


@pytest.fixture(scope="module")
def template(dense_checkpoint):
    return ChatTemplate.from_checkpoint(dense_checkpoint)


@pytest.fixture(scope="module")
def oracle(dense_checkpoint):
    return AutoTokenizer.from_pretrained(dense_checkpoint)


@pytest.fixture
def strict(oracle):
    return ChatTemplate(STRICT, {"bos_token": oracle.bos_token, "eos_token": oracle.eos_token})


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_smollm2s_template_renders_as_in_transformers(template, oracle, messages):
    want = oracle.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert template.render(messages) == want


def test_smollm2_gets_its_default_system_prompt(template):
    assert template.render([HI]).startswith(
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    )


def test_a_strict_template_renders_as_in_transformers(strict, oracle):
    messages = [HI, HELLO, {"role": "user", "content": "“how” is it <here>?"}]
    want = oracle.apply_chat_template(messages, chat_template=STRICT, tokenize=False)
    assert strict.render(messages) == want


def test_a_template_refuses_with_its_own_words(strict):
    with pytest.raises(ValueError, match="Roles must alternate: user, assistant, user"):
        strict.render([HI, HI])


def test_a_message_without_content_is_a_value_error(template):
    with pytest.raises(ValueError, match="the chat template refuses these messages"):
        template.render([{"role": "user", "content": None}])


def test_a_template_cannot_leave_its_sandbox():
    with pytest.raises(ValueError, match="unsafe"):
        ChatTemplate("{{ messages.__class__.__mro__ }}", {}).render([HI])


def test_a_template_cannot_change_the_messages():
    messages = [HI]
    with pytest.raises(ValueError, match="unsafe"):
        ChatTemplate("{{ messages.append(1) }}", {}).render(messages)
    assert messages == [HI]


def test_the_date_is_there_to_format():
    assert len(ChatTemplate("{{ strftime_now('%Y-%m-%d') }}", {}).render([HI])) == len("2026-01-01")


def test_the_jinja_file_goes_before_the_config(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}file")
    config = {"chat_template": "config", "bos_token": {"content": "<s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert ChatTemplate.from_checkpoint(tmp_path).render([HI]) == "<s>file"


def test_of_several_named_templates_the_default_is_taken(tmp_path):
    named = [{"name": "rag", "template": "rag"}, {"name": "default", "template": "plain"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert ChatTemplate.from_checkpoint(tmp_path).render([HI]) == "plain"


def test_a_checkpoint_without_a_template_has_none(tmp_path):
    assert ChatTemplate.from_checkpoint(tmp_path) is None


def test_a_template_that_does_not_compile_is_named_with_its_line(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("fine\n{% if %}")
    with pytest.raises(ValueError, match=r"chat_template\.jinja: line 2 of the chat template: "):
        ChatTemplate.from_checkpoint(tmp_path)
