"""The cost of ``import minidiff``, and the layers of its modules: imports point down only, without circles."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import minidiff

ROOT = Path(__file__).resolve().parents[2]

# Which floor a module stands on: it imports from its own floor and from those below. A package's entry holds for all
# that is in it, unless a longer name has its own. Whoever adds a module says here where it stands.
LAYERS: dict[str, int] = {
    "minidiff.errors": 0,
    "minidiff.version": 0,
    "minidiff.config": 1,
    "minidiff.console": 1,
    "minidiff.page": 1,
    "minidiff.console.spelling": 0,
    "minidiff.storage": 1,
    "minidiff.storage.identity": 2,
    "minidiff.storage.checkpoint": 4,
    "minidiff.storage.low_memory": 4,
    "minidiff.schedule": 2,
    "minidiff.philox": 2,
    "minidiff.pipeline.png": 2,
    "minidiff.pipeline.metadata": 2,
    "minidiff.pipeline.image_files": 2,
    "minidiff.pipeline.colour_profile": 2,
    "minidiff.models": 3,
    "minidiff.noise": 3,
    "minidiff.precision": 3,
    "minidiff.samplers": 3,
    "minidiff.programs": 4,
    "minidiff.pipeline": 5,
    "minidiff.adapters": 6,
    "minidiff.adapters.control": 5,
    "minidiff.fast": 6,
    "minidiff.parity": 7,
    "minidiff.export": 7,
    "minidiff.training": 7,
    "minidiff": 8,  # the public names, gathered from everything below
    "weights_convert": 9,
    "minidiff.explain": 9,  # reads the package's own place
    "minidiff.cli": 10,
    "minidiff.__main__": 11,
    "weights_convert.__main__": 11,
}

# Imported inside the functions that need them, or not at all (torch brings a part of torch.distributed itself).
NOT_AT_IMPORT = ("torchvision", "PIL", "tqdm", "torch.distributed", "torch._dynamo", "torch._inductor")
NEVER = ("weights_convert", "diffusers", "transformers", "accelerate", "scipy", "torchsde")


def module_files() -> dict[str, Path]:
    """Every module of both packages by its dotted name."""
    files = {}
    for package in ("minidiff", "weights_convert"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


FILES = module_files()


def imports(name: str, source: str, files: dict[str, Path]) -> list[tuple[str, bool]]:
    """The modules among ``files`` that module ``name`` imports, and whether each import is inside a function.

    What only the type checker reads (``if TYPE_CHECKING:``) does not count.
    """
    found: list[tuple[str, bool]] = []
    is_package = name in files and files[name].name == "__init__.py"

    def visit(node: ast.AST, lazy: bool) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        targets: list[str] = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = name.split(".")
            base = ".".join(parts[: len(parts) - node.level + is_package]) if node.level else ""
            origin = ".".join(p for p in (base, node.module) if p)
            # `from package import module` names a module, anything else a thing that `origin` defines.
            inner = [f"{origin}.{alias.name}" for alias in node.names]
            targets = [target if target in files else origin for target in inner]
        found.extend((target, lazy) for target in targets if target in files and target != name)
        for child in ast.iter_child_nodes(node):
            visit(child, lazy or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))

    visit(ast.parse(source), False)
    return found


def layer(name: str) -> int:
    """The floor of the longest entry of LAYERS that holds ``name``; the bare "minidiff" holds nothing but itself."""
    parts = name.split(".")
    prefixes = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    for prefix in prefixes:
        if prefix in LAYERS and (prefix != "minidiff" or name == "minidiff"):
            return LAYERS[prefix]
    raise AssertionError(f"{name} is not in LAYERS of tests/unit/test_imports.py: add on which floor it stands")


def upward(graph: dict[str, list[tuple[str, bool]]]) -> list[str]:
    """The imports that break the order of the floors."""
    wrong = []
    for name, targets in graph.items():
        for target, lazy in targets:
            converter = target.startswith("weights_convert") and name.startswith("minidiff")
            if layer(target) > layer(name):
                wrong.append(f"{name} imports {target}, which stands above it")
            if converter and not (name.startswith("minidiff.cli") and lazy):
                wrong.append(f"{name} imports {target}: only minidiff.cli may, and inside a function")
    return wrong


def circles(graph: dict[str, list[tuple[str, bool]]]) -> list[str]:
    """Every circle of imports, as the chain that closes it."""
    found: list[str] = []
    done: set[str] = set()

    def walk(name: str, chain: list[str]) -> None:
        if name in chain:
            found.append(" -> ".join([*chain[chain.index(name) :], name]))
        elif name not in done:
            for target, _ in graph.get(name, []):
                walk(target, [*chain, name])
            done.add(name)

    for name in graph:
        walk(name, [])
    return found


def source_graph() -> dict[str, list[tuple[str, bool]]]:
    return {name: imports(name, path.read_text(encoding="utf-8"), FILES) for name, path in FILES.items()}


def fresh(code: str) -> list[str]:
    """The lines that ``code`` prints in an interpreter of its own."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.fixture(scope="module")
