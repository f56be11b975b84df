"""The structure of docs/architecture.md: layers without upward imports or cycles, modules of readable size."""

import ast
import importlib.util
import re

import pytest
from conftest import ROOT

from trialgpt_jax.__main__ import COMMANDS

PACKAGE = ROOT / "trialgpt_jax"
# From the bottom. `data` and `model` are on one level and import neither each other nor anything above.
LAYERS = (
    ("__init__", "aliases", "console", "faults", "live_line", "schema"),
    ("storage",),
    ("parallel",),
    ("data", "model"),
    ("training",),
    ("config_fields",),
    ("config",),
    ("config_file",),
    ("arguments", "help_text"),
    ("cli",),
    ("generation",),
    ("language_model",),
    ("evaluation",),
    tuple(COMMANDS),
    ("__main__",),
)
# Pure Python at the bottom of a package: importable from anywhere above `schema`.
PURE = ("trialgpt_jax.model.config", "trialgpt_jax.parallel.axes")


def modules() -> dict[str, str]:
    """Dotted name -> source."""
    names = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        dotted = "trialgpt_jax." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        names[dotted.removesuffix(".__init__")] = path.read_text()
    return names


def imports(source: str, known: dict[str, str]) -> set[str]:
    """Modules of this package that a source imports, inside functions too, but not for type checkers alone."""
    found, nodes = set(), [ast.parse(source)]
    for node in nodes:
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("trialgpt_jax")}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trialgpt_jax"):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in known else node.module)
    return found


def level(module: str) -> int:
    top = module.split(".")[1] if "." in module else "__init__"
    return next(i for i, names in enumerate(LAYERS) if top in names)


GRAPH = {name: imports(source, modules()) - {name} for name, source in modules().items()}


@pytest.mark.parametrize("module", GRAPH)
def test_a_module_imports_only_from_layers_below_or_its_own_package(module):
    package = module.rsplit(".", 1)[0]
    for target in GRAPH[module]:
        same = target.rsplit(".", 1)[0] == package and package != "trialgpt_jax"
        base = level(module) == level(target) == 0
        assert same or base or level(target) < level(module) or (target in PURE and module not in PURE), target
    if module in PURE:
        assert all(level(target) == 0 for target in GRAPH[module])


def test_there_is_no_import_cycle():
    done, path = set(), []

    def visit(module):
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            path.append(module)
            for target in GRAPH[module]:
                visit(target)
            done.add(path.pop())

    for module in GRAPH:
        visit(module)
    assert done == set(GRAPH)


@pytest.mark.parametrize("module", GRAPH)
def test_modules_can_be_read_in_one_sitting(module):
    limit = 200 if module.removeprefix("trialgpt_jax.") in COMMANDS else 350
    assert len(modules()[module].splitlines()) <= limit
    assert len(modules()["trialgpt_jax.model.gpt"].splitlines()) <= 190


def test_the_architecture_document_and_the_readme_name_every_module():
    document = (ROOT / "docs" / "architecture.md").read_text()
    readme = (ROOT / "README.md").read_text()
    for module in GRAPH:
        name = module.rsplit(".", 1)[-1]
        if module.count(".") and not (PACKAGE / name).is_dir():
            assert re.search(rf"\b{name}\.py\b", document), module
            assert re.search(rf"\b{name}\b", readme.split("## The code")[1]), module


def test_every_anchor_that_a_comment_points_at_exists():
    document = (ROOT / "docs" / "performance.md").read_text()
    headings = {
        re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).strip().replace(" ", "-")
        for line in document.splitlines()
        if line.startswith("#")
    }
    pointed = set()
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "scripts").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        pointed |= set(re.findall(r"performance\.md#([\w-]+)", path.read_text()))
    explicit = set(re.findall(r'<a (?:id|name)="([\w-]+)"', document))
    assert len(pointed) > 5 and pointed <= headings | explicit, pointed - headings - explicit


def test_every_mutation_changes_one_place_and_names_tests_that_exist():
    spec = importlib.util.spec_from_file_location("mutations", ROOT / "scripts/mutations.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for mutation in module.MUTATIONS:
        assert (PACKAGE / mutation.file).read_text().count(mutation.before) == 1, mutation
        assert mutation.before != mutation.after and mutation.tests, mutation
        for name in mutation.tests.split():
            assert (ROOT / f"tests/test_{name}.py").is_file(), mutation
