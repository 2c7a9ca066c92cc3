"""What the repository promises about itself, as functions that return a list of problems.

Sources are mappings from a path ("lfm_mlx/step.py") to the text there, so that a check runs on this tree as well as on
a made-up one.
"""

from __future__ import annotations

import ast
import builtins
import collections
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

Sources = Mapping[str, str]

PACKAGE = "lfm_mlx"
MOST_LINES = 400
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "manager"}
SHARED_NAMES = {"__init__", "__main__", "conftest"}
ITSELF = f"{PACKAGE} itself"
"""How the map calls `lfm_mlx/__init__.py`."""

_ROW = re.compile(r"^\| *(\d+|–) *\|([^|]*)\|", re.MULTILINE)
_MACHINE_PATH = re.compile(r"(?<![\w.~}:/-])/(?:work|root|home|Users)(?:/|\b)|(?<![\w.~}:/-])/(?:tmp|private|mnt)/")
_REGISTRY = re.compile(
    r"(?:extra[-_])?index[-_]url|artifac[t]ory|://[\w.-]*(?:pypi|pythonhosted|nexus|registry)[\w.-]*", re.I
)


def read_tree(root: Path) -> dict[str, str]:
    """Every text file that git tracks, or would with the next `git add`, by its path."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=root, check=True, capture_output=True).stdout.decode().split("\0")
    texts = {}
    for path in sorted(filter(None, listed)):
        if (root / path).is_file():
            data = (root / path).read_bytes()
            if b"\0" not in data:
                texts[path] = data.decode("utf-8")
    return texts


def python_files(sources: Sources, *folders: str) -> dict[str, str]:
    """The Python files below `folders`, all of them where none is named."""
    return {
        path: text
        for path, text in sources.items()
        if path.endswith(".py") and (not folders or PurePosixPath(path).parts[0] in folders)
    }


def runtime_files(sources: Sources) -> dict[str, str]:
    """What is installed: the package and its converter."""
    return python_files(sources, PACKAGE, "convert")


def module_of(path: str) -> str:
    """The module that a file is, its package for `__init__.py`."""
    parts = list(PurePosixPath(path).with_suffix("").parts)
    parts = [PACKAGE, *parts] if parts[0] == "convert" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def rooms_on_disk(sources: Sources) -> set[str]:
    """The files and folders directly below the package, and the converter."""
    modules = [module_of(path).split(".") for path in runtime_files(sources)]
    return {ITSELF if len(parts) == 1 else parts[1] for parts in modules}


def rooms_of_map(readme: str) -> list[list[str]]:
    """The rows of the README's map, each a list of rooms."""
    rows = [re.findall(r"`(\w+)`( itself)?", rooms) for _, rooms in _ROW.findall(readme)]
    return [[name + itself for name, itself in row] for row in rows]


def check_map(readme: str, sources: Sources) -> list[str]:
    """The map names every room once, and no other."""
    named = collections.Counter(room for row in rooms_of_map(readme) for room in row)
    problems = [f"{room} stands {count} times in the map" for room, count in named.items() if count > 1]
    on_disk = rooms_on_disk(sources)
    problems += [f"{room} is not in the map" for room in sorted(on_disk - set(named))]
    return problems + [f"{room} is in the map only" for room in sorted(set(named) - on_disk)]


def imports_of(path: str, text: str, modules: set[str]) -> Iterator[tuple[int, str]]:
    """Line and module of every import of a file, wherever in it; `from package import module` counts as the module."""
    package = module_of(path).split(".") if path.endswith("__init__.py") else module_of(path).split(".")[:-1]
    for node in ast.walk(ast.parse(text, path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *(node.module or "").split(".")]).strip(".")
            full = [f"{base}.{alias.name}" for alias in node.names]
            yield from ((node.lineno, name if name in modules else base) for name in full)


def check_import_order(readme: str, sources: Sources) -> list[str]:
    """A file imports from its own room, from rows above, and from rooms named before its own in its row.

    `__main__` files start a command that stands above them, and are left out in the package itself.
    """
    rank = {room: index for index, room in enumerate(room for row in rooms_of_map(readme) for room in row)}
    files = runtime_files(sources)
    modules = {module_of(path) for path in files}
    problems = []
    for path, text in files.items():
        own = _room(module_of(path))
        if own not in rank or (path.endswith("__main__.py") and own != "convert"):
            continue
        for line, name in imports_of(path, text, modules):
            room = _room(name)
            if name.split(".")[0] == PACKAGE and rank.get(room, len(rank)) > rank[own]:
                problems.append(f"{path}:{line} imports {name}, which is not above it in the map")
    return problems


def _room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ITSELF


def check_dependencies(pyproject: str, sources: Sources) -> list[str]:
    """The installed code imports the standard library, itself and what pyproject.toml declares."""
    listed = re.search(r"^dependencies = \[$(.*?)^\]$", pyproject, re.DOTALL | re.MULTILINE)
    assert listed, "pyproject.toml has no dependencies"
    declared = {name.replace("-", "_").lower() for name in re.findall(r'^ *"([\w.-]+)', listed[1], re.MULTILINE)}
    known = declared | set(sys.stdlib_module_names) | {PACKAGE}
    return [
        f"{path}:{line} imports {name}, which pyproject.toml does not declare"
        for path, text in runtime_files(sources).items()
        for line, name in imports_of(path, text, set())
        if name.split(".")[0] not in known
    ]


