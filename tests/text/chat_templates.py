"""Chat templates that render what the published ones render, written anew and reduced to what the tests need.

The strings are facts of the models' published chat_template fields: Llama 3.1 Instruct, Qwen2.5 Instruct, Qwen3,
Mistral 7B Instruct v0.3, InternLM2.5 chat, Baichuan2 Chat (its prompt format; it has no template), ChatGLM3, GLM-4.
"""

from typing import NamedTuple


class Family(NamedTuple):
    template: str
    specials: tuple[str, ...]
    eos: str
    bos: str | None = None


LLAMA31 = """
{%- macro turn(role, text) -%}
{{ '<|start_header_id|>' ~ role ~ '<|end_header_id|>\n\n' ~ text ~ '<|eot_id|>' }}
{%- endmacro -%}
{%- set first = messages[0].content | trim if messages[0].role == 'system' else '' -%}
{%- set rest = messages[1:] if messages[0].role == 'system' else messages -%}
{{- bos_token -}}
{%- set dates = 'Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n' -%}
{{- turn('system', ('Environment: ipython\n' if tools else '') ~ dates ~ first) -}}
{%- for m in rest -%}
{%- if m.role == 'user' and loop.first and tools -%}
{%- set ns = namespace(text='Given the following functions, please respond with a JSON for a function call with its '
 ~ 'proper arguments that best answers the given prompt.\n\nRespond in the format {"name": function name, '
 ~ '"parameters": dictionary of argument name and its value}.Do not use variables.\n\n') -%}
{%- for tool in tools -%}{%- set ns.text = ns.text ~ (tool | tojson(indent=4)) ~ '\n\n' -%}{%- endfor -%}
{{- turn('user', ns.text ~ (m.content | trim)) -}}
{%- elif m.tool_calls -%}
{%- set call = m.tool_calls[0].function -%}
{{- turn('assistant', '{"name": "' ~ call.name ~ '", "parameters": ' ~ (call.arguments | tojson) ~ '}') -}}
{%- elif m.role == 'tool' -%}{{- turn('ipython', m.content | tojson) -}}
{%- else -%}{{- turn(m.role, m.content | trim) -}}
{%- endif -%}
{%- endfor -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' if add_generation_prompt -}}
"""

_QWEN_TOOLS = """
{%- macro turn(role, text) -%}{{ '<|im_start|>' ~ role ~ '\n' ~ text ~ '<|im_end|>\n' }}{%- endmacro -%}
{%- macro calls(m) -%}
{%- for call in m.tool_calls or [] -%}
{{ '\n' if not loop.first or m.content }}{{ '<tool_call>\n{"name": "' ~ call.function.name ~ '", "arguments": ' }}
{{- call.function.arguments | tojson }}{{ '}\n</tool_call>' }}
{%- endfor -%}
{%- endmacro -%}
{%- macro head(text) -%}
{%- if tools -%}
{%- set ns = namespace(text=text ~ '# Tools\n\nYou may call one or more functions to assist with the user query.\n\n'
 ~ 'You are provided with function signatures within <tools></tools> XML tags:\n<tools>') -%}
{%- for tool in tools -%}{%- set ns.text = ns.text ~ '\n' ~ (tool | tojson) -%}{%- endfor -%}
{{ turn('system', ns.text ~ '\n</tools>\n\nFor each function call, return a json object with function name and '
 ~ 'arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, '
 ~ '"arguments": <args-json-object>}\n</tool_call>') }}
{%- elif text -%}{{ turn('system', text | trim) }}
{%- endif -%}
{%- endmacro -%}
{%- set has_system = messages[0].role == 'system' -%}
"""

QWEN25 = (
    _QWEN_TOOLS
    + """
{%- set own = 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' -%}
{{- head((messages[0].content if has_system else own) ~ '\n\n') -}}
{%- for m in (messages[1:] if has_system else messages) -%}
{%- if m.role == 'tool' -%}{{- turn('user', '<tool_response>\n' ~ m.content ~ '\n</tool_response>') -}}
{%- else -%}{{- turn(m.role, m.content ~ calls(m)) -}}
{%- endif -%}
{%- endfor -%}
{{- '<|im_start|>assistant\n' if add_generation_prompt -}}
"""
)

