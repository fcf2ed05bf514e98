"""PiToMe and ToMe: equality with the authors' code, and exact properties."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import vitarium
from tests.anatomy.models import timm_model
from tests.efficiency.tokens.goldens import assert_functions_match, assert_model_matches
from tests.golden import read_golden
from vitarium.efficiency.tokens import pitome
from vitarium.efficiency.tokens.pitome import PiToMe, ToMe, energy_matching
from vitarium.efficiency.tokens.reducer import trace
from vitarium.ops.merging import bipartite_matching


def test_bipartite_matching_equals_the_authors():
    def run(metric: Tensor, x: Tensor) -> dict[str, Tensor]:
        merge = bipartite_matching(metric, 16, prefix=1)
        merged, size = merge.average(x)
        merged2, size2 = bipartite_matching(merged, 16, prefix=1).average(merged, size)
        return dict(merged=merged, size=size, merged_mean=merged, merged2=merged2, size2=size2, unmerged=merge.unmerge(merged))

    assert_functions_match("pitome-bsm_tome_r16_cls", run)


@pytest.mark.parametrize("golden", ["pitome-merge_r0.9_m0.45", "pitome-merge_r0.72_m0.2"])
def test_energy_matching_equals_the_authors(golden: str):
    """With a class token and alpha 1, and without one and alpha 2: there, unmerged tokens of plain matching are in order of similarity."""
    config = read_golden(golden)["config"]
    ratio, margin, prefix, alpha = config["ratio"], config["margin"], int(config["class_token"]), config["alpha"]

    def run(metric: Tensor, x: Tensor) -> dict[str, Tensor]:
        count = metric.shape[1]
        merges = dict(
            bsm=bipartite_matching(metric, math.floor(count - count * ratio), prefix=prefix),
            pitome_bsm=energy_matching(metric, ratio, margin, prefix=prefix, protect=False, alpha=alpha),
            pitome=energy_matching(metric, ratio, margin, prefix=prefix, alpha=alpha),
            text=energy_matching(metric, ratio, margin, prefix=prefix, text=True),
        )
        outputs = {"pitome_prune": merges["pitome"].gather(x)}
        for name, merge in merges.items():
            outputs[name], outputs[f"{name}_size"] = merge.average(x)
        return outputs

    assert_functions_match(golden, run)


def test_options_of_the_energy_reach_the_matching(monkeypatch: pytest.MonkeyPatch):
    """Alpha, and a margin that falls from one value to another, as in the authors' BLIP-2 (0.75 - 0.4 i / L)."""
    seen: list[tuple[float, bool, float]] = []

    def record(metric: Tensor, keep: float, margin: float, *, prefix: int, protect: bool, alpha: float) -> None:
        seen.append((round(margin, 6), protect, alpha))

    monkeypatch.setattr(pitome, "energy_matching", record)
    image = torch.randn(1, 3, 16, 16)
    vitarium.apply(timm_model("vit"), PiToMe(margin=0.75, margin_end=0.35, alpha=2, protect="none"), quiet=True)(image)
    depth = 4
    assert seen[-depth:] == [(round(0.75 - 0.4 * i / depth, 6), False, 2.0) for i in range(depth)]
    vitarium.apply(timm_model("vit"), PiToMe(margin=0.9, protect="early"), quiet=True)(image)
    assert seen[-depth:] == [(round(0.9 * (1 - i / depth), 6), i < math.ceil(depth / 2), 1.0) for i in range(depth)]


def test_tome_by_ratio_counts_the_class_token():
    model = vitarium.apply(timm_model("vit"), ToMe(keep=0.8), quiet=True)
    counts = [s.place.shape[1] for s in trace(model, torch.randn(1, 3, 16, 16))]
    want, count = [], 17
    for _ in counts:
        count -= math.floor(count - count * 0.8)
        want.append(count)
    assert counts == want


