"""The plan of the house, as checks: each runs on this tree, and on a made-up one that breaks it."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import repo_checks

ROOT = Path(__file__).resolve().parent.parent

PUBLIC_NAMES = [
    "Chat",
    "Engine",
    "Model",
    "ParsedOutput",
    "Reply",
    "SamplingParams",
    "Token",
    "TokenStream",
    "Tokenizer",
    "generate",
    "load",
    "parse_output",
    "stream",
    "tool",
]

SLOW_IMPORTS = ["transformers", "mlx_lm", "torch", "sentencepiece", "huggingface_hub"]
"""What costs up to a second to import and most programs never need."""

INVENTED_PATHS = ["examples/tiny/tiny_words.py"]
"""What makes up paths to train on."""

MAP = """
| row | rooms | what |
|---|---|---|
| 0 | `errors`, `types` | values |
| 8 | `load` | files |
| 12 | `lfm_mlx` itself, `cli` | commands |
| – | `convert` | converter |
"""

HOUSE = {
    "lfm_mlx/__init__.py": '"""It."""\nfrom lfm_mlx.load import load\n__all__ = ["load"]\n',
    "lfm_mlx/errors.py": '"""Errors."""\n',
    "lfm_mlx/types.py": '"""Types."""\nfrom lfm_mlx import errors\n',
    "lfm_mlx/load.py": '"""Load."""\nimport numpy\nfrom lfm_mlx.types import A\ndef load():\n    """Load."""\n',
    "lfm_mlx/cli.py": '"""Commands."""\nimport json\nfrom lfm_mlx import load\n',
    "convert/__init__.py": '"""Convert."""\nfrom .writer import write\n__all__ = ["write"]\n',
    "convert/writer.py": '"""Write."""\nfrom lfm_mlx.load import load\ndef write():\n    """Write."""\n',
    "tests/test_load.py": "",
    "tests/convert/test_writer.py": "",
}
"""A small tree in which everything is right."""

PYPROJECT = (
    'dependencies = [\n    "numpy>=1",\n    "mlx-lm>=0",\n]\npackages = [\n    "lfm_mlx",\n    "lfm_mlx.convert",\n]\n'
)


@pytest.fixture(scope="module")
def tree() -> dict[str, str]:
    return repo_checks.read_tree(ROOT)


@pytest.fixture(scope="module")
def readme(tree: dict[str, str]) -> str:
    return tree["README.md"]


def house(path: str, text: str) -> dict[str, str]:
    """The small tree with one more file, or another text in one."""
    return HOUSE | {path: text}


def refuse(problems: list[str]) -> None:
    """Fail with all problems, one a line."""
    assert not problems, "\n".join(problems)


def test_the_readme_maps_every_room_and_no_other(tree: dict[str, str], readme: str) -> None:
    refuse(repo_checks.check_map(readme, tree))


def test_a_room_missing_from_the_map_or_from_disk_is_found() -> None:
    assert repo_checks.check_map(MAP, HOUSE) == []
    assert repo_checks.check_map(MAP, house("lfm_mlx/step.py", "")) == ["step is not in the map"]
    assert repo_checks.check_map(MAP.replace("`load`", "`load`, `hub`"), HOUSE) == ["hub is in the map only"]


def test_imports_go_downwards_in_the_map(tree: dict[str, str], readme: str) -> None:
    refuse(repo_checks.check_import_order(readme, tree))


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("lfm_mlx/load.py", "from lfm_mlx.cli import group"),
        ("lfm_mlx/load.py", "import lfm_mlx.cli"),
        ("lfm_mlx/load.py", "from lfm_mlx import load, stream"),
        ("lfm_mlx/load.py", "def load():\n    from lfm_mlx import cli"),
        ("lfm_mlx/load.py", "from lfm_mlx.convert.writer import write"),
        ("lfm_mlx/errors.py", "from lfm_mlx.types import A"),
        ("convert/writer.py", "from lfm_mlx.step import step"),
    ],
)
def test_an_import_that_goes_upwards_is_found(path: str, text: str) -> None:
    assert repo_checks.check_import_order(MAP, HOUSE) == []
    assert len(repo_checks.check_import_order(MAP, house(path, text))) >= 1


def test_the_converter_imports_nothing_of_the_rows_after_loading(tree: dict[str, str], readme: str) -> None:
    later = {room for row in repo_checks.rooms_of_map(readme.partition("| 9 |")[2]) for room in row} - {"convert"}
    files = repo_checks.python_files(tree, "convert")
    modules = {repo_checks.module_of(path) for path in repo_checks.runtime_files(tree)}
    names = {name for path, text in files.items() for _, name in repo_checks.imports_of(path, text, modules)}
    rooms = {name.split(".")[1] for name in names if name.startswith("lfm_mlx.")}
    assert {"cli", "generate"} <= later
    assert {"errors", "config"} <= rooms
    assert not rooms & later


def test_only_declared_dependencies_are_imported(tree: dict[str, str]) -> None:
    refuse(repo_checks.check_dependencies(tree["pyproject.toml"], tree))


def test_an_undeclared_import_is_found() -> None:
    assert repo_checks.check_dependencies(PYPROJECT, HOUSE) == []
    local = house("lfm_mlx/load.py", "def load():\n    import pandas.core")
    assert repo_checks.check_dependencies(PYPROJECT, local) == [
        "lfm_mlx/load.py:2 imports pandas.core, which pyproject.toml does not declare"
    ]


def test_every_package_is_installed(tree: dict[str, str]) -> None:
    refuse(repo_checks.check_packages(tree["pyproject.toml"], tree))


def test_a_package_that_is_not_installed_is_found() -> None:
    assert repo_checks.check_packages(PYPROJECT, HOUSE) == []
    assert repo_checks.check_packages(PYPROJECT, house("lfm_mlx/cache/__init__.py", "")) != []
    assert repo_checks.check_packages(PYPROJECT.replace("convert", "server"), HOUSE) == [
        "lfm_mlx.convert is not installed",
        "lfm_mlx.server is installed and does not exist",
    ]


def test_public_names_are_those_that_are_promised() -> None:
    package = importlib.import_module("lfm_mlx")
    assert package.__all__ == PUBLIC_NAMES
    assert all(getattr(package, name).__doc__ for name in PUBLIC_NAMES)


def test_names_that_the_readme_imports_are_public(readme: str) -> None:
    imported = re.findall(r"^from lfm_mlx import (.+)$", readme, re.MULTILINE)
    assert imported
    assert {name.strip() for names in imported for name in names.split(",")} <= set(PUBLIC_NAMES)


def test_every_package_exports_what_it_has(tree: dict[str, str]) -> None:
    refuse(repo_checks.check_exports(tree))


def test_an_export_that_does_not_exist_or_is_forgotten_is_found() -> None:
    assert repo_checks.check_exports(HOUSE) == []
    assert repo_checks.check_exports(house("convert/__init__.py", '__all__ = ["lost"]')) == [
        "convert/__init__.py exports lost, which it does not have"
    ]
    assert repo_checks.check_exports(house("convert/__init__.py", "from .writer import write\n__all__ = []")) == [
        "convert/__init__.py imports write and does not export it"
    ]
    assert repo_checks.check_exports(house("convert/__init__.py", "from .writer import write")) == [
        "convert/__init__.py has no __all__"
    ]


def test_every_public_function_and_class_has_a_docstring(tree: dict[str, str]) -> None:
    refuse(repo_checks.check_docstrings(tree))


def test_a_missing_docstring_is_found() -> None:
    assert repo_checks.check_docstrings(HOUSE) == []
    assert repo_checks.check_docstrings(house("lfm_mlx/load.py", '"""Load."""\nclass Loaded:\n    x = 1')) == [
        "lfm_mlx/load.py:2 Loaded has no docstring"
    ]


def test_file_names_are_unique_and_say_something(tree: dict[str, str]) -> None:
    refuse(repo_checks.check_names(tree))


def test_a_name_used_twice_or_a_vague_one_is_found() -> None:
    assert repo_checks.check_names(HOUSE) == []
    assert repo_checks.check_names(house("convert/load.py", "")) == ["load.py exists 2 times"]
    assert repo_checks.check_names(house("lfm_mlx/utils.py", "")) == ["utils.py says nothing about what is in it"]


def test_tests_mirror_the_sources(tree: dict[str, str]) -> None:
    refuse(repo_checks.check_mirrored(tree))


def test_a_test_in_a_wrong_place_is_found() -> None:
    assert repo_checks.check_mirrored(house("tests/test_whole.py", "")) == []
    assert repo_checks.check_mirrored(house("tests/test_writer.py", "")) == [
        "tests/test_writer.py tests convert/writer.py, expected it in tests/convert"
    ]
    assert repo_checks.check_mirrored(house("tests/attic/test_whole.py", "")) == [
        "tests/attic/test_whole.py: there is no room attic"
    ]


def test_files_hold_one_noun(tree: dict[str, str]) -> None:
    refuse(repo_checks.check_lengths(tree))


def test_a_file_that_is_too_long_is_found() -> None:
    assert repo_checks.check_lengths(house("lfm_mlx/load.py", "\n" * 400)) == []
    assert repo_checks.check_lengths(house("lfm_mlx/load.py", "\n" * 401)) == [
        "lfm_mlx/load.py has 401 lines, expected at most 400"
    ]


def test_the_readme_names_only_make_targets_that_exist(tree: dict[str, str], readme: str) -> None:
    refuse(repo_checks.check_make_targets(readme, tree["Makefile"]))


def test_a_make_target_that_does_not_exist_is_found() -> None:
    text = "Then they make sense.\n```sh\nmake demo\n```\nand `make lunch`"
    assert repo_checks.check_make_targets(text, "demo: setup\n\tsleep 1\n") == [
        "make lunch is in the README and not in the Makefile"
    ]


def test_continuous_integration_runs_what_contributors_run(tree: dict[str, str]) -> None:
    commands = [line for line in tree[".ci/run"].splitlines() if line and not line.startswith(("#", "set ", "cd "))]
    assert commands == ["make check", "make test"]


def test_links_of_the_readme_lead_somewhere(readme: str) -> None:
    refuse(repo_checks.check_links(readme, ROOT))


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "here.md").touch()
    text = "[a](here.md#part), [b](https://nowhere.example/x), [c](gone.md)"
    assert repo_checks.check_links(text, tmp_path) == ["the README links to gone.md, which does not exist"]


def test_no_file_names_a_machine(tree: dict[str, str]) -> None:
    refuse(repo_checks.check_no_machine({path: text for path, text in tree.items() if path not in INVENTED_PATHS}))


@pytest.mark.parametrize(
    "parts",
    [
        ("model = '", "/ro", "ot/model'"),
        ("cd ", "/wo", "rk"),
        ("cd '", "/ho", "me/me'"),
        ("open('", "/t", "mp/x')"),
        ("--index", "-url x"),
        ("https:", "//py", "pi.example/simple"),
    ],
)
def test_a_path_or_package_index_of_a_machine_is_found(parts: tuple[str, ...]) -> None:
    innocent = "a/work/b, ~/home, models/tmp/x, https://example.org/home/x, {root}/work"
    assert repo_checks.check_no_machine({"a.md": innocent}) == []
    assert len(repo_checks.check_no_machine({"a.md": innocent, "b.md": "".join(parts)})) == 1


def test_importing_the_package_imports_nothing_slow() -> None:
    assert imported_by("import lfm_mlx") == []
    assert imported_by("import lfm_mlx, sentencepiece") == ["sentencepiece"]


def imported_by(statement: str) -> list[str]:
    """Which of the slow modules a new process has after `statement`."""
    code = f"import sys; {statement}; print(*[name for name in {SLOW_IMPORTS} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.split()
