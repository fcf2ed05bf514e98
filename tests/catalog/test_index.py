"""The index matches registrations and model costs in the code, and the runtime reads only the index."""

import dataclasses
import json
import random
from fractions import Fraction

import pytest

import vitarium
from vitarium.catalog import index as indexed
from vitarium.catalog.calling import example_inputs
from vitarium.catalog.index import INDEX_COMMAND, REFUSED, Law, Variant, entry_of, interpolate, is_written, read_index
from vitarium.catalog.registry import Family, find_model, registered_families
from vitarium.catalog.systems import systems
from vitarium.cli import index_costs, indexing
from vitarium.efficiency.profiler import count_macs, count_params, peak_memory, weight_bytes
from vitarium.errors import UsageError

STORED = indexing.stored()
HOMES = indexing.modules_by_entry()
SMALLEST = [min(f.variants.values(), key=lambda v: v.macs or v.params * 10**6) for f in read_index().families()]
"""One variant a family: the cheapest to run."""
ADVICE = f"run {INDEX_COMMAND} (make index)"


# ---- the file equals the code


def test_the_index_has_every_module_that_registers_something():
    assert set(STORED["entries"]) == set(HOMES), ADVICE
    assert [slug for slug in STORED["entries"] if slug in {s.slug for s in systems()}] == [s.slug for s in systems() if is_written(s)]
    assert set(STORED["foreign"]) == {f"timm/{name}" for name in indexing.importlib.import_module(indexing.FOREIGN).TIMM_PICO}, ADVICE


@pytest.mark.parametrize("slug", HOMES)
def test_what_a_system_registers(slug):
    fresh = indexing.registered_by(slug, HOMES[slug])
    fresh = {key: value for key, value in fresh.items() if value or key in ("module", "summary")}
    stored = {key: value for key, value in STORED["entries"][slug].items() if key != "families"}
    assert stored == json.loads(json.dumps(fresh)), ADVICE


@pytest.mark.parametrize("family", registered_families(), ids=lambda f: f.name)
def test_what_a_family_is(family: Family):
    """Names, arguments, weights, and the parameters of every variant, which are cheap to count."""
    entry = next(e for e in STORED["entries"].values() if family.name in e.get("families", {}))
    stored = entry["families"][family.name]
    fresh = indexing.family_row(family, {})
    assert {k: v for k, v in stored.items() if k != "variants"} == {k: v for k, v in fresh.items() if k != "variants"}, ADVICE
    assert list(stored["variants"]) == list(family.variants), ADVICE
    for variant, row in stored["variants"].items():
        model = index_costs.on_meta(f"{family.name}_{variant}")
        assert (row["params"], row["bytes"]) == (count_params(model), weight_bytes(model)), f"{family.name}_{variant}: {ADVICE}"
        assert row["arguments"] == {k: index_costs.plain(v) for k, v in family.arguments(variant).items()}, ADVICE
        assert row["preprocessing"] == index_costs.plain(model.preprocessing.to_dict()), ADVICE
        assert row.get("weights", {}) == {t: list(s) for t, s in family.weights.get(variant, {}).items()}, ADVICE


@pytest.mark.parametrize("variant", SMALLEST, ids=lambda v: v.name)
def test_what_a_model_costs(variant: Variant):
    """MACs by the profiler, which counts in another way than the generator, at the model's own size and at another one; memory for real."""
    assert variant.params == count_params(vitarium.create_model(variant.name))
    if variant.macs is None:
        assert index_costs.macs_at(index_costs.on_meta(variant.name), variant.image_size) is None, ADVICE
        return
    assert variant.macs == count_macs(index_costs.on_meta(variant.name), variant.image_size), ADVICE
    sizes = [size for size, value in variant.sizes.items() if value not in (None, REFUSED)]
    if sizes:
        size = random.Random(variant.name).choice(sizes)
        model = index_costs.on_meta(variant.name, image_size=size)
        cost = variant.cost(size)
        assert (cost.macs, cost.params, cost.bytes) == (count_macs(model, size), count_params(model), weight_bytes(model)), ADVICE
    model = index_costs.on_meta(variant.name) if variant.macs > 1e9 else vitarium.create_model(variant.name)
    assert variant.peak_memory == pytest.approx(peak_memory(model, example_inputs(model, 1, variant.image_size)), rel=0.1), ADVICE