def test_pitome_equals_the_authors_model():
    def run(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
        states = trace(model, image)
        counts = [197] + [s.place.shape[1] for s in states[:-1]]  # tokens that enter each block
        flops = sum(12 * n * 192**2 + 2 * n**2 * 192 for n in counts)
        return {"logits": model(image), "size": states[-1].size, "flops": torch.tensor([float(flops)])}

    assert_model_matches("pitome-deit_tiny_r0.925", PiToMe(keep=0.925), run)


def test_tome_equals_the_authors_model():
    assert_model_matches(
        "pitome-tome_deit_tiny_r12", ToMe(r=12), lambda model, image: {"logits": model(image), "size": trace(model, image)[-1].size}
    )


@pytest.mark.identity
@pytest.mark.parametrize("method", [PiToMe(keep=1), ToMe(r=0)], ids=str)
def test_removing_nothing_is_the_model_itself(method):
    model, image = timm_model("vit"), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        before = model(image)
        assert torch.equal(vitarium.apply(model, method, quiet=True)(image), before)


MATCHINGS = {
    "tome": lambda metric: bipartite_matching(metric, 7, prefix=1),
    "pitome": lambda metric: energy_matching(metric, 0.8, 0.4, prefix=1),
    "pitome_bsm": lambda metric: energy_matching(metric, 0.8, 0.4, prefix=1, protect=False),
    "text": lambda metric: energy_matching(metric, 0.8, 0.4, prefix=1, text=True),
}


@pytest.mark.identity
@pytest.mark.parametrize("matching", MATCHINGS.values(), ids=MATCHINGS)
def test_merging_conserves_the_weighted_sum_and_the_sizes(matching):
    x, size = torch.randn(3, 33, 8, dtype=torch.float64), torch.randint(1, 5, (3, 33, 1)).double()
    merge = matching(torch.randn(3, 33, 6, dtype=torch.float64))
    merged, new = merge.average(x, size)
    torch.testing.assert_close((merged * new).sum(1), (x * size).sum(1), rtol=0, atol=1e-12)
    assert torch.equal(new.sum(1), size.sum(1))
    assert torch.equal(merged[:, 0], x[:, 0])


@pytest.mark.identity
@pytest.mark.parametrize("matching", MATCHINGS.values(), ids=MATCHINGS)
def test_unmerge_of_equal_tokens_is_exact(matching):
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randn(2, 4, 8, dtype=torch.float64, generator=generator)
    label = torch.stack([torch.randperm(33, generator=generator) % 4 for _ in range(2)])  # each kind eight times, so that all find an equal
    x = kinds.gather(1, label[..., None].expand(-1, -1, 8))
    merge = matching(x)
    assert all(torch.equal(label[i].gather(0, merge.source[i]), label[i][merge.keep[i]][merge.target[i]]) for i in range(2))
    torch.testing.assert_close(merge.unmerge(merge.average(x)[0]), x, rtol=0, atol=1e-14)


@pytest.mark.identity
@pytest.mark.parametrize("protect", [True, False])
def test_pitome_does_not_depend_on_the_order_of_the_patches(protect: bool):
    metric, x = torch.randn(1, 33, 6, dtype=torch.float64), torch.randn(1, 33, 8, dtype=torch.float64)
    order = torch.cat((torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(32)))
    outputs = [energy_matching(metric[:, o], 0.8, 0.4, prefix=1, protect=protect).average(x[:, o])[0][0] for o in (torch.arange(33), order)]
    a, b = (torch.stack(sorted(o, key=lambda row: float(row[0]))) for o in outputs)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    moved = [bipartite_matching(metric[:, o], 7, prefix=1).average(x[:, o])[0][0] for o in (torch.arange(33), order)]
    a, b = (torch.stack(sorted(o, key=lambda row: float(row[0]))) for o in moved)
    assert not torch.allclose(a, b)  # ToMe's pairs do


@pytest.mark.identity
def test_sizes_stay_whole_through_all_layers():
    model = vitarium.apply(timm_model("registers"), PiToMe(keep=0.8), quiet=True)
    for state in trace(model, torch.randn(2, 3, 16, 16)):
        assert torch.equal(state.size.sum(1), torch.full((2, 1), 20.0))


def test_prefixes_of_any_length_stay_in_front():
    for prefix in range(5):
        metric = torch.randn(2, 17 + prefix, 6)
        for merge in (bipartite_matching(metric, 5, prefix=prefix), energy_matching(metric, 0.75, 0.4, prefix=prefix)):
            assert torch.equal(merge.keep[:, :prefix], torch.arange(prefix).expand(2, -1))
            assert (merge.source >= prefix).all()
            assert (merge.target >= prefix).all()
            everything = torch.cat((merge.keep, merge.source), dim=1).sort(dim=1).values
            assert torch.equal(everything, torch.arange(17 + prefix).expand(2, -1))


def test_schedules():
    assert [ToMe(r=13).amount(i, 12) for i in (0, 5, 11)] == [13, 13, 13]
    assert [ToMe(r=4, inflection=-1).amount(i, 5) for i in range(5)] == [8, 6, 4, 2, 0]
    assert [ToMe(r=4, inflection=1).amount(i, 5) for i in range(5)] == [0, 2, 4, 6, 8]
    assert [ToMe(r=(5, 3)).amount(i, 4) for i in range(4)] == [5, 3, 0, 0]
    assert bipartite_matching(torch.randn(1, 9, 4), 100, prefix=1).keep.shape == (1, 5)


def test_pruning_drops_the_sources():
    model = vitarium.apply(timm_model("vit"), PiToMe(keep=0.75, prune=True), quiet=True)
    states = trace(model, torch.randn(2, 3, 16, 16))
    assert (states[-1].source < 0).any()
    assert states[-1].size is None
    assert [s.place.shape[1] - 1 for s in states] == [12, 9, 7, 6]
