"""The rule of recommendation says what the numbers support, and no more."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest

from vitarium.reports.recommend import Baseline, pareto_front, recommend, standard_error, unbeaten
from vitarium.training.tasks import Metric


@dataclass
class Model:
    name: str
    score: float
    latency_ms: float
    evaluated: int = 400


def test_standard_error_is_binomial_and_never_nothing():
    assert standard_error(0.9, 400) == pytest.approx(math.sqrt(0.9 * 0.1 / 400), rel=0.01)
    assert standard_error(1.0, 100) > 0
    assert math.isnan(standard_error(0.5, 0))


def test_clear_winner_is_recommended_whatever_it_costs():
    choice = recommend([Model("slow", 0.98, 9.0), Model("fast", 0.90, 1.0)])
    assert choice.model == "slow"
    assert "ahead of all others by more than the noise" in str(choice)


def test_within_the_noise_the_faster_one_is_recommended():
    choice = recommend([Model("slow", 0.980, 9.0), Model("fast", 0.975, 3.0), Model("wrong", 0.6, 1.0)])
    assert choice.model == "fast"
    assert "3.0 times faster" in choice.sentence
    assert "slow at 98.0 %" in choice.sentence


def test_a_little_faster_is_no_reason():
    choice = recommend([Model("best", 0.980, 1.2), Model("other", 0.975, 1.0)])
    assert choice.model == "best"
    assert "other comes within the noise" in choice.sentence
    assert "none is clearly faster" in choice.sentence


def test_more_images_make_less_noise():
    few = [Model("slow", 0.980, 9.0, 400), Model("fast", 0.975, 3.0, 400)]
    many = [Model("slow", 0.980, 9.0, 40_000), Model("fast", 0.975, 3.0, 40_000)]
    assert (recommend(few).model, recommend(many).model) == ("fast", "slow")


def test_of_equals_the_faster_is_best():
    assert recommend([Model("a", 0.9, 2.0), Model("b", 0.9, 1.9)]).model == "b"


def test_a_single_model_is_not_praised():
    assert "no other model" in recommend([Model("only", 0.97, 1.0)]).sentence


@pytest.mark.parametrize(("score", "beaten"), [(0.5, False), (0.6, False), (19 / 30, False), (0.75, True), (0.9, True)])
def test_a_lead_within_the_noise_is_none(score, beaten):
    regression = Baseline("regression", 0.6, 30)
    assert (unbeaten([Model("a", score, 1.0, 30), Model("b", 0.4, 1.0, 30)], [regression, Baseline("constant", 0.3, 30)]) is None) == beaten
    choice = recommend([Model("a", score, 1.0, 30)], baselines=[regression])
    assert choice.model == "a"
    assert choice.beats_baselines == beaten
    if not beaten:
        assert "better than regression (60.00 %" in choice.sentence
        assert "Train longer" in choice.sentence
        assert not any(word in choice.sentence for word in ("Use a", "most accurate", "reaches"))


def test_published_weights_are_advised_where_there_are_some():
    weak, above = [Model("a", 0.5, 1.0)], [Baseline("constant", 0.6, 400)]
    assert recommend(weak, baselines=above).sentence.endswith(". Train longer or give more images; and check the labels.")
    advised = recommend(weak, baselines=above, published=True).sentence
    assert advised.endswith(". Train longer, start from published weights (--pretrained), or give more images; and check the labels.")


def test_a_lead_of_one_image_is_told_with_its_error():
    sentence = recommend([Model("a", 19 / 30, 1.0, 30), Model("b", 0.4, 1.0, 30)], baselines=[Baseline("regression", 0.6, 30)]).sentence
    assert sentence.startswith("No model is clearly better than regression (60.00 % against 63.33 % of a, the best; ")
    assert "the standard error of the difference is 12.4 points on 30 held-out images" in sentence


def test_other_metrics_must_be_better_than_a_baseline():
    loss = Metric("loss", "min")
    assert unbeaten([Model("a", 0.5, 1.0)], [Baseline("constant", 0.6, 400)], loss) is None
    assert unbeaten([Model("a", 0.5, 1.0)], [Baseline("constant", 0.5, 400)], loss) is not None


def test_pareto_front():
    assert pareto_front([1, 2, 3, 2], [0.8, 0.9, 0.85, 0.7]) == [0, 1]
    assert pareto_front([1, 1], [0.9, 0.9]) == [0, 1]  # equals do not beat each other
    assert pareto_front([1, 2], [0.9, 0.9]) == [0]
