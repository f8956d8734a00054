"""Five chat templates, one a model of the zoo, each in the manner of a family of real chat models.

Every template supports several turns and `add_generation_prompt`; the assistant's content starts right after its role marker and is
followed directly by the end-of-turn token, which is the eos token. `headers` and `turns` strip the content, as the real ones do.
`turns` has no system role and says so with a template error, as the real one does.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Template:
    """A Jinja chat template and the special tokens it uses; `special` holds all of them, `bos` and `end_of_turn` included."""

    jinja: str
    special: tuple[str, ...]
    bos: str | None
    end_of_turn: str
    pad: str


_UNKNOWN_ROLE = (
    "{{ raise_exception('a message has the role ' ~ message['role'] ~ ', expected system, user or assistant') }}"
)

CHATML = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}" + _UNKNOWN_ROLE + "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HEADERS = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}" + _UNKNOWN_ROLE + "{% endif %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}" + _UNKNOWN_ROLE + "{% endif %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
MARKDOWN = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ '### User:\n' + message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ '### Assistant:\n' + message['content'] + eos_token + '\n\n' }}"
    "{% else %}" + _UNKNOWN_ROLE + "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"
)
TURNS = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}"
    "{{ raise_exception('this model has no system role: put the instruction into the first user message') }}"
    "{% elif message['role'] == 'user' %}{% set role = 'user' %}"
    "{% elif message['role'] == 'assistant' %}{% set role = 'model' %}"
    "{% else %}" + _UNKNOWN_ROLE + "{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

TEMPLATES = {
    "chatml": Template(CHATML, ("<|pad|>", "<|im_start|>", "<|im_end|>"), None, "<|im_end|>", "<|pad|>"),
    "headers": Template(
        HEADERS,
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|pad|>"),
        "<|begin_of_text|>",
        "<|eot_id|>",
        "<|pad|>",
    ),
    "zephyr": Template(
        ZEPHYR,
        ("<|endoftext|>", "<|padding|>", "<|system|>", "<|user|>", "<|assistant|>"),
        None,
        "<|endoftext|>",
        "<|padding|>",
    ),
    "markdown": Template(MARKDOWN, ("<unk>", "<s>", "</s>", "<pad>"), "<s>", "</s>", "<pad>"),
    "turns": Template(
        TURNS,
        ("<pad>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
        "<bos>",
        "<end_of_turn>",
        "<pad>",
    ),
}
