"""Chat templates in the manner of the published LFM2 generations, written for these tests."""

LFM2 = """
{{- bos_token -}}
{%- set system = "" -%}
{%- set ns = namespace(system="") -%}
{%- if messages[0]["role"] == "system" -%}
    {%- set ns.system = messages[0]["content"] -%}
    {%- set messages = messages[1:] -%}
{%- endif -%}
{%- if tools -%}
    {%- set ns.system = ns.system + ("\n" if ns.system else "") + "List of tools: <|tool_list_start|>[" -%}
    {%- for tool in tools -%}
        {%- if tool is not string -%}
            {%- set tool = tool | tojson -%}
        {%- endif -%}
        {%- set ns.system = ns.system + tool -%}
        {%- if not loop.last -%}
            {%- set ns.system = ns.system + ", " -%}
        {%- endif -%}
    {%- endfor -%}
    {%- set ns.system = ns.system + "]<|tool_list_end|>" -%}
{%- endif -%}
{%- if ns.system -%}
    {{- "<|im_start|>system\n" + ns.system + "<|im_end|>\n" -}}
{%- endif -%}
{%- for message in messages -%}
    {{- "<|im_start|>" + message["role"] + "\n" -}}
    {%- set content = message["content"] -%}
    {%- if content is not string -%}
        {%- set content = content | tojson -%}
    {%- endif -%}
    {%- if message["role"] == "tool" -%}
        {%- set content = "<|tool_response_start|>" + content + "<|tool_response_end|>" -%}
    {%- elif message["role"] == "assistant" -%}
        {%- generation -%}
        {{- content + "<|im_end|>\n" -}}
        {%- endgeneration -%}
        {%- continue -%}
    {%- endif -%}
    {{- content + "<|im_end|>\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "<|im_start|>assistant\n" -}}
{%- endif -%}
"""

LFM25 = """
{{- bos_token -}}
{%- set keep_past_thinking = keep_past_thinking | default(false) -%}
{%- set ns = namespace(system="", last_assistant=-1) -%}
{%- if messages[0].role == "system" -%}
    {%- set ns.system = messages[0].content -%}
    {%- set messages = messages[1:] -%}
{%- endif -%}
{% if tools %}
    {%- set ns.system = ns.system + ("\n" if ns.system else "") + "List of tools: [" -%}
    {% for tool in tools %}
        {%- set ns.system = ns.system + (tool | tojson) + ("" if loop.last else ", ") -%}
    {% endfor %}
    {%- set ns.system = ns.system + "]" -%}
{% endif %}
{%- if ns.system -%}{{- "<|im_start|>system\n" ~ ns.system ~ "<|im_end|>\n" -}}{%- endif -%}
{%- for message in messages -%}
    {%- if message.role == "assistant" -%}{%- set ns.last_assistant = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
    {%- set content = message.content if message.content is string else message.content | tojson -%}
    {%- if message.role == "assistant" and not keep_past_thinking and loop.index0 != ns.last_assistant -%}
        {%- if "</think>" in content -%}{%- set content = content.split("</think>")[-1] | trim -%}{%- endif -%}
    {%- endif -%}
    {{- "<|im_start|>" ~ message.role ~ "\n" ~ content ~ "<|im_end|>\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|im_start|>assistant\n" -}}{%- endif -%}
"""

_CALLS = """
{%- macro literal(value) -%}
    {%- if value is string -%}STRING_FORM
    {%- elif value is none -%}None
    {%- elif value is mapping -%}{{- value | tojson -}}
    {%- elif value is sequence -%}LIST_FORM
    {%- else -%}{{- value | string -}}
    {%- endif -%}
{%- endmacro -%}
{%- macro calls(tool_calls) -%}
    {{- "<|tool_call_start|>[" -}}
    {%- for call in tool_calls -%}
        {%- set function = call.function | default(call) -%}
        ARGUMENTS_CHECK
        {{- function.name ~ "(" -}}
        {%- for key, value in function.arguments.items() -%}
            {{- key ~ "=" ~ literal(value) ~ ("" if loop.last else ", ") -}}
        {%- endfor -%}
        {{- ")" ~ ("" if loop.last else ", ") -}}
    {%- endfor -%}
    {{- "]<|tool_call_end|>" -}}
{%- endmacro -%}
"""

_REASONING_BODY = """
{{- bos_token -}}
{%- set ns = namespace(system="", last_user=-1) -%}
{%- if messages[0].role == "system" -%}
    {%- set ns.system = messages[0].content -%}
    {%- set messages = messages[1:] -%}
{%- endif -%}
SYSTEM_EXTRA
{%- if tools -%}
    {%- set ns.system = ns.system ~ ("\n\n" if ns.system else "") ~ "List of tools: [" -%}
    {%- for tool in tools -%}
        {%- set ns.system = ns.system ~ (tool | tojson) ~ ("" if loop.last else ", ") -%}
    {%- endfor -%}
    {%- set ns.system = ns.system ~ "]" -%}
{%- endif -%}
{%- if ns.system -%}{{- "<|im_start|>system\n" ~ ns.system ~ "<|im_end|>\n" -}}{%- endif -%}
{%- for message in messages[::-1] -%}
    {%- if message.role == "user" -%}
        {%- set ns.last_user = messages | length - loop.index -%}
        {%- break -%}
    {%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
    {{- "<|im_start|>" ~ message.role ~ "\n" -}}
    {%- if message.role == "assistant" -%}
        {%- if message.thinking and (preserve_thinking | default(false) or loop.index0 > ns.last_user) -%}
            {{- "<think>" ~ message.thinking ~ "</think>" -}}
        {%- endif -%}
        {%- if message.tool_calls -%}{{- calls(message.tool_calls) -}}{%- endif -%}
    {%- endif -%}
    {%- if message.content -%}{{- message.content -}}{%- endif -%}
    {{- "<|im_end|>\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|im_start|>assistant\nOPENING" -}}{%- endif -%}
"""

_DATE = '{%- set ns.system = ns.system ~ "\\n\\nToday\'s date: " ~ strftime_now("%Y-%m-%d") -%}'

LFM25_MOE = (
    (_CALLS + _REASONING_BODY)
    .replace("STRING_FORM", '{{- "\'" ~ value ~ "\'" -}}')
    .replace("LIST_FORM", "{{- value | string -}}")
    .replace("ARGUMENTS_CHECK", "")
    .replace("SYSTEM_EXTRA", _DATE)
    .replace("OPENING", "")
)

HARDENED = (
    (_CALLS + _REASONING_BODY)
    .replace("STRING_FORM", "{{- \"'\" ~ value.replace('\\\\', '\\\\\\\\').replace(\"'\", \"\\\\'\") ~ \"'\" -}}")
    .replace("LIST_FORM", "{{- value | tojson -}}")
    .replace(
        "ARGUMENTS_CHECK",
        "{%- if function.arguments is string -%}"
        '{{- raise_exception("arguments of a tool call must be a mapping") -}}{%- endif -%}',
    )
    .replace("SYSTEM_EXTRA", "")
    .replace("OPENING", "<think>")
)

ALL = {"lfm2": LFM2, "lfm2.5": LFM25, "lfm2.5-moe": LFM25_MOE, "hardened": HARDENED}
