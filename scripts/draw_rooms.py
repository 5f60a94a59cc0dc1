"""Draw the imports between the rooms of `pixellm_jax` as a Mermaid figure, from the source itself.

python scripts/draw_rooms.py           prints the figure
python scripts/draw_rooms.py --write   puts it into docs/architecture.md

An arrow points from a room to one that it imports. Arrows that follow from others are left out
(transitive reduction), so the figure shows the order of the rooms.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("pixellm_jax", "data_pipeline")
CONTRACT = "contract"
"""The files next to the rooms."""

FACE = "pixellm_jax"
"""The public face: it names what the rooms define, but imports a room only on first use."""

DOCUMENT = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- rooms -->\n", "<!-- end of rooms -->\n"


def module_name(path: Path) -> str:
    """Dotted name of a file below `ROOT`; a package has the name of its folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules(*folders: str) -> list[Path]:
    """Python files below the folders."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def is_module(name: str) -> bool:
    """Whether a dotted name is a file or a folder of this repository."""
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or path.is_dir()


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that is imported; relative names begin with a dot."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield node.lineno, "." * node.level + (node.module or "")
                continue
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield node.lineno, full if is_module(full) else str(node.module)


def room(module: str) -> str:
    """Room of a dotted name: a folder of `pixellm_jax`, `CONTRACT`, or another package."""
    top, _, rest = module.partition(".")
    if top != "pixellm_jax":
        return top
    if rest == "__main__":
        return "cli"
    first = rest.partition(".")[0]
    return first if first and (ROOT / top / first).is_dir() else CONTRACT


def module_graph() -> dict[str, set[str]]:
    """Modules of the two packages that each module imports, the public face excepted."""
    return {
        module_name(path): {
            target
            for _, target in imports(ast.parse(path.read_text(encoding="utf-8")))
            if target.partition(".")[0] in PACKAGES
        }
        for path in modules(*PACKAGES)
        if module_name(path) != FACE
    }


def room_graph() -> dict[str, set[str]]:
    """Rooms that each room imports; `data_pipeline` counts as one."""
    graph: dict[str, set[str]] = {}
    for module, targets in module_graph().items():
        graph.setdefault(room(module), set()).update(map(room, targets))
    return {name: targets - {name} for name, targets in graph.items()}


def figure() -> str:
    """Mermaid source of the room graph."""
    graph = room_graph()

    def reach(name: str) -> set[str]:
        return graph[name].union(*(reach(target) for target in graph[name]))

    lines = ["```mermaid", "flowchart TD"]
    for name, targets in sorted(graph.items()):
        implied = set[str]().union(*(reach(target) for target in targets))
        lines += [f"  {name} --> {target}" for target in sorted(targets - implied)]
    return "\n".join([*lines, "```", ""])


def insert_figure(text: str) -> str:
    """The document with the figure between its two markers."""
    pattern = re.compile(f"(?<={re.escape(BEGIN)}).*?(?={re.escape(END)})", re.DOTALL)
    return pattern.sub(lambda _: figure(), text)


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        document = DOCUMENT.read_text(encoding="utf-8")
        DOCUMENT.write_text(insert_figure(document), encoding="utf-8")
    else:
        print(figure(), end="")
