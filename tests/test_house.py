"""The floors of the house: imports go down, and never in a circle.

Reads the installed package, ``formats`` and ``gpu`` included, so that it sees what users get.
CONTRIBUTING.md says what each floor is for.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
from pathlib import Path

import kvtc_stream

#: From the ground up. A module belongs to the longest name here that begins its own; it may import
#: modules of its own floor, and of floors below.
FLOORS = (
    ("errors", "progress"),
    (
        "io.environment",
        "io.xxh3",
        "io.assembly",
        "io.threads",
        "io.memory",
        "io.steps",
        "io.storage",
    ),
    ("formats",),
    ("io.dlpack",),
    ("coding",),
    ("calibration",),
    ("planning",),
    ("backends", "gpu"),
    ("io.sources", "io.plain", "io.paged"),
    ("stream",),
    ("testing", ""),  # "" is the package's own __init__, which loads names when they are used
    ("integrations",),
    ("evaluation",),
    ("cli", "__main__"),
)
#: What may reach up: these import a GPU's arrays, or a backend, only when one is asked for.
LAZY = {("calibration.arrays", "gpu.arrays")}
#: Names of the package itself may be imported by these floors only.
TOP_LEVEL = {"__init__", "errors", "progress", "testing"}


def modules() -> dict[str, Path]:
    """Every module of the installed package, without the package's name, and its file."""
    found = {"": Path(kvtc_stream.__file__)}
    packages = ["kvtc_stream"]
    while packages:
        package = importlib.import_module(packages.pop())
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            spec = module.module_finder.find_spec(module.name, None)  # type: ignore[call-arg]
            assert spec is not None
            assert spec.origin is not None
            found[module.name.removeprefix("kvtc_stream.")] = Path(spec.origin)
            if module.ispkg:
                packages.append(module.name)
    for mapped in ("formats", "gpu"):  # an editable install maps these folders
        package = importlib.import_module(f"kvtc_stream.{mapped}")
        found[mapped] = Path(package.__file__ or "")
        for module in pkgutil.walk_packages(package.__path__, f"{mapped}."):
            path = Path(package.__file__ or "").parent.joinpath(*module.name.split(".")[1:])
            found[module.name] = path / "__init__.py" if module.ispkg else path.with_suffix(".py")
    return found


def is_type_checking(node: ast.If) -> bool:
    return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports_of(path: Path, known: set[str]) -> set[str]:
    """Modules of the package that a module imports, wherever in it, but for type checkers."""
    found: set[str] = set()
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and is_type_checking(node):
            pending += node.orelse
            continue
        pending += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "kvtc_stream":
                while ".".join(parts[1:]) not in known:
                    parts.pop()
                found.add(".".join(parts[1:]))
    return found


def floor_of(module: str) -> int:
    parts = module.split(".") if module else []
    for n in range(len(parts), -1, -1):
        prefix = ".".join(parts[:n])
        for floor, rooms in enumerate(FLOORS):
            if prefix in rooms and (prefix or not parts):
                return floor
    raise AssertionError(f"{module} stands on no floor: give it one in {__file__}")


FILES = modules()
IMPORTS = {
    module: imports_of(path, set(FILES)) - {module}
    for module, path in FILES.items()
    if not (module.endswith("__init__") and not module)
}


def test_imports_go_down() -> None:
    wrong = [
        f"{module} (floor {floor_of(module)}) imports {other} (floor {floor_of(other)})"
        for module, others in IMPORTS.items()
        for other in others
        if floor_of(other) > floor_of(module) and (module, other) not in LAZY
    ]
    assert not wrong, "\n".join(wrong)


def test_no_circles() -> None:
    """Neither at import time nor later: a module that needs one that needs it is one module."""
    done: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> None:
        if module in path:
            circle = (*path[path.index(module) :], module)
            raise AssertionError(f"import circle: {' → '.join(circle)}")
        if module not in done:
            for other in sorted(IMPORTS.get(module, ())):
                if (module, other) not in LAZY:
                    walk(other, (*path, module))
            done.add(module)

    for module in IMPORTS:
        walk(module, ())


def test_top_level_is_short() -> None:
    own = {module.name for module in pkgutil.iter_modules(kvtc_stream.__path__) if not module.ispkg}
    assert own <= TOP_LEVEL | {"__main__"}


def test_the_check_sees_what_is_wrong(tmp_path: Path) -> None:
    """An import within a function counts; one for type checkers does not."""
    file = tmp_path / "module.py"
    file.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from kvtc_stream.cli import terminal\n"
        "def f():\n    from kvtc_stream.stream.codec import Codec\n    import kvtc_stream as kvtc\n"
    )
    assert imports_of(file, set(FILES)) == {"stream.codec", ""}
    assert floor_of("stream.codec") > floor_of("coding.rans")