def check_packages(pyproject: str, sources: Sources) -> list[str]:
    """pyproject.toml installs every folder that holds installed code."""
    listed = re.search(r"^packages = \[$(.*?)^\]$", pyproject, re.DOTALL | re.MULTILINE)
    assert listed, "pyproject.toml lists no packages"
    declared = set(re.findall(r'"([\w.]+)"', listed[1]))
    found = {module_of(path) for path in runtime_files(sources) if path.endswith("__init__.py")}
    return [f"{package} is not installed" for package in sorted(found - declared)] + [
        f"{package} is installed and does not exist" for package in sorted(declared - found)
    ]


def check_docstrings(sources: Sources) -> list[str]:
    """Every installed file, and every public function and class in it, says what it is."""
    problems = []
    for path, text in runtime_files(sources).items():
        module = ast.parse(text, path)
        if ast.get_docstring(module) is None:
            problems.append(f"{path} has no docstring")
        for node in _public_definitions(module):
            if ast.get_docstring(node) is None and not _is_overload(node):
                problems.append(f"{path}:{node.lineno} {node.name} has no docstring")
    return problems


def _is_overload(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> bool:
    return any(isinstance(decorator, ast.Name) and decorator.id == "overload" for decorator in node.decorator_list)


def _public_definitions(module: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    for node in module.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield node


def check_names(sources: Sources) -> list[str]:
    """Base names of Python files are unique, so that a name in a traceback is an address, and say something."""
    stems = collections.Counter(PurePosixPath(path).stem for path in python_files(sources))
    problems = [
        f"{stem}.py exists {count} times" for stem, count in stems.items() if count > 1 and stem not in SHARED_NAMES
    ]
    return problems + [f"{stem}.py says nothing about what is in it" for stem in stems if stem in VAGUE_NAMES]


def check_mirrored(sources: Sources) -> list[str]:
    """Folders of tests are rooms, and `test_<file>.py` stands in the room of the file that it is called after."""
    files = {path.removeprefix(f"{PACKAGE}/") for path in runtime_files(sources)}
    room_of = {PurePosixPath(file).stem: str(PurePosixPath(file).parent) for file in files}
    problems = []
    for path in python_files(sources, "tests"):
        pure = PurePosixPath(path).relative_to("tests")
        subject, folder = pure.stem.removeprefix("test_"), str(pure.parent)
        if not pure.name.startswith("test_"):
            continue
        if folder != "." and folder not in room_of.values():
            problems.append(f"{path}: there is no room {folder}")
        if room_of.get(subject, folder) != folder:
            problems.append(f"{path} tests {room_of[subject]}/{subject}.py, expected it in tests/{room_of[subject]}")
    return problems


def check_lengths(sources: Sources) -> list[str]:
    """Past 400 lines there are two nouns in a file."""
    lengths = {path: text.count("\n") for path, text in runtime_files(sources).items()}
    return [
        f"{path} has {length} lines, expected at most {MOST_LINES}"
        for path, length in lengths.items()
        if length > MOST_LINES
    ]


def check_make_targets(readme: str, makefile: str) -> list[str]:
    """Every `make X` that the README names is a target."""
    code = "\n".join(re.findall(r"```.*?```|`[^`]+`", readme, re.DOTALL))
    named = sorted(set(re.findall(r"\bmake ([a-z]+)\b", code)))
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    return [f"make {target} is in the README and not in the Makefile" for target in named if target not in targets]


def check_links(readme: str, root: Path) -> list[str]:
    """Every relative link of the README leads to a file."""
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", readme) if "://" not in target]
    return [f"the README links to {target}, which does not exist" for target in targets if not (root / target).exists()]


def check_no_machine(sources: Sources) -> list[str]:
    """No file names a folder of somebody's machine, or the package index it installs from."""
    problems = []
    for path, text in sources.items():
        for number, line in enumerate(text.splitlines(), 1):
            if found := _MACHINE_PATH.search(line) or _REGISTRY.search(line):
                problems.append(f"{path}:{number} names {found[0]}")
    return problems


def check_exports(sources: Sources) -> list[str]:
    """`__all__` of a package names all that its file imports for others, and nothing that is not there."""
    problems = []
    for path, text in runtime_files(sources).items():
        if not path.endswith("__init__.py"):
            continue
        module = ast.parse(text, path)
        exported = _exported(module)
        lazy = [node for branch in module.body if isinstance(branch, ast.If) for node in branch.body]
        body = [node for node in [*module.body, *lazy] if not _is_from_the_standard_library(node)]
        imported = {name for node in body if isinstance(node, ast.ImportFrom) for name in _bound_names(node)}
        hidden = {name for name in imported if not name.startswith("_") and name != "annotations"}
        if exported is None:
            problems += [f"{path} has no __all__"] if hidden else []
            continue
        bound = {name for node in body for name in _bound_names(node)} | set(dir(builtins))
        problems += [f"{path} exports {name}, which it does not have" for name in exported if name not in bound]
        problems += [f"{path} imports {name} and does not export it" for name in sorted(hidden - set(exported))]
    return problems


def _is_from_the_standard_library(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in sys.stdlib_module_names


def _exported(module: ast.Module) -> list[str] | None:
    for node in module.body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]:
            return list(ast.literal_eval(node.value))
    return None


def _bound_names(node: ast.stmt) -> list[str]:
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [alias.asname or alias.name for alias in node.names]
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    return [ast.unparse(target) for target in node.targets] if isinstance(node, ast.Assign) else []
