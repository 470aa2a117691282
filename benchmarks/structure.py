"""How large checkouts are and how their parts lean on each other: ``structure.py . ../before``.

Nothing of them is imported. A room is a folder; a function's lines are those without its docstring; names
count if they have no underscore, and are promised if tests/public_names.txt has them. Lightning's internals
are names with an underscore that its installed source defines, its loops, and what is written into a trainer.
"""

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from itertools import chain
from pathlib import Path
from statistics import median

import lightning

ROOMS = ("bpn_lightning", "strategies", "datamodules", "configs")
LOOPS = re.compile(
    r"(fit|validate|test|predict|epoch|val)_loop|(batch|epoch|optim|scheduler)_progress"
)
Function = ast.FunctionDef | ast.AsyncFunctionDef


def read(root: Path, *folders: str) -> dict[Path, str]:
    """The text of each Python file in some folders, by its path in the checkout."""
    paths = [path for folder in folders for path in sorted((root / folder).rglob("*.py"))]
    return {path.relative_to(root): path.read_text(encoding="utf-8") for path in paths}


def module_name(path: Path) -> str:
    """What a file is imported as."""
    parts = path.with_suffix("").parts
    parts = parts if parts[0] == ROOMS[0] else (ROOMS[0], *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def arrows(trees: dict[Path, ast.Module]) -> set[tuple[Path, Path]]:
    """Pairs of files of which the first imports the second, wherever in the file."""
    files = {module_name(path): path for path in trees}
    found = set()
    for path, tree in trees.items():
        for node in ast.walk(tree):
            names = {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
            if isinstance(node, ast.ImportFrom):
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                names = inner & set(files) or {str(node.module)}
            found |= {(path, files[name]) for name in names if name in files}
    return found


def length(function: Function) -> int:
    """Lines of a function without its docstring."""
    said = len((ast.get_docstring(function) or "").splitlines())
    return (function.end_lineno or 0) - function.lineno + 1 - said


def methods(classes: dict[str, ast.ClassDef], name: str) -> set[str]:
    """Methods of a class and of its bases, as far as these are in the checkout."""
    if name not in classes:
        return set()
    own = {part.name for part in classes[name].body if isinstance(part, Function)}
    return own.union(*(methods(classes, ast.unparse(base)) for base in classes[name].bases))


@cache
def private_names() -> frozenset[str]:
    """Names with one underscore that the installed Lightning defines, or assigns on self."""
    files = Path(lightning.__file__).parent.rglob("*.py")
    pattern = re.compile(r"(?:\bself\.|\bdef |\bclass |\btrainer\.)(_(?!_)\w+)")
    return frozenset(name for path in files for name in pattern.findall(path.read_text("utf-8")))


def internals(nodes: list[ast.AST], own: set[str]) -> int:
    """How often a file reaches for what Lightning keeps to itself, but for names that are ours too."""
    attributes = [node for node in nodes if isinstance(node, ast.Attribute)]
    names = [node.attr for node in attributes]
    names += [str(node.value) for node in nodes if isinstance(node, ast.Constant)]
    writes = [ast.unparse(node) for node in attributes if isinstance(node.ctx, ast.Store)]
    own = own | {text.removeprefix("self.") for text in writes}
    reached = [name for name in names if name in private_names() - own or LOOPS.fullmatch(name)]
    return len(reached) + sum(bool(re.match(r"(\w+\.)?_?trainer\.", text)) for text in writes)


def figures(root: Path) -> Iterator[str]:
    """A line for each figure of a checkout."""
    texts, tests = read(root, *ROOMS), "".join(read(root, "tests").values())
    trees = {path: ast.parse(text) for path, text in texts.items()}
    nodes = {path: list(ast.walk(tree)) for path, tree in trees.items()}
    sizes = {path: text.count("\n") for path, text in texts.items()}
    for room in dict.fromkeys(path.parent for path in texts):
        lines = [size for path, size in sizes.items() if path.parent == room]
        yield f"{room}: {len(lines)} files, {sum(lines)} lines"
    yield f"product: {len(sizes)} files, {sum(sizes.values())} lines"
    yield f"tests: {len(tests.splitlines())} lines"
    yield "longest file: {1}, {0} lines".format(*max((n, path) for path, n in sizes.items()))
    top = chain(*(tree.body for tree in trees.values()))
    named = [node for node in top if isinstance(node, Function | ast.ClassDef)]
    written = root / "tests" / "public_names.txt"
    promised = re.findall(r"^\w", written.read_text(), re.MULTILINE) if written.exists() else []
    yield f"names: {sum(node.name[0] != '_' for node in named)}, promised: {len(promised)}"
    between = arrows(trees)
    rooms = {(one.parent, other.parent) for one, other in between if one.parent != other.parent}
    yield f"imports: {len(between)} between files, {len(rooms)} between rooms"
    functions = [node for node in chain(*nodes.values()) if isinstance(node, Function)]
    most, name = max((length(function), function.name) for function in functions)
    yield f"functions: {len(functions)}, median {median(map(length, functions))} lines"
    yield f"longest function: {name}, {most} lines"
    classes = {node.name: node for node in named if isinstance(node, ast.ClassDef)}
    widest = max(classes, key=lambda one: (len(methods(classes, one)), len(classes[one].body)))
    yield f"most methods, with those of its bases: {widest}, {len(methods(classes, widest))}"
    ours = {function.name for function in functions}
    inside = {path: count for path, found in nodes.items() if (count := internals(found, ours))}
    yield f"accesses to Lightning's internals: {sum(inside.values())}, {', '.join(map(str, inside))}"


if __name__ == "__main__":
    for argument in sys.argv[1:] or ["."]:
        print(f"# {argument}", *figures(Path(argument)), sep="\n")