QWEN3 = (
    _QWEN_TOOLS
    + """
{{- head(messages[0].content ~ '\n\n' if has_system else '') -}}
{%- set ns = namespace(asked=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.asked = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
{%- if m.role == 'tool' -%}{{- turn('user', '<tool_response>\n' ~ m.content ~ '\n</tool_response>') -}}
{%- elif m.role == 'user' -%}{{- turn('user', m.content) -}}
{%- elif m.role == 'assistant' -%}
{%- set parts = m.content.split('</think>') -%}
{%- set thought = parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 else '' -%}
{%- set said = parts[-1].lstrip('\n') -%}
{%- set shown = loop.index0 > ns.asked and (loop.last or thought) -%}
{{- turn('assistant', ('<think>\n' ~ thought ~ '\n</think>\n\n' if shown else '') ~ said ~ calls(m)) -}}
{%- endif -%}
{%- endfor -%}
{{- '<|im_start|>assistant\n' if add_generation_prompt -}}
"""
)

MISTRAL = """
{%- set system = messages[0].content if messages[0].role == 'system' -%}
{%- set rest = messages[1:] if messages[0].role == 'system' else messages -%}
{%- set asked = rest | selectattr('role', 'equalto', 'user') | list -%}
{{- bos_token -}}
{%- for m in rest -%}
{%- if m.role == 'user' -%}
{%- if tools and m == asked[-1] -%}{{- '[AVAILABLE_TOOLS] ' ~ (tools | tojson) ~ '[/AVAILABLE_TOOLS]' -}}{%- endif -%}
{{- '[INST] ' ~ (system ~ '\n\n' if loop.last and system else '') ~ m.content ~ '[/INST]' -}}
{%- elif m.tool_calls -%}
{%- set call = m.tool_calls[0] -%}
{%- if call.id | length != 9 -%}{{- raise_exception('Tool call IDs should have length 9!') -}}{%- endif -%}
{{- '[TOOL_CALLS] [{"name": "' ~ call.function.name ~ '", "arguments": ' ~ (call.function.arguments | tojson) -}}
{{- ', "id": "' ~ call.id ~ '"}]' ~ eos_token -}}
{%- elif m.role == 'tool' -%}
{{- '[TOOL_RESULTS] {"content": ' ~ m.content ~ ', "call_id": "' ~ m.tool_call_id ~ '"}[/TOOL_RESULTS]' -}}
{%- else -%}{{- ' ' ~ (m.content | trim) ~ eos_token -}}
{%- endif -%}
{%- endfor -%}
"""

INTERNLM25 = """
{{- bos_token -}}
{%- for m in messages -%}{{- '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' -}}{%- endfor -%}
{{- '<|im_start|>assistant\n' if add_generation_prompt -}}
"""

BAICHUAN2 = """
{%- for m in messages -%}
{{- {'system': '', 'user': '<reserved_106>', 'assistant': '<reserved_107>'}[m.role] ~ m.content -}}
{%- endfor -%}
{{- '<reserved_107>' if add_generation_prompt -}}
"""


def _glm(start, before):
    turn = "{{- '<|' ~ m.role ~ '|>\n" + before + "' ~ m.content -}}"
    return (
        "{{- '" + start + "' -}}{%- for m in messages -%}" + turn + "{%- endfor -%}"
        "{{- '<|assistant|>' if add_generation_prompt -}}"
    )


_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
_HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
FAMILIES = {
    "llama3.1": Family(LLAMA31, _HEADERS, "<|eot_id|>", "<|begin_of_text|>"),
    "qwen2.5": Family(QWEN25, ("<|endoftext|>",), "<|im_end|>"),
    "qwen3": Family(QWEN3, ("<|endoftext|>",), "<|im_end|>"),
    "mistral": Family(MISTRAL, ("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]"), "</s>", "<s>"),
    "internlm2.5": Family(INTERNLM25, (), "</s>", "<s>"),
    "baichuan2": Family(BAICHUAN2, ("<reserved_106>", "<reserved_107>"), "</s>"),
    "chatglm3": Family(_glm("[gMASK]sop", " "), ("[gMASK]", "sop", *_ROLES), "</s>"),
    "glm4": Family(_glm("[gMASK]<sop>", ""), ("[gMASK]", "<sop>", *_ROLES), "<|endoftext|>"),
}
