"""The registry: lookup of families by name, renaming by tables, and import of only the requested file."""

import subprocess
import sys

import pytest
import torch

import vitarium
from vitarium.catalog import Family, families, family, find_model, find_system, rename, systems
from vitarium.catalog.registry import chain, import_system, join, system_module
from vitarium.errors import UsageError

ONE = torch.ones(1)


def test_systems_are_unique_and_complete():
    slugs = [s.slug for s in systems()]
    assert len(slugs) == len(set(slugs)) == 103
    assert find_system("swin").room == "backbones"
    with pytest.raises(UsageError, match="unknown system 'swim'; did you mean swin"):
        find_system("swim")


def test_names_lead_to_families(toy):
    found, variant = find_model("toy_deep")
    assert (found.name, variant, found.cls) == ("toy", "deep", toy)
    assert found.arguments("deep") == {"embed_dim": 8, "depth": 3}, "image_size is for the preprocessing where the class takes none"
    assert find_model("swin_mlp_pico")[0].name == "swin_mlp", "the longer prefix wins"
    assert find_model("swin_tiny")[0].name == "swin"


def test_lists_models_by_pattern(toy):
    assert vitarium.list_models("toy_*") == ["toy_small", "toy_wide", "toy_deep", "toy_fine"]
    assert {"swin_pico", "convnext_pico"} <= set(vitarium.list_models("*_pico"))
    assert vitarium.list_models("nothing*") == []


def test_families_of_one_system():
    assert {f.name for f in families("swin")} == {"swin", "swin_mlp"}
    assert all(isinstance(f, Family) for f in families())


def test_a_family_begins_with_its_slug():
    with pytest.raises(ValueError, match="must begin with its slug"):
        family("swin", name="twin", variants={})


def test_rename_takes_the_first_rule_that_finds_something():
    renamer = rename((r"^a\.", "b."), (r"^a", "c"), (r"mask$", None))
    assert renamer({"a.x": ONE, "ay": ONE, "z.mask": ONE, "other": ONE}).keys() == {"b.x", "cy", "other"}


def test_rename_refuses_to_lose_a_tensor():
    with pytest.raises(ValueError, match="two tensors would be called 'b'; the second is 'a'"):
        rename((r"^a$", "b"))({"b": ONE, "a": ONE})


def test_join_and_chain():
    state = {"x.query.weight": ONE, "x.key.weight": 2 * ONE, "x.value.weight": 3 * ONE, "y": ONE}
    joined = chain(join("qkv", "query", "key", "value"), rename((r"^x\.", "z.")))(state)
    assert joined["z.qkv.weight"].tolist() == [1, 2, 3]
    assert joined.keys() == {"z.qkv.weight", "y"}
    with pytest.raises(KeyError):
        join("qkv", "query", "key", "value")({"x.query.weight": ONE})


def test_systems_that_are_not_written_yet():
    missing = next(s.slug for s in systems() if system_module(s.slug) is None)
    assert not import_system(missing)
    assert families(missing) == []


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, vitarium; print([m for m in ('torch', 'timm', 'numpy', 'transformers', 'safetensors') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_finding_a_model_imports_only_its_file():
    code = (
        "import sys, vitarium; vitarium.create_model('convnext_pico');"
        "print([m for m in ('vitarium.backbones.swin', 'timm', 'transformers') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_the_front_door_names_what_it_has():
    assert set(vitarium.__all__) <= set(dir(vitarium))
    for name in vitarium.__all__:
        assert getattr(vitarium, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        vitarium.lod  # noqa: B018
