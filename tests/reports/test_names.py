"""Tests of the default recipe and models of a comparison."""

import pytest

from vitarium.catalog import find_model
from vitarium.reports.names import DEFAULT_MODELS, FASHION_MODELS, default_models, default_recipe
from vitarium.training import load_recipe


@pytest.mark.parametrize(
    ("data", "recipe"),
    [
        (None, "fashion"),
        ("fashion", "fashion"),
        ("fashion:train=100", "fashion"),
        ("embedded:fashion", "fashion"),
        ("digits", "pico"),
        ("./fashion", "pico"),
        ("photos/fashion", "pico"),
    ],
)
def test_the_default_recipe_follows_the_data(data, recipe):
    assert default_recipe(data) == recipe


def test_the_default_models_follow_the_recipe():
    assert default_models(load_recipe("fashion")) == list(FASHION_MODELS)
    assert default_models(load_recipe("pico")) == list(DEFAULT_MODELS)
    assert default_models(load_recipe("sit_flow_pico")) == ["sit_flow_pico"]
    families = {name: find_model(name)[0].name if not name.startswith("timm/") else name for name in FASHION_MODELS}
    assert len(set(families.values())) == 6, "six different families"