def with_law() -> list[Variant]:
    """One variant a family that has one with a law: not the cheapest, which the other tests take."""
    found = [[v for v in f.variants.values() if v.law] for f in read_index().families()]
    return [min(variants[1:] or variants, key=lambda v: v.macs) for variants in found if variants]


@pytest.mark.parametrize("variant", with_law(), ids=lambda v: v.name)
def test_laws_are_right_to_two_percent(variant: Variant):
    """At two sizes that the generator has not seen."""
    law = variant.law
    unseen = [s for s in range(law.anchors[0], law.anchors[-1], law.step) if s not in variant.sizes and s != variant.image_size]
    for size in random.Random(variant.name).sample(unseen, min(2, len(unseen))):
        model = index_costs.on_meta(variant.name, image_size=size)
        cost = variant.cost(size)
        assert cost.macs == pytest.approx(count_macs(model, size), rel=0.02), size
        assert cost.params in (None, count_params(model)), size
        assert cost.bytes in (None, weight_bytes(model)), size


def test_most_models_have_macs_and_a_law():
    variants = [v for f in read_index().families() for v in f.variants.values()]
    assert sum(v.macs is not None for v in variants) > 0.85 * len(variants)
    assert sum(v.law is not None for v in variants) > 0.5 * len(variants)


def test_the_text_is_json_with_a_variant_a_line():
    text = indexing.text_of(STORED)
    assert json.loads(text) == STORED
    assert indexing.path().read_text(encoding="utf-8") == text
    assert any(line.strip().startswith('"tiny": {"image_size": 224') for line in text.splitlines())


# ---- the command


def test_one_entry_is_written_again_and_the_others_stay(tmp_path, monkeypatch, capsys):
    damaged = json.loads(json.dumps(STORED))
    damaged["entries"]["pitome"]["methods"] = {}
    (tmp_path / "index.json").write_text(json.dumps(damaged), encoding="utf-8")
    monkeypatch.setattr(indexing, "path", lambda: tmp_path / "index.json")
    assert indexing.main(["--check", "pitome"]) == 1
    assert "pitome.methods.pitome: None in the index" in capsys.readouterr().out
    assert indexing.main(["pitome"]) == 0
    assert indexing.stored() == STORED
    assert indexing.main(["--check", "pitome"]) == 0


def test_wrong_slugs_and_a_damaged_file(tmp_path, monkeypatch, capsys):
    assert indexing.main(["pitomme"]) == 2
    assert "did you mean pitome" in capsys.readouterr().err
    (tmp_path / "index.json").write_text("<<<<<<< HEAD", encoding="utf-8")
    monkeypatch.setattr(indexing, "path", lambda: tmp_path / "index.json")
    assert indexing.main(["pitome"]) == 2
    assert INDEX_COMMAND in capsys.readouterr().err


def test_differences_name_the_place():
    old = {"a": {"params": 1, "peak_memory": 100}, "b": 2}
    assert list(indexing.differences({"a": {"params": 1, "peak_memory": 109}, "b": 2}, old)) == []
    new = {"a": {"params": 2, "peak_memory": 120}}
    assert [line.split(":")[0] for line in indexing.differences(new, old)] == ["a.params", "a.peak_memory", "b"]


# ---- laws and costs


def test_interpolation_is_exact():
    assert interpolate(5, [(0, 1), (2, 9), (4, 33)]) == 51
    assert interpolate(10, [(0, 0), (3, 1), (6, 2)]) == round(Fraction(10, 3))


