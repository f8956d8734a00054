"""Chat templates of real families, written out in their manner: role markers, what they strip, where the end of a turn stands. Used by test_spans.py."""

_ROLES = "{% for m in messages %}"
_END = "{% endfor %}"

FAMILIES = {
    "chatml": _ROLES + "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}" + _END,
    "llama2": "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}"
    "{% for m in rest %}{% if loop.index0 == 0 and system %}{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m['content'] %}"
    "{% else %}{% set content = m['content'] %}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    "llama3": "{{ bos_token }}"
    + _ROLES
    + "{{ '<|start|>' + m['role'] + '<|end|>\n\n' + m['content'] | trim + '<|im_end|>' }}"
    + _END,
    "mistral1": "{{ bos_token }}"
    + _ROLES
    + "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    + "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token + ' ' }}"
    + "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
    + _END,
    "mistral3": "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}{{ bos_token }}"
    + _ROLES
    + "{% if m['role'] == 'user' %}{% if loop.last or (loop.revindex0 == 1 and system) %}{{ '[INST]' + system + '\n\n' + m['content'] + '[/INST]' }}"
    + "{% else %}{{ '[INST]' + m['content'] + '[/INST]' }}{% endif %}"
    + "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}"
    + _END,
    "gemma": "{{ bos_token }}"
    + _ROLES
    + "{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + "{{ '<start>' + ('model' if m['role'] == 'assistant' else 'user') + '\n' + m['content'] | trim + '<|im_end|>\n' }}"
    + _END,
    "phi": _ROLES + "{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|im_end|>\n' }}" + _END,
    "zephyr": _ROLES + "{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}" + _END,
    "vicuna": _ROLES
    + "{% if m['role'] == 'system' %}{{ m['content'] + ' ' }}"
    + "{% elif m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ' }}"
    + "{% else %}{{ 'ASSISTANT: ' + m['content'] + eos_token }}{% endif %}"
    + _END,
    "openchat": "{{ bos_token }}"
    + _ROLES
    + "{{ 'GPT4 Correct ' + m['role'].title() + ': ' + m['content'] + '<|im_end|>' }}"
    + _END,
    "internlm2": "{{ bos_token }}"
    + _ROLES
    + "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    + _END,
    "alpaca": _ROLES
    + "{% if m['role'] == 'user' %}{{ '### Instruction:\n' + m['content'] + '\n\n' }}"
    + "{% elif m['role'] == 'assistant' %}{{ '### Response:\n' + m['content'] + eos_token + '\n\n' }}"
    + "{% else %}{{ m['content'] + '\n\n' }}{% endif %}"
    + _END,
    "thinking": _ROLES
    + "{% if m['role'] == 'assistant' %}{% set content = m['content'].split('</think>')[-1].lstrip('\n') %}"
    + "{{ '<|im_start|>assistant\n' + ('<think>\n\n</think>\n\n' if loop.last else '') + content + '<|im_end|>\n' }}"
    + "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}"
    + _END,
    "nothing_after": _ROLES + "{{ m['role'] + ': ' + m['content'] + '\n' }}" + _END,
}
NO_SYSTEM = ("mistral1", "gemma")
# The first token after a content is not the end-of-turn token there, so there is none to ask for.
NO_END_OF_TURN = ("nothing_after",)
