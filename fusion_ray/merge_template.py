"""Whether a chat template that a merge file gives can be read at all. Called by merge_yaml.py, for files that give one: jinja2 takes its time to load."""

import jinja2
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser


class _Generation(Extension):
    """transformers' `{% generation %}`, which marks what the model says."""

    tags = {"generation"}  # noqa: RUF012  # jinja2's way to declare it

    def parse(self, parser: Parser) -> Node | list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def template_problem(text: str) -> str | None:
    """What is wrong with it, and in which line; None where it parses."""
    try:
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols", _Generation]).parse(text)
    except jinja2.TemplateSyntaxError as error:
        return f"line {error.lineno}: {error.message}"
    return None
