"""The rooms: imports run one way, without a circle; the operation library is reached by its face alone."""

import ast
from pathlib import Path

import pytest

import wanda_kernels.forward

ROOT = Path(__file__).parents[1]

# A room of wanda_fast -> the rooms that it may import, beside its own files.
FOUNDATION = {"errors", "memory", "timer", "report"}
MAY_IMPORT = {
    "errors": set(),
    "options": {"errors"},
    "memory": {"errors"},
    "timer": set(),
    "report": {"errors", "options"},
    "distributed": {"errors"},
    "model": FOUNDATION,
    "data": FOUNDATION | {"model"},
    "checkpoint": FOUNDATION | {"distributed", "model"},
    "inference": FOUNDATION | {"model", "checkpoint"},
    "hidden_states": FOUNDATION | {"distributed", "model", "data"},
    "pruning": FOUNDATION | {"distributed", "model", "hidden_states"},
    "output": FOUNDATION
    | {"options", "distributed", "model", "data", "checkpoint", "hidden_states", "pruning"},
    "run": FOUNDATION
    | {"options", "distributed", "model", "data", "checkpoint", "hidden_states", "pruning", "output"},
    "api": FOUNDATION | {"options", "run"},
    "cli": FOUNDATION
    | {
        "options",
        "distributed",
        "model",
        "data",
        "checkpoint",
        "pruning",
        "output",
        "run",
        "api",
        "inference",
    },
    "__main__": {"cli"},
    "__init__": {"api", "errors", "output", "pruning", "report", "data", "model", "inference"},
}
# The same for the operation library.
LIBRARY_MAY_IMPORT = {
    "mask_bits": set(),
    "column_squares": set(),
    "fp32_sums": set(),
    "loops": {"mask_bits"},
    "reference": {"mask_bits", "loops"},
    "native": {"mask_bits", "loops"},
    "triton_ops": {"mask_bits", "loops", "column_squares", "fp32_sums", "native"},
    "dispatch": {"mask_bits", "reference", "native", "triton_ops"},
    "hessian_factor": {"dispatch"},
    "host_hessian": {"dispatch", "fp32_sums", "native"},
    "doctor": {"dispatch", "native"},
    "forward": {"dispatch", "column_squares", "native", "triton_ops"},
    "operations": {"dispatch", "mask_bits", "loops", "hessian_factor"},
    "__init__": {"dispatch", "mask_bits", "hessian_factor", "host_hessian", "doctor", "operations"},
}
ROOMS = {"wanda_fast": MAY_IMPORT, "kernels/wanda_kernels": LIBRARY_MAY_IMPORT}
MOST_ENTRIES = {"wanda_fast": 18, "kernels/wanda_kernels": 14}


def imported(file: Path) -> list[str]:
    """Dotted names of what a file imports, at its top or inside of functions."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def modules(package: str) -> dict[str, Path]:
    """Dotted name of each module of a package -> its file."""
    folder = ROOT / package
    return {
        ".".join(file.relative_to(folder.parent).with_suffix("").parts): file for file in folder.rglob("*.py")
    }


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def module_of(name: str, known: dict[str, Path]) -> str | None:
    """The module that a dotted name is, or is a member of; a package stands as its `__init__`."""
    while name:
        for module in (name, f"{name}.__init__"):
            if module in known:
                return module
        name = name.rpartition(".")[0]
    return None


def edges(package: str) -> list[tuple[str, str]]:
    """(importing module, imported module) inside of a package."""
    known = modules(package)
    pairs = {(module, module_of(name, known)) for module, file in known.items() for name in imported(file)}
    return sorted((module, other) for module, other in pairs if other not in (None, module))


@pytest.mark.parametrize("package", list(ROOMS))
def test_imports_run_one_way(package):
    rooms, wrong = ROOMS[package], []
    for module, other in edges(package):
        room, target = room_of(module), room_of(other)
        assert room in rooms, f"{module} is in a room that this test does not know"
        if target not in rooms[room] | {room}:
            wrong.append(f"{module} imports {other}")
    assert not wrong


@pytest.mark.parametrize("package", list(ROOMS))
def test_rooms_form_no_circle(package):
    """Each room comes after all that it may import."""
    order = list(ROOMS[package])
    rooms = ROOMS[package].items()
    assert all(order.index(target) < order.index(room) for room, may in rooms for target in may)


@pytest.mark.parametrize("package", list(ROOMS))
def test_no_module_imports_itself_by_a_detour(package):
    graph: dict[str, set[str]] = {}
    for module, other in edges(package):
        graph.setdefault(module, set()).add(other)
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for other in graph.get(module, ()):
                visit(other, (*path, module))
            done.add(module)

    for module in list(graph):
        visit(module, ())


def test_wanda_fast_reaches_the_operation_library_by_its_face():
    """Its names, and those of the kernels of a block's forward: what the two list in `__all__`."""
    faces = {f"wanda_kernels.{name}" for name in ("forward", *wanda_kernels.__all__)}
    faces |= {f"wanda_kernels.forward.{name}" for name in wanda_kernels.forward.__all__}
    for module, file in modules("wanda_fast").items():
        for name in imported(file):
            if name.startswith("wanda_kernels."):
                assert name in faces, f"{module} imports {name}"


def test_the_operation_library_knows_no_models():
    for module, file in modules("kernels/wanda_kernels").items():
        for name in imported(file):
            assert name.split(".")[0] not in ("wanda_fast", "transformers"), f"{module} imports {name}"


@pytest.mark.parametrize("package", list(MOST_ENTRIES))
def test_a_package_can_be_seen_at_a_glance(package):
    entries = [entry.name for entry in (ROOT / package).iterdir() if entry.name != "__pycache__"]
    assert len(entries) <= MOST_ENTRIES[package], sorted(entries)
