"""Limits on what is imported: by the package, by listing, by one backbone, by everything; and no circles between modules."""

import json
import os
import subprocess
import sys

import grimp
import pytest

HEAVY = (
    "captum", "diffusers", "datasets", "faiss", "jinja2", "lightning_fabric", "matplotlib", "onnx", "pandas", "plotly", "scipy", "skimage",
    "sklearn", "sympy", "timm", "torch._dynamo", "torch._inductor", "torchmetrics", "torchvision", "transformers",
)  # fmt: skip


def modules_after(code: str) -> set[str]:
    """Names in sys.modules after a program ran in a fresh process."""
    program = f"import sys, json\n{code}\nprint('MODULES', json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.rpartition("MODULES ")[2]))


def foreign(modules: set[str]) -> set[str]:
    """Packages that are neither ours nor Python's."""
    return {m.split(".")[0] for m in modules if not m.startswith("_")} - set(sys.stdlib_module_names) - {"vitarium", "sitecustomize"}


def rooms(modules: set[str]) -> set[str]:
    """Our rooms, and modules beside them, of which something was imported."""
    return {m.split(".")[1] for m in modules if m.startswith("vitarium.")}


@pytest.mark.parametrize(
    "code",
    ["import vitarium; vitarium.__version__", "import vitarium; assert len(vitarium.systems()) == 103", "import vitarium.catalog"],
)
def test_the_package_alone_imports_no_other(code):
    assert foreign(modules_after(code)) - foreign(modules_after("")) == set()


def test_listing_models_imports_no_other():
    code = "import vitarium; assert len(vitarium.list_models(fits='gmacs<2', image_size=128)) > 10"
    assert foreign(modules_after(code)) - foreign(modules_after("")) == set()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["systems"], "103 systems"),
        (["models"], "swin_tiny"),
        (["models", "--fits", "gmacs<2", "--image-size", "128"], "models fit"),
        (["info", "swin_tiny"], "28.3 M"),
        (["info", "swim_tiny"], "did you mean swin_tiny"),
        (["methods"], "sparse_prune"),
        (["methods", "--family", "pruning", "--training", "none"], "sparse_prune"),
        (["recipes"], "deit"),
        (["recipes", "swin_pico", "--task", "classify"], "deit"),
        (["--help"], "Usage"),
    ],
)
def test_commands_that_list_import_only_the_terminal(arguments, expected):
    code = "from typer.testing import CliRunner; from vitarium.cli.app import app\n"
    code += f"result = CliRunner().invoke(app, {arguments!r}); assert {expected!r} in result.output, result.output"
    modules = modules_after(code)
    assert not [m for m in ("torch", "numpy", "yaml", "PIL", *HEAVY) if m in modules]
    assert rooms(modules) <= {"catalog", "cli", "errors", "files", "numbers", "pages", "texts", "verbs", "version"}


def test_completion_reads_the_index():
    code = "from vitarium.cli.completion import complete_weights; assert 'swin_tiny.in1k' in complete_weights('swin_tiny.in')"
    assert "torch" not in modules_after(code)


def test_one_backbone_imports_no_other_family_and_nothing_heavy():
    modules = modules_after("import vitarium; vitarium.create_model('convnext_pico')")
    assert not [m for m in HEAVY if m in modules and m not in modules_after("import torch")]
    assert rooms(modules) <= {"backbones", "catalog", "errors", "files", "nn", "numbers", "ops", "version"}
    assert {m for m in modules if m.startswith("vitarium.backbones.")} == {"vitarium.backbones.convnext"}


def test_modules_that_register_something_import_nothing_heavy():
    """All of them in one process: learners, methods, explainers and models of every room."""
    code = (
        "from importlib import import_module; from vitarium.catalog.index import read_index\n"
        "for entry in read_index().entries.values():\n    import_module(entry.module)"
    )
    assert not [m for m in HEAVY if m in modules_after(code) and m not in modules_after("import torch")]


def test_there_are_no_circles():
    """Between modules, imports inside functions included; imports for type checkers alone do not count."""
    graph = grimp.build_graph("vitarium", exclude_type_checking_imports=True, cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert len(imports) > 300
    while leaves := [module for module, others in imports.items() if not others & set(imports)]:
        for module in leaves:
            del imports[module]
    while tops := set(imports) - {other for others in imports.values() for other in others}:
        imports = {module: others for module, others in imports.items() if module not in tops}
    assert sorted(imports) == [], "these modules import each other in a circle, or lie between two circles"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("vitarium info swin_ti", "swin_tiny_c24"),
        ("vitarium info swin_tiny.in", "swin_tiny.in1k"),
        ("vitarium claim swi", "swin"),
        ("vitarium systems --room effi", "efficiency/tokens"),
        ("vitarium predict x.jpg --apply pit", "pitome"),
        ("vitarium train dei", "deit"),
        ("vitarium recipes --task segm", "segment"),
        ("vitarium train pico --model convnext_p", "convnext_pico"),
    ],
)
def test_the_shell_completes_names_without_torch(words, expected):
    """What a shell runs at each press of the tab key."""
    code = (
        "import sys; from vitarium.cli import main\ntry:\n    main()\nexcept SystemExit:\n    pass\n"
        "print('torch' if 'torch' in sys.modules else 'light')"
    )
    environment = {"_VITARIUM_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=True)
    assert expected in done.stdout.split()
    assert done.stdout.split()[-1] == "light"