def test_a_law_is_found_where_there_is_one():
    def convolution_and_attention(size: int) -> int:
        return 7 + 11 * (size // 16) ** 2 + 3 * (size // 16) ** 4

    sizes = (32, 48, 64, 80, 128, 224, 256, 384)

    def measured(macs) -> dict:
        return {s: (macs(s), 1000, 4000) for s in sizes}

    assert index_costs.fitted(measured(convolution_and_attention)) == Law(16, (32, 128, 384))
    padded = measured(lambda s: convolution_and_attention(-(-s // 32) * 32))
    assert index_costs.fitted(padded) == Law(32, (32, 224, 384)), "48 and 80 pixels are padded"
    assert index_costs.fitted(measured(lambda s: s**3 * 1000)) is None
    assert index_costs.fitted({s: (s * s, 1, 4) for s in (32, 64, 128)}) is None, "three sizes determine a law and cannot test it"
    tables = {s: (s * s, (2 * s // 16 - 1) ** 2, 4) for s in (32, 64, 128, 256)}
    assert index_costs.fitted(tables).weights
    latents = {s: "refused" if s == 32 else (s * s, 1, 4) for s in (32, 64, 128, 256, 384)}
    assert index_costs.fitted(latents) == Law(64, (64, 256, 384)), "32 pixels were refused"
    odd = {s: (s * s, s**3, 4) for s in (32, 64, 128, 256)}
    assert not index_costs.fitted(odd).weights


def test_costs_at_other_sizes():
    variant = Variant("x", "x", 224, 100, 400, 10**6, 5000, sizes={64: 10**5, 128: [3 * 10**5, 90, 360], 32: REFUSED, 16: None})
    assert variant.cost().macs == variant.cost(224).macs == 10**6
    assert variant.cost(128).params == 90
    assert variant.cost(128).unknown == {"peak_memory"}
    assert variant.cost(16).macs is None
    assert "macs" not in variant.cost(16).unknown, "it is known that there are none"
    assert variant.cost(96).unknown == {"macs", "params", "bytes", "peak_memory"}
    buffers = dataclasses.replace(variant, sizes={64: [10**5, 100, 420]})
    assert (buffers.cost(96).params, buffers.cost(96).bytes) == (100, None)
    with pytest.raises(UsageError, match="cannot be built for 32 pixels"):
        variant.cost(32)
    no_macs = dataclasses.replace(variant, macs=None, sizes={})
    assert no_macs.cost(96).unknown == set()
    plain = dataclasses.replace(variant, sizes={64: 90_000, 448: 4_200_000}, law=Law(32, (64, 224, 448)))
    assert plain.cost(96).params == 100
    assert 90_000 < plain.cost(96).macs < 10**6
    assert plain.cost(100).macs is None, "no multiple of 32"
    assert plain.cost(512).macs is None, "outside of what was measured"


# ---- the runtime


@pytest.fixture
def without_swin(monkeypatch):
    """An index written before swin was, in a process that has not imported it."""
    from vitarium.catalog import registry, search

    whole = read_index()
    short = dataclasses.replace(whole, entries={slug: entry for slug, entry in whole.entries.items() if slug != "swin"})
    for module in (indexed, registry, search):
        monkeypatch.setattr(module, "read_index", lambda: short)
    monkeypatch.setattr(registry, "_FAMILIES", {k: f for k, f in registry._FAMILIES.items() if f.slug != "swin"})


def test_a_system_that_the_index_lacks_is_an_error_with_the_command(without_swin):
    for ask in (lambda: find_model("swin_tiny"), lambda: entry_of("swin"), lambda: vitarium.create_model("swin_tiny")):
        with pytest.raises(UsageError, match=f"the index lacks swin.*{INDEX_COMMAND} swin"):
            ask()


def test_a_model_that_is_no_longer_registered_is_an_error_with_the_command(monkeypatch):
    from vitarium.catalog import registry

    find_model("swin_tiny")
    monkeypatch.setattr(registry, "_FAMILIES", {})
    with pytest.raises(UsageError, match=INDEX_COMMAND):
        find_model("swin_tiny")


@pytest.mark.parametrize("text", ["", "{}", '{"format": 0}'])
def test_a_file_that_cannot_be_read(text, tmp_path, monkeypatch):
    (tmp_path / "index.json").write_text(text)
    monkeypatch.setattr(indexed.resources, "files", lambda package: tmp_path)
    with pytest.raises(UsageError, match=INDEX_COMMAND):
        read_index.__wrapped__()


def test_models_are_listed_by_cost():
    small = vitarium.list_models("*_pico", fits="params<0.2M", image_size=32)
    assert "swin_mlp_pico" in vitarium.list_models("swin*")
    assert small
    assert set(small) < set(vitarium.list_models("*_pico"))
    assert all(read_index().models[name][1].params < 2e5 for name in small)
    assert "swin_tiny" in vitarium.list_models(fits=["params<30M", "gmacs<4.6"], room="backbones")
    assert "swin_tiny" not in vitarium.list_models(fits="gmacs<4")
    with pytest.raises(UsageError, match="params<30M"):
        vitarium.list_models(fits="size<3")
