"""Writes docs/cli.md from the verbs' dataclasses; a test fails when the two differ."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
VERBS = tuple(
    ROOT / "src/pilotfish/cli" / name
    for name in ("verbs.py", "policy_verbs.py", "steer_verbs.py", "discover_verbs.py", "server_verbs.py")
)
PAGE = ROOT / "docs/cli.md"
INTRO = """# Commands

`pilotfish VERB --help` prints the same. Exit codes: 0 done, 1 an error that the message explains, 2 a wrong flag,
130 interrupted. `pilotfish bench tax` and `pilotfish bench-tax` are one; so are `policy check`, `policy dry-run`,
`steer calibrate`, `steer verify` and `discover promote` with a hyphen.
"""


def page() -> str:
    bodies = [ast.parse(path.read_text()).body for path in VERBS]
    classes = {node.name: node for body in bodies for node in body if isinstance(node, ast.ClassDef)}
    parts = [INTRO]
    for name, node in classes.items():
        if not any(isinstance(item, ast.FunctionDef) and item.name == "run" for item in node.body):
            continue
        verb = re.sub(r"(?<=[a-z])(?=[A-Z])", "-", name).lower()
        parts.append(f"## pilotfish {verb}\n\n{ast.get_docstring(node)}\n\n| flag | default | what |\n|---|---|---|")
        bases = [classes[base.id] for base in node.bases if isinstance(base, ast.Name)]
        parts += [row for each in (node, *bases) for row in _rows(each)]
        parts.append("")
    return "\n".join(parts)


def _rows(node: ast.ClassDef) -> list[str]:
    rows = []
    for field, text in zip(node.body, node.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            flag = field.target.id.replace("_", "-")  # type: ignore[union-attr]  # fields are names
            is_positional = "Positional" in ast.unparse(field.annotation)
            default = f"`{ast.unparse(field.value)}`" if field.value is not None else "required"
            rows.append(f"| `{flag.upper() if is_positional else '--' + flag}` | {default} | {text.value.value} |")  # type: ignore[attr-defined]
    return rows


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
