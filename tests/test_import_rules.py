"""Imports have one direction, so that shipped files are self-contained and parts can be read separately."""

from __future__ import annotations

import ast
import configparser
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import diffusers
import pytest

import diffusers_gfprune
from diffusers_gfprune.families.lookup import FAMILIES

PACKAGE = Path(diffusers_gfprune.__file__).parent
OURS = "diffusers_gfprune"

# From the bottom to the top: packages, and modules beside them. Each may import those before it; inside a
# package there are at most `MOST_LEVELS` levels. `tests/` and `benchmarks/` may import everything.
LAYERS = [
    *("version", "errors", "extras", "formatting", "argument_fields", "remote", "interruption", "distributed"),
    *("fingerprints", "precision"),
    "run_folder",
    *("diffusion", "families", "runtimes", "metrics", "loading", "pruning", "latency", "criteria", "configuration", "scoring"),
    "drawn_images",
    *("unit_choice", "ranking", "pruner", "one_shot", "model_spec", "pipeline_parts", "pipeline_pruning", "reports", "hub"),
    *("__init__", "trained_pipelines", "demo", "export", "data", "evaluation", "objectives", "training"),
]
# What `import diffusers_gfprune` must not load: it is for those who only load a pruned pipeline, too
HEAVY = ("data", "demo", "evaluation", "objectives", "training", "scripts")
# Levels of imports inside one package
MOST_LEVELS = 7
# What is saved with models and pipelines
SHIPPED = {
    **{family.pruned_class.__name__: family.pruned_class.source() for family in FAMILIES},
    "PruneDDPMPipeline": (PACKAGE / "remote/pipeline_prune_ddpm.py").read_text(),
}
ALL = sorted(PACKAGE.rglob("*.py"))


