"""The chat layout as text and ids, on a byte-level tokenizer; the published ids are in test_tokenizer_conversion.py."""

import pytest
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerFast

from kimi_linear.hub_card.tokenizer_conversion import write_tokenizer_folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> PreTrainedTokenizerFast:
    return write_tokenizer_folder(
        {bytes([byte]): byte for byte in range(256)}, tmp_path_factory.mktemp("chat"), slots=20
    )


MESSAGES = [
    {"role": "system", "content": "the system"},
    {"role": "user", "content": "the user\n\n  asked "},
    {"role": "assistant", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "tool"}]},
    {"role": "tool", "content": "12"},
    {"role": "assistant", "content": "Hello"},
]


def ids_of(tokenizer, messages, **kwargs) -> list[int]:
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **kwargs)


def test_text(tokenizer):
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False) == (
        "<|im_system|>system<|im_middle|>the system<|im_end|>"
        "<|im_user|>user<|im_middle|>the user\n\n  asked <|im_end|>"
        "<|im_assistant|>assistant<|im_middle|>a tool<|im_end|>"
        "<|im_system|>tool<|im_middle|>12<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|>Hello<|im_end|>"
    )


def test_conversation_is_the_concatenation_of_its_turns(tokenizer):
    turns = [token_id for message in MESSAGES for token_id in ids_of(tokenizer, [message])]
    assert ids_of(tokenizer, MESSAGES) == turns


@pytest.mark.parametrize("message", [{"role": "user", "content": None}, {"role": "user"}])
def test_null_content_is_empty(tokenizer, message):
    text = tokenizer.apply_chat_template([message], tokenize=False)
    assert text == "<|im_user|>user<|im_middle|><|im_end|>"


def test_last_answer_can_be_continued(tokenizer):
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False, continue_final_message=True)
    assert text.endswith("<|im_assistant|>assistant<|im_middle|>Hello")


def test_generation_prompt_is_a_prefix_of_the_answer(tokenizer):
    prompt = ids_of(tokenizer, MESSAGES[:2], add_generation_prompt=True)
    assert ids_of(tokenizer, MESSAGES[:3])[: len(prompt)] == prompt


def test_assistant_mask_covers_answers_and_their_end(tokenizer):
    out = tokenizer.apply_chat_template(MESSAGES, return_dict=True, return_assistant_tokens_mask=True)
    learned = [i for i, mask in zip(out["input_ids"], out["assistant_masks"]) if mask]
    assert tokenizer.decode(learned) == "a tool<|im_end|>Hello<|im_end|>"


def test_tools_are_declared_first_with_sorted_keys(tokenizer):
    tools = [{"type": "function", "function": {"name": "f", "description": "<é>", "parameters": {"b": 1, "a": {}}}}]
    text = tokenizer.apply_chat_template(MESSAGES[:1], tools=tools, tokenize=False)
    assert text == (
        '<|im_system|>tool_declare<|im_middle|>[{"function":{"description":"<é>","name":"f",'
        '"parameters":{"a":{},"b":1}},"type":"function"}]<|im_end|>'
        "<|im_system|>system<|im_middle|>the system<|im_end|>"
    )


def test_calls_and_results_are_those_of_the_kimi_k2_family(tokenizer):
    def call(arguments, **fields):
        return {"type": "function", "function": {"name": "clock", "arguments": arguments}, **fields}

    messages = [
        {"role": "user", "content": "What time is it?"},
        {"role": "assistant", "content": None, "tool_calls": [call('{"zone": "é"}', id="functions.clock:0")]},
        {"role": "tool", "tool_call_id": "functions.clock:0", "name": "clock", "content": "noon"},
        {"role": "assistant", "content": "Once more.", "tool_calls": [call({"a": 1, "é": []}), call(None)]},
        {"role": "tool", "tool_call_id": "functions.clock:1", "content": [{"type": "text", "text": "later"}]},
    ]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|im_user|>user<|im_middle|>What time is it?<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|><|tool_calls_section_begin|><|tool_call_begin|>functions.clock:0"
        '<|tool_call_argument_begin|>{"zone": "é"}<|tool_call_end|><|tool_calls_section_end|><|im_end|>'
        "<|im_system|>clock<|im_middle|>## Return of functions.clock:0\nnoon<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|>Once more.<|tool_calls_section_begin|>"
        '<|tool_call_begin|>functions.clock:1<|tool_call_argument_begin|>{"a":1,"é":[]}<|tool_call_end|>'
        "<|tool_call_begin|>functions.clock:2<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>"
        "<|im_end|><|im_system|>tool<|im_middle|>## Return of functions.clock:1\nlater<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|>"
    )
    out = tokenizer.apply_chat_template(messages[:2], return_dict=True, return_assistant_tokens_mask=True)
    learned = [i for i, mask in zip(out["input_ids"], out["assistant_masks"]) if mask]
    assert tokenizer.decode(learned).startswith("<|tool_calls_section_begin|>")


@pytest.mark.parametrize(
    ("message", "match"),
    [
        ({"role": "user", "content": [{"type": "image", "url": "x"}]}, "text only"),
        ({"role": "user", "content": 12}, "must be a string"),
        ({"role": "user", "content": {"type": "text", "text": "x"}}, "must be a string"),
        ({"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}, "Each of tool_calls must be"),
        ({"role": "assistant", "content": "", "tool_calls": ["f"]}, "Each of tool_calls must be"),
        ({"role": "user", "content": "", "tool_calls": [{"function": {"name": "f"}}]}, "only an assistant message"),
    ],
)
def test_what_cannot_be_rendered_is_refused(tokenizer, message, match):
    with pytest.raises(TemplateError, match=match):
        tokenizer.apply_chat_template([message], tokenize=False)