def added() -> set[str]:
    """The modules that using every public name of minidiff loads beyond what its dependencies load themselves."""
    listing = "; import sys; print('\\n'.join(sys.modules))"
    base = set(fresh("import torch, einops, numpy, safetensors, safetensors.torch" + listing))
    return set(fresh("from minidiff import *" + listing)) - base


def test_import_loads_only_the_dependencies(added: set[str]) -> None:
    known = {"torch", "einops", "numpy", "safetensors", "minidiff"} | set(sys.stdlib_module_names)
    assert "minidiff" in added
    assert sorted(name for name in added if name.split(".")[0] not in known) == []


@pytest.mark.parametrize("package", [*NOT_AT_IMPORT, *NEVER])
def test_import_leaves_out(package: str, added: set[str]) -> None:
    assert sorted(name for name in added if inside(name, package)) == []


@pytest.mark.parametrize(("old", "new"), list(minidiff.ALIASES.items()))
def test_modules_answer_to_their_earlier_names(old: str, new: str) -> None:
    """Both ``from minidiff import lora`` and ``import minidiff.lora`` give the one module that there is."""
    package, _, name = f"minidiff.{old}".rpartition(".")
    code = f"import minidiff.{old}; from {package} import {name} as it; import minidiff.{new}, sys; "
    code += f"print(it is minidiff.{new} is sys.modules['minidiff.{old}'], it.__spec__.name, it.__name__)"
    assert fresh(code) == ["True", f"minidiff.{new}", f"minidiff.{new}"]


def test_what_lies_in_a_renamed_package_is_not_loaded_twice() -> None:
    code = "import minidiff.conventions.profiles as a, minidiff.programs.profiles as b; print(a is b)"
    assert fresh(code) == ["True"]


def test_import_is_quiet() -> None:
    code = "import minidiff, torch; print(torch.is_grad_enabled(), torch.get_default_dtype())"
    assert fresh(code) == ["True", "torch.float32"]


def test_loading_draws_no_weights() -> None:
    """Or torch would fetch its compiler, which takes longer than all the rest (see ``checkpoint._Undrawn``)."""
    code = "import sys, minidiff; minidiff.bundled(); print('torch._dynamo' in sys.modules)"
    assert fresh(code) == ["False"]


def test_every_module_imports_alone() -> None:
    """Each is the first of its package to be imported: what it needs, it imports itself."""
    names = [name for name in FILES if not name.endswith("__main__")]
    code = f"""
import importlib, sys, torch, traceback
for name in {names!r}:
    for loaded in [m for m in sys.modules if m.split(".")[0] in ("minidiff", "weights_convert")]:
        del sys.modules[loaded]
    try:
        importlib.import_module(name)
    except Exception:
        traceback.print_exc()
        sys.exit(f"import {{name}} failed")
"""
    fresh(code)


def test_arrows_point_down() -> None:
    assert upward(source_graph()) == []


def test_no_circles() -> None:
    assert circles(source_graph()) == []


@pytest.mark.parametrize(
    ("name", "source", "complaint"),
    [
        ("minidiff.config", "import minidiff.pipeline", "stands above"),
        ("minidiff.config", "from minidiff import pipeline", "stands above"),
        ("minidiff.config", "from .pipeline import load", "stands above"),
        ("minidiff.config", "def f() -> None:\n    from minidiff.pipeline import load", "stands above"),
        ("minidiff.pipeline", "from minidiff import StableDiffusion", "stands above"),
        ("minidiff.pipeline", "def f() -> None:\n    import weights_convert", "only minidiff.cli may"),
        ("minidiff.cli", "import weights_convert", "inside a function"),
    ],
)
def test_an_upward_arrow_is_seen(name: str, source: str, complaint: str) -> None:
    files = {
        n: Path(n) for n in ("minidiff", "minidiff.config", "minidiff.pipeline", "minidiff.cli", "weights_convert")
    }
    assert any(complaint in line for line in upward({name: imports(name, source, files)}))


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("minidiff.pipeline", "from minidiff.config import SD15"),
        ("minidiff.cli", "def f() -> None:\n    import weights_convert"),
        ("minidiff.config", "if TYPE_CHECKING:\n    from minidiff.pipeline import load"),
    ],
)
def test_a_downward_arrow_is_fine(name: str, source: str) -> None:
    files = {
        n: Path(n) for n in ("minidiff", "minidiff.config", "minidiff.pipeline", "minidiff.cli", "weights_convert")
    }
    assert upward({name: imports(name, source, files)}) == []


def test_a_circle_is_seen() -> None:
    graph = {"a": [("b", False)], "b": [("c", True)], "c": [("a", False)], "d": [("a", False)]}
    assert circles(graph) == ["a -> b -> c -> a"]


def test_a_module_without_a_floor_is_refused() -> None:
    with pytest.raises(AssertionError, match=r"minidiff\.surprise is not in LAYERS"):
        layer("minidiff.surprise")