def imported_modules(statements: Iterator[ast.AST]) -> list[str]:
    """Full names of imported modules; a relative import starts with its dots."""
    found = []
    for node in statements:
        if isinstance(node, ast.Import):
            found.extend(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            dots = "." * node.level
            found.extend([f"{dots}{node.module}"] if node.module else [f"{dots}{alias.name}" for alias in node.names])
    return found


def module_level(tree: ast.Module) -> Iterator[ast.AST]:
    """Every statement that runs on import: all but the bodies of functions."""
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        yield node
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            pending.extend(ast.iter_child_nodes(node))


def relative_name(path: Path) -> str:
    """Path inside the package, as the id of a test."""
    return str(path.relative_to(PACKAGE))


def is_ours(module: str) -> bool:
    """Whether an imported name is a module of this package."""
    return module.startswith(".") or module.partition(".")[0] == OURS


def test_files_are_found() -> None:
    """Rules about no files would always hold."""
    assert {"GFPrunedUNet2DModel", "PruneDDPMPipeline"} <= SHIPPED.keys()
    assert len(ALL) > 80


def test_imports_are_seen_wherever_they_hide() -> None:
    """The parser below must see imports under `if`, `try` and in classes, but not the lazy ones in functions."""
    source = (
        "import a.b\nfrom . import c\nfrom ..d import e\nif 1:\n    import f\n"
        "try:\n    from g.h import i\nfinally:\n    pass\n"
        "class K:\n    import l\n    def m(self):\n        import n\n"
    )
    tree = ast.parse(source)
    assert sorted(imported_modules(module_level(tree))) == ["..d", ".c", "a.b", "f", "g.h", "l"]
    assert "n" in imported_modules(ast.walk(tree))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files_import_only_what_every_diffusers_user_has(name: str) -> None:
    """They run inside saved repositories, where this package is absent and relative imports fail from the Hub."""
    tree = ast.parse(SHIPPED[name])
    allowed = {*sys.stdlib_module_names, "torch", "diffusers", "safetensors"}
    for module in imported_modules(module_level(tree)):
        assert module.partition(".")[0] in allowed, module
    assert not [module for module in imported_modules(ast.walk(tree)) if module.startswith(".")]


def parts(path: Path) -> tuple[str, ...]:
    """Names of a module's packages and of itself, inside this package."""
    return path.relative_to(PACKAGE).with_suffix("").parts


@functools.cache
def parsed(path: Path) -> ast.Module:
    """A module, read once for all tests."""
    return ast.parse(path.read_text())


@functools.cache
def our_imports(path: Path, lazy: bool = True) -> set[tuple[str, ...]]:
    """Modules of this package that a module imports on import or, with `lazy`, anywhere."""
    found = set()
    for node in ast.walk(parsed(path)) if lazy else module_level(parsed(path)):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = parts(path)[: -node.level]
            module = (*base, *(node.module.split(".") if node.module else ()))
            names = [(*module, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == OURS:
            module = tuple(node.module.split(".")[1:])
            names = [(*module, alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")[1:]) for alias in node.names if alias.name.partition(".")[0] == OURS]
        else:
            continue
        for name in names:
            # A name is a module, or something in one, or something that the package exports
            known = next((name[:n] for n in (len(name), len(name) - 1) if n and is_module(name[:n])), ("__init__",))
            found.add(known)
    return found


def is_module(name: tuple[str, ...]) -> bool:
    """Whether there is such a module or package."""
    path = PACKAGE.joinpath(*name)
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def test_every_module_has_its_layer() -> None:
    """A new module belongs somewhere."""
    assert {parts(path)[0] for path in ALL} == set(LAYERS)


@pytest.mark.parametrize("path", ALL, ids=relative_name)
def test_imports_go_downwards(path: Path) -> None:
    """What scores knows nothing of what trains, and so on; lazy imports would be a way around."""
    layer = parts(path)[0]
    allowed = {*LAYERS[: LAYERS.index(layer)], *({layer} if len(parts(path)) > 1 else ())}
    assert {module[0] for module in our_imports(path)} <= allowed


@pytest.mark.parametrize("package", sorted(path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()))
def test_packages_are_shallow(package: str) -> None:
    """Modules depend on few other modules of their package."""
    imports = {parts(path): our_imports(path) for path in (PACKAGE / package).rglob("*.py")}

    def level(module: tuple[str, ...]) -> int:
        return 1 + max(
            (level(below) for below in imports.get(module, ()) if below[0] == package and below != module), default=0
        )

    assert max(map(level, imports)) <= MOST_LEVELS, max(imports, key=level)


def file_of(module: tuple[str, ...]) -> Path:
    """The file that an import of a module runs."""
    path = PACKAGE.joinpath(*module)
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def test_import_needs_only_a_plain_install() -> None:
    """What runs on `import diffusers_gfprune`, from module to module, imports no package of an extra."""
    pending, seen = [("__init__",)], set()
    while pending:
        module = pending.pop()
        if module not in seen:
            seen.add(module)
            # A module's packages run before it
            pending += [*our_imports(file_of(module), lazy=False), *(module[:n] for n in range(1, len(module)))]
    assert len(seen) > 80 and ("remote", "unet_2d_gfpruned") in seen
    assert not {module[0] for module in seen} & set(HEAVY)
    installed = {*sys.stdlib_module_names, *plain_install()}
    for module in seen:
        imported = imported_modules(module_level(parsed(file_of(module))))
        assert {name.partition(".")[0] for name in imported if not is_ours(name)} <= installed, module


def plain_install() -> set[str]:
    """Packages that `pip install .` brings, by the names that they are imported by."""
    settings = configparser.ConfigParser()
    settings.read(PACKAGE.parent / "setup.cfg")
    required = settings["options"]["install_requires"].split("\n")
    names = {line.partition(">=")[0] for line in required if line and not line.startswith("#")}
    return {{"pillow": "PIL"}.get(name, name) for name in names}


@pytest.mark.slow
def test_import_is_light() -> None:
    """Loading a pruned pipeline needs neither data sets nor training."""
    code = (
        f"import sys, {OURS}; print(*(name for name in sys.modules if name.startswith('{OURS}.')), 'datasets' in sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert loaded[-1] == "False"
    assert not [name for name in loaded if name.split(".")[1:2] and name.split(".")[1] in HEAVY]


def test_optional_packages_are_imported_when_used() -> None:
    """bitsandbytes is for those who train with it, runtimes are for those who export."""
    for path in ALL:
        imported = [module.partition(".")[0] for module in imported_modules(module_level(parsed(path)))]
        assert not {"bitsandbytes", "nncf", "onnx", "onnxruntime", "openvino"} & set(imported), path


def test_only_two_methods_reach_into_the_package_from_a_remote_file() -> None:
    """Lazy imports make one-call pruning and exports possible where the package is installed; more would need a reason.

    They are calls of `import_module`: Diffusers 0.42 looks for import statements in a repository's file, and tells users who
    lack a package to install what has its name on PyPI.
    """
    found = [module for text in SHIPPED.values() for module in imported_modules(ast.walk(ast.parse(text))) if is_ours(module)]
    assert found == []
    lazy = [name for text in SHIPPED.values() for name in re.findall(r'import_module\(f"{PACKAGE}\.(\w+)"\)', text)]
    assert lazy == ["one_shot", "export"] and sum(text.count("import_module(") for text in SHIPPED.values()) == 2


def test_import_registers_the_package_with_diffusers() -> None:
    """Without this attribute `from_pretrained` cannot resolve the library that model_index.json names."""
    registered = diffusers.pipelines.diffusers_gfprune
    assert registered.GFPrunedUNet2DModel is diffusers_gfprune.GFPrunedUNet2DModel
    assert registered.PruneDDPMPipeline is diffusers_gfprune.PruneDDPMPipeline
    with pytest.raises(ValueError, match="GradientFlowPruner is not a model class"):
        getattr(registered, "GradientFlowPruner")  # noqa: B009
    assert registered.ModelMixin is diffusers.ModelMixin  # Diffusers looks it up there


def test_public_names_exist() -> None:
    """What users import by name (DESIGN.md, section 5)."""
    wanted = {"GFPrunedUNet2DModel", "PruneDDPMPipeline", "GradientFlowPruner", "GFPruneConfig"}
    assert wanted <= set(diffusers_gfprune.__all__)
    assert all(hasattr(diffusers_gfprune, name) for name in diffusers_gfprune.__all__)
