"""A folder imports only from those above it, never sideways; transformers only where allowed."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent / "regard"
ORDER = (
    "engines",
    "tasks",
    "runtime",
    "attention",
    "models",
    "lens",
    "edit",
    "objectives",
    "studies",
    "report",
    "weights",
    "papers",
    "cli",
)
EVERYWHERE = {"errors", "registry"}
SYSTEMS = ("attention", "models", "lens", "edit", "objectives", "studies")
REGISTERS = {"lens", "edit", "mechanism", "model", "image_family", "objective", "study"}
MAY_USE_TRANSFORMERS = {"runtime", "models", "objectives", "tasks", "weights", "cli"}


def imported(path, root=ROOT):
    """Dotted names that a file imports, at the top or inside a function, relative ones resolved.

    What stands under `if TYPE_CHECKING:` is never run and does not count.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    unused = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in node.body
        for inner in ast.walk(child)
    }
    package = ["regard", *path.relative_to(root).parts[:-1]]
    for node in ast.walk(tree):
        if id(node) in unused:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            yield stem
            yield from (f"{stem}.{alias.name}" for alias in node.names)


def registers(path):
    """Whether a file is a system: it registers a class or function; the others are shared parts."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return any(
        isinstance(mark, ast.Call) and isinstance(mark.func, ast.Name) and mark.func.id in REGISTERS
        for node in tree.body
        if isinstance(node, ast.ClassDef | ast.FunctionDef)
        for mark in node.decorator_list
    )


def systems(root=ROOT):
    """(folder, file stem) of every system."""
    return {
        place(path.relative_to(root).with_suffix("").parts)
        for folder in SYSTEMS
        for path in (root / folder).rglob("*.py")
        if registers(path)
    }


def place(parts):
    """Layer and system of a dotted name's parts after `regard`: ('lens', 'sinks')."""
    return (parts[0] if parts else "", parts[1] if len(parts) > 1 else "")


def faults(root=ROOT):
    """Sentences about every import that goes the wrong way."""
    known = systems(root)
    files = {place(p.relative_to(root).with_suffix("").parts) for p in root.rglob("*.py")}

    def crosses(folder, other):
        """Whether this is a system, or a name taken from the folder's `__init__`, which holds them all."""
        return (folder, other) in known or (folder in SYSTEMS and other and (folder, other) not in files)

    names = {p.stem for p in root.rglob("*.py")} | {p.name for p in root.rglob("*") if p.is_dir()}
    for path in sorted(root.rglob("*.py")):
        here = path.relative_to(root).with_suffix("").parts
        layer, system = place(here)
        for name in sorted(set(imported(path, root))):
            parts = name.split(".")
            if parts[0] in {"transformers", "diffusers"} and layer not in MAY_USE_TRANSFORMERS:
                yield f"{path.relative_to(root)} imports {parts[0]}"
            if parts[0] != "regard" or len(parts) == 1 or layer.startswith("_"):
                continue
            target, other = place(parts[1:])
            if target in EVERYWHERE or layer in EVERYWHERE or target not in names:
                continue
            if target not in ORDER:
                yield f"{path.relative_to(root)} imports {name}: {target} has no place in the order"
            elif ORDER.index(target) > ORDER.index(layer):
                yield f"{path.relative_to(root)} imports {name}: {layer} stands above {target}"
            elif target == layer and system not in {other, "__init__"} and crosses(target, other):
                yield f"{path.relative_to(root)} imports {name}: a system imports no other system"


def test_imports_go_one_way():
    assert list(faults()) == []


def test_systems_are_recognised():
    assert "lens" in {folder for folder, _ in systems()}


def test_every_folder_has_a_place():
    folders = {p.name for p in ROOT.iterdir() if p.is_dir() and any(p.rglob("*.py"))}
    assert folders <= set(ORDER)


SYSTEM = '@lens("entropy")\nclass Entropy: ...\n'


@pytest.mark.parametrize(
    ("file", "text", "fault"),
    [
        ("engines/rows.py", "from regard.lens import x", "engines stands above lens"),
        ("engines/rows.py", "def f():\n    import regard.cli", "engines stands above cli"),
        ("runtime/run.py", "from ..lens.sinks import Sinks", "runtime stands above lens"),
        ("lens/sinks.py", "from regard.lens.entropy import x", "no other system"),
        ("lens/sinks.py", "from .entropy import x", "no other system"),
        ("lens/sinks.py", "from regard.lens import Entropy", "no other system"),
        ("lens/base.py", "from regard.lens.entropy import x", "no other system"),
        ("lens/__init__.py", "from regard.lens.entropy import x", None),
        ("engines/rows.py", "import transformers", "imports transformers"),
        ("edit/scale.py", "def f():\n    from transformers import x", "imports transformers"),
        ("lens/sinks.py", "from regard.runtime.tally import Tally", None),
        ("lens/sinks.py", "from regard.lens.base import x", None),
        ("runtime/run.py", "import transformers", None),
        (
            "edit/scale.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import regard.cli",
            None,
        ),
    ],
)
def test_a_wrong_import_is_seen(tmp_path, file, text, fault):
    for name in ("lens/entropy.py", "lens/sinks.py", "lens/base.py", "cli/__init__.py", file):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(SYSTEM if name == "lens/entropy.py" else "")
    (tmp_path / "runtime").mkdir(exist_ok=True)
    (tmp_path / file).write_text(text)
    found = list(faults(tmp_path))
    assert bool(found) == (fault is not None)
    assert fault is None or fault in found[0]
