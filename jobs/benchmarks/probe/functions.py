"""Python functions as a skill to learn: the standard library's own source, signature and first line of the docstring asked, the body answered.

Called by `jobs/benchmarks/objective.py`. The library of the running interpreter is read, so the rows depend on its version.
"""

import ast
import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from probe.models import Problem

_LEFT_OUT = ("test", "tests", "idlelib", "lib2to3", "site-packages", "turtledemo", "__pycache__")
_SHORTEST, _LONGEST = 60, 500  # bytes of a body
_HELD_OUT_ONE_IN = 10  # modules: a module's functions resemble one another


def python_functions() -> tuple[list[Problem], list[Problem]]:
    """Functions to learn from and functions held out, from different modules, in an order that has nothing to do with the modules. No body comes twice."""
    found: dict[str, tuple[bool, Problem]] = {}
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        module = path.relative_to(root)
        if not set(module.parts).intersection(_LEFT_OUT):
            held_out = _number(str(module)) % _HELD_OUT_ONE_IN == 0
            for problem in _functions(path):
                found.setdefault(problem["answer"], (held_out, problem))
    ordered = sorted(found.values(), key=lambda each: _number(each[1]["answer"]))
    return [problem for held_out, problem in ordered if not held_out], [
        problem for held_out, problem in ordered if held_out
    ]


def _functions(path: Path) -> Iterator[Problem]:
    try:
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef):
            continue
        said = ast.get_docstring(node)
        body = node.body[1:] if said else node.body
        if not body or body[0].lineno == node.lineno:
            continue
        lines = source.splitlines()[body[0].lineno - 1 : node.end_lineno]
        indent = " " * body[0].col_offset
        answer = "\n".join(line.removeprefix(indent) for line in lines).strip()
        if _SHORTEST <= len(answer.encode()) <= _LONGEST:
            first = f"\n{said.splitlines()[0]}" if said else ""
            yield {"question": f"def {node.name}({ast.unparse(node.args)}):{first}", "answer": answer}


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
