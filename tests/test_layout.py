"""The import direction in README "Layout", how many names train.py imports, and why kernels/ has no __init__.py."""
import ast
import importlib.util
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LAYERS = [  # a module imports from its own room and the rows above; "" is minixmd/__init__.py
    {"kernels", "runs"},
    {"inputs", "tasks"},
    {"config"},
    {"models", "recipe_parts"},
    {"learning"},
    {""},
    {"stages"},
    {"train", "toy", "report", "verify"},
    {"dryrun"},  # it runs the steps of train.py on a model without weights
    {"runner"},
    {"recipes"},
]
WITHOUT_TORCH = {"config", "recipe_parts", "recipes", "tasks"}
TRAIN_NAMES = 40  # imported by train.py, at most
LIBRARY = sorted([*(ROOT / "minixmd").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


def _module(path):
    """minixmd/inputs/media.py -> minixmd.inputs.media; kernels/lora.py -> minixmd.kernels.lora."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("minixmd", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_module(path) for path in LIBRARY} | {"minixmd.kernels"}


def _imports(path):
    """Dotted names that a file imports, wherever in it; a name taken from a package is a module if there is one."""
    package = _module(path) if path.name == "__init__.py" else _module(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:
                yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base


def _room(module):
    """minixmd.inputs.media -> inputs; minixmd -> ""."""
    return (module.split(".") + [""])[1]


def _layer(module):
    found = [i for i, row in enumerate(LAYERS) if _room(module) in row]
    assert found, f"{module}: say in LAYERS where {_room(module)!r} stands"
    return found[0]


def test_kernels_is_never_top_level():
    assert not (ROOT / "kernels" / "__init__.py").exists()  # would shadow huggingface/kernels from the repo root
    spec = importlib.util.find_spec("kernels")
    assert spec is None or spec.origin is None or "site-packages" in spec.origin


def test_imports_point_one_way():
    for path in LIBRARY:
        inside = [name for name in _imports(path) if name.split(".")[0] == "minixmd"]
        if path.parent.name == "recipes":
            parts = {"minixmd.recipe_parts.sightsound", "minixmd.recipe_parts.xmd"}
            assert set(inside) <= {"minixmd.config", "minixmd.config.prompts", *parts}, path.name  # stages only
            continue
        for name in inside:
            allowed = _layer(name) < _layer(_module(path)) or _room(name) == _room(_module(path))
            assert allowed, f"{_module(path)} imports {name}, which does not stand above it in LAYERS"


def test_rooms_that_need_no_tensor_import_no_torch():
    for path in LIBRARY:
        if _room(_module(path)) in WITHOUT_TORCH:
            assert not {name.split(".")[0] for name in _imports(path)} & {"torch", "triton"}, _module(path)


def test_train_imports_few_names():
    names = []
    for node in ast.walk(ast.parse((ROOT / "minixmd" / "train.py").read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names += [alias.asname or alias.name for alias in node.names]
    assert len(names) <= TRAIN_NAMES, f"{len(names)} names: {', '.join(names)}"


def test_imports_form_no_cycle():
    graph = {}
    for path in LIBRARY:
        inside = {name for name in _imports(path) if name in MODULES} - {_module(path)}
        graph.setdefault(_module(path), set()).update(inside)
    TopologicalSorter(graph).prepare()  # raises CycleError, which lists the modules


def test_library_imports_no_tools_tests_or_bench():
    for path in LIBRARY:
        for name in _imports(path):
            top = name.split(".")[0]
            assert top not in {"tools", "tests", "bench", "conftest", "setup"}, f"{path.name} imports {name}"
            # minixmd/kernels.py names it for editors only, under TYPE_CHECKING
            assert top != "kernels" or path == ROOT / "minixmd" / "kernels.py", f"{path.name}: use minixmd.kernels"


def test_kernels_import_torch_triton_and_each_other_only():
    for path in (ROOT / "kernels").rglob("*.py"):
        others = {name.split(".")[0] for name in _imports(path) if not name.startswith("minixmd.kernels")}
        others -= {"torch", "triton"}
        assert not others, f"kernels/{path.name} imports {others}"


def test_setup_lists_every_package_and_data_file():
    call = next(node for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if isinstance(node, ast.Call))
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    found = {_module(path) for path in (ROOT / "minixmd").rglob("__init__.py")} | {"minixmd.kernels"}
    assert set(ast.literal_eval(given["packages"])) == found
    data = ast.literal_eval(given["package_data"])
    for path in (ROOT / "minixmd").rglob("*"):
        if path.is_file() and path.suffix not in (".py", ".pyc"):
            package = ".".join(path.parent.relative_to(ROOT).parts)
            patterns = data.get(package, [])
            assert any(path.match(pattern) for pattern in patterns), f"setup.py: {package} leaves out {path.name}"
