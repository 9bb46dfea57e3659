"""Tools: calls in every spelling take the form of chat templates, and are trained with the answer that they end."""

from __future__ import annotations

import json
from typing import Any

import pytest
from test_data_template import byte_tokenizer, marked

from qlora_native.data.formats import normalize
from qlora_native.data.readers import SourceRow
from qlora_native.data.template import ChatEncoder
from qlora_native.errors import UserError

# As Qwen2.5's: tools in a system message, calls between tags, results as the user's.
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}"
    "{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>{{ m.content }}</tool_response><|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}"
    '<tool_call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</tool_call>'
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FUNCTION = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
CALL = {"name": "weather", "arguments": {"city": "Bern"}}
RENDERED = '<tool_call>{"name": "weather", "arguments": {"city": "Bern"}}</tool_call>'


def conversation(call: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": "q"},
        {"role": "assistant", **call},
        {"role": "tool", "content": "sun", "name": "weather", "tool_call_id": "1"},
        {"role": "assistant", "content": "sunny"},
    ]


def row(data: dict[str, Any]) -> Any:
    return normalize(SourceRow("d.jsonl:7", 7, data), "sharegpt" if "conversations" in data else "messages")


OPENAI = {"tool_calls": [{"id": "1", "type": "function", "function": {**CALL, "arguments": '{"city": "Bern"}'}}]}
SPELLINGS: list[dict[str, Any]] = [
    {"messages": conversation({"content": None, **OPENAI}), "tools": [{"type": "function", "function": FUNCTION}]},
    {"messages": conversation({"content": "ok", **OPENAI}), "tools": [FUNCTION]},
    {"messages": conversation({"function_call": CALL}), "tools": [FUNCTION]},
    {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": json.dumps(CALL)},
            {"from": "observation", "value": "sun"},
            {"from": "gpt", "value": "sunny"},
        ],
        "tools": json.dumps([{**FUNCTION, "strict": None}]),  # null as Parquet writes an absent key
    },
]


@pytest.mark.parametrize("data", SPELLINGS, ids=["tool_calls", "text and calls", "function_call", "sharegpt"])
def test_calls_are_trained_and_results_are_not(data: dict[str, Any]) -> None:
    tokenizer = byte_tokenizer(TEMPLATE)
    found = row(data)
    assert found.tools == ({"type": "function", "function": FUNCTION},)
    text = marked(tokenizer, ChatEncoder(tokenizer).encode(found))
    head, _, rest = text.partition("<|im_end|>\n")
    assert head.startswith('<|im_start|>system\n{"') and '"name": "weather"' in head
    said = "ok" if data is SPELLINGS[1] else ""
    assert rest == (
        f"<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n[[{said}{RENDERED}<|im_end|>]]\n"
        "<|im_start|>user\n<tool_response>sun</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n[[sunny<|im_end|>]]\n"
    )


def test_a_template_that_leaves_tools_out_is_refused() -> None:
    encoder = ChatEncoder(byte_tokenizer())
    for data in (
        {"messages": conversation({"content": "ok", **OPENAI})},
        {"messages": [*conversation(CALL)[:1], {"role": "assistant", "content": "a"}], "tools": [FUNCTION]},
    ):
        with pytest.raises(UserError, match=r"d.jsonl:7: the chat template .* \('weather' is"):
            encoder.encode(row(data))
    with pytest.raises(UserError, match="the row has 'tools' but"):
        normalize(SourceRow("d.jsonl:7", 7, {"text": "abc", "tools": [FUNCTION]}), "text")


def test_broken_calls_are_named() -> None:
    for call, tools, match in (
        ({"tool_calls": [{**CALL, "arguments": "{city"}]}, [], r"tool_calls\[0\].arguments' is not valid JSON"),
        (
            {"tool_calls": [{**CALL, "arguments": [1]}]},
            [],
            r"tool_calls\[0\].arguments is an array, expected an object",
        ),
        ({"tool_calls": [CALL], "role": "user"}, [], r"messages\[1\] has tool calls and the role user"),
        ({"content": "a"}, FUNCTION, "'tools' is an object, expected an array of functions"),
    ):
        with pytest.raises(UserError, match=rf"d.jsonl:7: .*{match}"):
            row({"messages": conversation({"content": "", **call}), "tools": tools})
