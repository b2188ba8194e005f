"""Imports run one way (DESIGN.md, section 4), so that shipped files stand alone and parts can be read one by one."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import diffusers
import pytest

import diffusers_gfprune

PACKAGE = Path(diffusers_gfprune.__file__).parent
TRAINING = PACKAGE.parent / "training"
OURS = "diffusers_gfprune"

REMOTE = sorted((PACKAGE / "remote").glob("*.py"))
# Modules that know nothing else of ours, as the remote files but for one lazy import.
LEAVES = [
    *(PACKAGE / f"{name}.py" for name in ("class_labels", "config_checks", "diffusion_process", "distributed", "model_card")),
    *(PACKAGE / f"{name}.py" for name in ("optimizer_state", "pixel_values", "registration", "schedules", "weight_checks")),
    *sorted((PACKAGE / "evaluation").glob("*.py")),
]
# All others, from the bottom to the top: each may import leaves, remote files and those before it.
LAYERS = [
    *("dependencies", "channel_groups", "cost_model", "budget", "configuration", "double_backward", "masking"),
    *("latency_model", "latency_calibration"),
    *("scoring_mode", "scoring_context", "hessian_product", "natural_flow", "importance"),
    *("compaction", "latency_budget", "pruner_state", "pruner", "diagnostics", "one_shot", "version", "hub"),
    *("loading_checks", "__init__"),
]
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
    assert {"unet_2d_gfpruned.py", "pipeline_prune_ddpm.py"} <= {path.name for path in REMOTE}
    assert {"schedules.py", "cost.py", "fidelity.py", "step_loss.py"} <= {path.name for path in LEAVES}
    assert len(ALL) > 15


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


@pytest.mark.parametrize("path", REMOTE, ids=relative_name)
def test_remote_files_import_only_what_every_diffusers_user_has(path: Path) -> None:
    """They run inside saved repositories, where this package is absent and relative imports fail from the Hub."""
    tree = ast.parse(path.read_text())
    allowed = {*sys.stdlib_module_names, "torch", "diffusers"}
    for module in imported_modules(module_level(tree)):
        assert module.partition(".")[0] in allowed, module
    assert not [module for module in imported_modules(ast.walk(tree)) if module.startswith(".")]


@pytest.mark.parametrize("path", LEAVES, ids=relative_name)
def test_leaves_import_nothing_of_ours(path: Path) -> None:
    """Schedules and evaluation can be read, tested and reused alone; lazy imports would hide a dependency.

    Files of `evaluation` may use each other, and know schedulers and class labels; cards word a speed-up as all others do.
    """
    found = [module for module in imported_modules(ast.walk(ast.parse(path.read_text()))) if is_ours(module)]
    beside = {f".{sibling.stem}" for sibling in path.parent.glob("*.py")} | {"..class_labels", "..diffusion_process"}
    allowed = {"evaluation": beside, PACKAGE.name: {".evaluation.speedup"} if path.stem == "model_card" else set()}
    assert set(found) <= allowed.get(path.parent.name, set())


def test_every_module_has_its_layer() -> None:
    """A new module belongs somewhere."""
    named = [PACKAGE / f"{name}.py" for name in LAYERS]
    assert sorted([*named, *LEAVES, *REMOTE]) == ALL


@pytest.mark.parametrize("name", LAYERS)
def test_layers_import_downwards(name: str) -> None:
    """What scores knows nothing of what prunes, and so on; lazy imports would be a way around."""
    tree = ast.parse((PACKAGE / f"{name}.py").read_text())
    found = {module.lstrip(".") for module in imported_modules(ast.walk(tree)) if is_ours(module)}
    below = {*LAYERS[: LAYERS.index(name)], *(path.stem for path in LEAVES if path.parent == PACKAGE)}
    assert {module for module in found if not module.startswith(("evaluation.", "remote."))} <= below


def test_optional_packages_are_imported_when_used() -> None:
    """bitsandbytes is for those who train with it."""
    for path in ALL:
        imported = [module.partition(".")[0] for module in imported_modules(module_level(ast.parse(path.read_text())))]
        assert "bitsandbytes" not in imported, path


def test_only_prune_reaches_into_the_package_from_a_remote_file() -> None:
    """One lazy import makes one-call pruning possible where the package is installed; a second would need a reason."""
    lazy = [module for path in REMOTE for module in imported_modules(ast.walk(ast.parse(path.read_text()))) if is_ours(module)]
    assert lazy == ["diffusers_gfprune.one_shot"]


@pytest.mark.parametrize("path", ALL, ids=relative_name)
def test_library_does_not_import_training(path: Path) -> None:
    """Scripts know the library; the installed library has no scripts beside it."""
    scripts = {"training", *(script.stem for script in TRAINING.glob("*.py"))}
    for module in imported_modules(ast.walk(ast.parse(path.read_text()))):
        assert module.lstrip(".").partition(".")[0] not in scripts, module


def test_import_registers_the_package_with_diffusers() -> None:
    """Without this attribute `from_pretrained` cannot resolve the library that model_index.json names."""
    registered = diffusers.pipelines.diffusers_gfprune
    assert registered.GFPrunedUNet2DModel is diffusers_gfprune.GFPrunedUNet2DModel
    assert registered.PruneDDPMPipeline is diffusers_gfprune.PruneDDPMPipeline
    with pytest.raises(ValueError, match="GradientFlowPruner is no class"):
        getattr(registered, "GradientFlowPruner")  # noqa: B009
    assert registered.ModelMixin is diffusers.ModelMixin  # Diffusers looks it up there


def test_public_names_exist() -> None:
    """What users import by name (DESIGN.md, section 5)."""
    wanted = {"GFPrunedUNet2DModel", "PruneDDPMPipeline", "GradientFlowPruner", "GFPruneConfig"}
    assert wanted <= set(diffusers_gfprune.__all__)
    assert all(hasattr(diffusers_gfprune, name) for name in diffusers_gfprune.__all__)
