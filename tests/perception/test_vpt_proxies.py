"""VPTSP: equality with the authors' code, prompts in any plain ViT, proxies, and training, saving and loading."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vitarium
from tests.golden import assert_matches_golden, read_golden
from vitarium.data.image_set import ImageData
from vitarium.errors import AttachError, DataError, UsageError
from vitarium.perception.retrieval.lora import LowRankLinear
from vitarium.perception.retrieval.proxies import PlainProxies, SemanticCell, SemanticProxies, accumulate, proxy_loss
from vitarium.perception.vpt_proxies import VisualPromptTuning, VPTProxies, VPTProxiesLearner, head_of, official, proxy_vectors
from vitarium.training import evaluate, fit, load_recipe
from vitarium.training.learners import learner_of
from vitarium.training.phases import settled


def vit(**options) -> nn.Module:
    torch.manual_seed(0)
    return vitarium.create_model("timm/vit_pico", num_classes=5, image_size=16, **options).eval()


def foreign(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "timm":
        return vit()
    if kind == "timm dinov2":  # registers, layer scale
        return vitarium.create_model(
            "timm/vit_small_patch14_reg4_dinov2", img_size=28, num_classes=3, embed_dim=24, depth=2, num_heads=2, image_size=28
        ).eval()
    if kind == "timm eva":
        return vitarium.create_model(
            "timm/eva02_tiny_patch14_224", img_size=28, num_classes=3, embed_dim=24, depth=2, num_heads=2, image_size=28
        ).eval()
    if kind == "ours":
        return vitarium.create_model("thorax_mae_pico", num_classes=3).eval()
    transformers = pytest.importorskip("transformers")
    from vitarium.catalog.foreign import TransformersClassifier
    from vitarium.catalog.preprocessing import Preprocessing

    sizes = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=4)
    return TransformersClassifier(
        transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, num_labels=3)), Preprocessing(16)
    ).eval()


def images(count: int = 4, size: int = 16) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def prompted_literally(model: nn.Module, image: Tensor, prompts: list[Tensor]) -> Tensor:
    """As the authors run it: prompts before the class token, through the whole block, their outputs dropped. -> pooled features."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(image)))
    for i, block in enumerate(model.blocks):
        given = prompts[i].expand(len(x), -1, -1) if i < len(prompts) else x[:, :0]
        x = block(torch.cat((given, x), dim=1))[:, given.shape[1] :]
    return model.norm(x)[:, 0]


# ---- the authors' numbers and names


def test_golden():
    doc = read_golden("vpt_proxies-tiny")
    labels = torch.tensor(doc["config"]["labels"])

    def run(model: VPTProxies, image: Tensor, container: Tensor) -> dict[str, Tensor]:
        px, start = model.proxies, F.normalize(container, dim=1)
        assert px is not None
        found = {"embeds": model(image)}
        p = proxy_vectors(model.model, px, image, labels)
        for over in ("in_batch", "both_all"):
            for mode in ("anchor", "nca"):
                px.container.copy_(start)
                found[f"loss_{over}_{mode}"] = px.semantic_loss(found["embeds"], p, labels, over=over, mode=mode)[None]
        found["container"] = px.container.clone()
        px.container.copy_(start)
        classes, proxies = px.proxies(p, labels)
        found["proxies"] = proxies[[classes.tolist().index(c) for c in labels[::2]]]
        found["proxies_all"] = px.ratio * px.bias + (1 - px.ratio) * px.container
        return found

    small = dict(depth=4, embed_dim=96, num_heads=3)
    model = VPTProxies("timm/vit_tiny_patch16_224", embed_dim=64, num_classes=6, image_size=64, backbone_arguments=small)
    unused = 96 * 1000 + 1000 + 64  # timm's classifier, and W_ia of the cell
    assert_matches_golden("vpt_proxies-tiny", model, run, merged=unused)


def test_what_is_trained_of_vit_small():
    with torch.device("meta"):
        model = vitarium.create_model("vpt_proxies_small", num_classes=0)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 194_688


def test_the_authors_checkpoint_loads_by_name(tmp_path):
    """All names and shapes of the released ViT-S on CUB-200, whose files have no container."""
    model = vitarium.create_model("vpt_proxies_pico")
    back = {
        f"model.{PROMPTS_PREFIX}": "prompts.",
        "model.head.norm.": "fc_norm.",
        "model.head.proj.": "head.",
        "proxies.prompts.": "p_prompts.",
    }
    back |= {"proxies.norm.": "p_fc_norm.", "proxies.proj.": "p_head.", "proxies.cell.": "rnn_update.", "proxies.bias": "proxies_bias"}
    state = {}
    for name, tensor in model.state_dict().items():
        start = next((start for start in back if name.startswith(start)), "")
        if name != "proxies.container":
            state[back.get(start, "") + name.removeprefix(start)] = torch.randn_like(tensor)
    state |= {"model.head.weight": torch.randn(1000, 48), "model.head.bias": torch.randn(1000), "rnn_update.W_ia": torch.randn(32, 1)}
    torch.save(state, tmp_path / "theirs.pth")
    loaded = vitarium.create_model("vpt_proxies_pico", checkpoint=tmp_path / "theirs.pth")
    assert torch.equal(loaded.model.visual_prompts.layers[1], state["prompts.1"])
    assert set(official(state)) == set(model.state_dict())


PROMPTS_PREFIX = "visual_prompts.layers."


# ---- prompts and additions in any plain ViT


@pytest.mark.identity
def test_prompts_as_keys_are_prompts_as_tokens():
    model = vit().double()
    plain = copy.deepcopy(model)
    vitarium.apply(model, VisualPromptTuning(prompts=3, depth=2, embed_dim=8), quiet=True)
    image = images().double()
    want = prompted_literally(plain, image, list(model.visual_prompts.layers))
    with head_of(model).left_out():
        torch.testing.assert_close(model(image), want, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(want, prompted_literally(plain, image, []))


@pytest.mark.identity
def test_no_prompts_are_the_plain_vit():
    model = vit()
    want = model.forward_head(model.forward_features(images()), pre_logits=True)
    vitarium.apply(model, VisualPromptTuning(prompts=0, embed_dim=8), quiet=True)
    with head_of(model).left_out():
        assert torch.equal(model(images()), want)


@pytest.mark.parametrize("kind", ["timm", "timm dinov2", "timm eva", "ours", "transformers"])
@pytest.mark.parametrize("text", ["vpt_proxies:prompts=3", "vpt_proxies:prompts=2,depth=1,embed_dim=8", "lora:rank=2"])
@pytest.mark.identity
def test_what_is_added_learns_and_nothing_else_and_undo_is_exact(kind: str, text: str):
    model = foreign(kind)
    image = images(4, model.preprocessing.image_size)
    before, state = model(image), {k: v.clone() for k, v in model.state_dict().items()}
    vitarium.apply(model, text, quiet=True)
    if text.startswith("lora"):
        assert torch.allclose(model(image), before, atol=1e-6)  # a fresh addition is nothing
    added = sum(p.numel() for name, p in model.named_parameters() if name not in state or state[name].shape != p.shape)
    assert model.methods[0].parameters_added == added > 0
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learning, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(image).square().sum(1)[:2].sum().backward() if "embed_dim" not in text else model(image)[:2, 0].sum().backward()
        optimizer.step()
    assert all(p.grad is not None for p in learning)
    head = [name for name, p in model.named_parameters() if p.requires_grad and name in state]  # the classifier, where there is one still
    for name, tensor in model.state_dict().items():
        if name in state and name not in head and tensor.shape == state[name].shape:
            assert torch.equal(tensor, state[name]), name
    assert not torch.allclose(model(image)[:, :2], before[:, :2])
    vitarium.undo(model)
    model.load_state_dict({**model.state_dict(), **{name: state[name] for name in head}})
    assert torch.equal(model(image), before)
    assert all(p.requires_grad for p in model.parameters())
    assert set(model.state_dict()) == set(state)


def test_prompts_and_additions_together_and_after_a_reduction():
    model = vit()
    vitarium.apply(model, "evit:keep=0.6", "vpt_proxies:prompts=2,embed_dim=8", "lora:rank=2", quiet=True)
    names = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert names == {"visual_prompts", "blocks", "head"}
    assert all(p.requires_grad == ("down" in n or "up" in n) for n, p in model.named_parameters() if n.startswith("blocks"))
    assert model(images()).shape == (4, 8)
    torch.testing.assert_close(model(images()).norm(dim=1), torch.ones(4))
    twin = copy.deepcopy(model)
    twin.visual_prompts.layers[0].data += 1
    assert not torch.allclose(twin(images()), model(images()))  # a copy's sites read the copy's prompts


def test_lora_merges_into_one_layer():
    layer = LowRankLinear(nn.Linear(6, 5), 2, 4.0)
    nn.init.normal_(layer.up.weight)
    x = torch.randn(3, 6)
    torch.testing.assert_close(layer.merged()(x), layer(x))


def test_mistakes_are_refused():
    for text in ("vpt_proxies:prompts=-1", "vpt_proxies:prompts=0", "vpt_proxies:depth=0", "lora:rank=0", "lora:alpha=0"):
        with pytest.raises(UsageError):
            vitarium.apply(vit(), text)
    with pytest.raises(AttachError, match="has 3 blocks"):
        vitarium.apply(vit(), "vpt_proxies:depth=9")
    with pytest.raises(UsageError, match="no plain vision transformer"):
        vitarium.apply(vitarium.create_model("timm/resnet_pico"), "vpt_proxies")


# ---- proxies


@pytest.mark.identity
def test_a_cell_that_keeps_leaves_the_container():
    cell = SemanticCell(8)
    for parameter in cell.parameters():
        nn.init.zeros_(parameter)
    nn.init.constant_(cell.b_iz, 1e4)  # z -> 1
    container = F.normalize(torch.randn(5, 8), dim=1)
    _, states, after = accumulate(container, torch.randn(6, 8), torch.tensor([3, 3, 0, 0, 4, 3]), cell)
    torch.testing.assert_close(after, container)
    torch.testing.assert_close(states, container[[0, 3, 4]])


@pytest.mark.identity
def test_a_ratio_of_one_is_plain_proxy_anchor():
    semantic = SemanticProxies(5, 8, 12, ratio=1.0)
    plain = PlainProxies(5, 8)
    plain.bias = semantic.bias
    x, p = F.normalize(torch.randn(6, 8), dim=1), F.normalize(torch.randn(6, 8), dim=1)
    labels = torch.tensor([0, 0, 1, 1, 4, 4])
    for over in ("in_batch", "both_all"):
        torch.testing.assert_close(semantic.semantic_loss(x, p, labels, over=over), plain.loss(x, labels, over=over))


def test_the_container_takes_images_in_turn_wherever_they_stand():
    cell, container = SemanticCell(8), F.normalize(torch.randn(4, 8), dim=1)
    p, labels = torch.randn(5, 8), torch.tensor([2, 0, 2, 2, 0])
    h2, h0 = container[2:3], container[0:1]
    for i in (0, 2, 3):
        h2 = cell(p[i : i + 1], h2)
    for i in (1, 4):
        h0 = cell(p[i : i + 1], h0)
    classes, states, after = accumulate(container, p, labels, cell)
    assert classes.tolist() == [0, 2]
    torch.testing.assert_close(states, torch.cat((h0, h2)))
    torch.testing.assert_close(after[[1, 3]], container[[1, 3]])


def test_a_proxy_without_images_adds_nothing_and_counts():
    x, proxies = F.normalize(torch.randn(3, 8), dim=1), F.normalize(torch.randn(4, 8), dim=1)
    same = torch.tensor([[1, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.bool)
    s = x @ proxies.T
    near = [sum((torch.exp(-32 * (s[i, c] - 0.1)) for i in range(3) if same[i, c]), torch.tensor(0.0)).log1p() for c in range(4)]
    far = [sum((torch.exp(32 * (s[i, c] + 0.1)) for i in range(3) if not same[i, c]), torch.tensor(0.0)).log1p() for c in range(4)]
    torch.testing.assert_close(proxy_loss(x, proxies, same), (sum(near) + sum(far)) / 4)


def test_wrong_classes_and_broken_values():
    proxies = SemanticProxies(3, 8, 12)
    with pytest.raises(DataError, match="classes 0 to 2"):
        proxies.loss(torch.randn(2, 8), torch.tensor([0, 3]))
    kept = proxies.container.clone()
    proxies.proxies(torch.full((2, 8), torch.nan), torch.tensor([0, 1]))
    assert torch.equal(proxies.container, kept)


# ---- training


@pytest.fixture
def digits() -> ImageData:
    return vitarium.open_data("digits", task="retrieval")


def recipe(*changes: str):
    return load_recipe("vpt_proxies_pico", ["budget.steps=3", "batch_size=4", "objective.embed_dim=8", "objective.prompts=2", *changes])


@pytest.fixture
def base(tmp_path):
    vitarium.save(vit(), tmp_path / "base.safetensors")
    return str(tmp_path / "base.safetensors")


@pytest.mark.parametrize("changes", [[], ["objective.proxies=plain"], ["objective.cell=mix", "objective.over=both_all"]])
@pytest.mark.identity
def test_training_leaves_the_vit_as_it_was_bit_for_bit(digits, base, tmp_path, changes):
    settings = recipe(*changes)
    learner = VPTProxiesLearner.create(base, digits, settings)
    before = {name: p.clone() for name, p in learner.named_parameters()}
    container = getattr(learner.proxies, "container", torch.zeros(1)).clone()
    result = fit(learner, digits, settings, tmp_path / "run")
    after = dict(learner.named_parameters())
    frozen = [name for name, p in after.items() if not p.requires_grad]
    assert len(frozen) > 30
    assert all(torch.equal(after[name], before[name]) for name in frozen)
    assert all(not torch.equal(after[name], before[name]) for name in after if name not in frozen)
    if not changes:
        assert not torch.equal(learner.proxies.container, container)
    assert 0 <= result.metrics["map_at_r"] <= result.metrics["recall_at_1"] <= result.metrics["recall_at_8"] <= 1
    assert (tmp_path / "run" / "pictures" / "nearest-000003.png").is_file()


def test_a_trained_model_is_saved_without_its_base_and_measured_again(digits, base, tmp_path):
    settings = recipe()
    learner = VPTProxiesLearner.create(base, digits, settings)
    result = fit(learner, digits, settings, tmp_path / "run")
    model = learner.eval_model()
    vitarium.save(model, tmp_path / "small.safetensors", trained_only=True)
    vitarium.save(model, tmp_path / "whole.safetensors")
    assert (tmp_path / "small.safetensors").stat().st_size < 0.2 * (tmp_path / "whole.safetensors").stat().st_size
    for name in ("small", "whole"):
        loaded = vitarium.load(tmp_path / f"{name}.safetensors")
        assert torch.equal(loaded(images()), model.eval()(images()))
        assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {n for n, p in model.named_parameters() if p.requires_grad}
        measured = evaluate(learner_of(loaded), digits.val)
        assert measured["recall_at_1"] == pytest.approx(result.metrics["recall_at_1"])
    assert len(learner_of(loaded).task.answers(loaded, {"image": images()})[0]["embedding"]) == 8


def learning(settings, base, digits) -> set[str]:
    """First names of the model's parameters that learn in some phase."""
    learner = VPTProxiesLearner.create(base, digits, settings)
    with settled(learner, settings):
        return {name.split(".")[0] for name, p in learner.model.named_parameters() if p.requires_grad}


def test_prompts_or_all_weights_or_the_head_alone(digits, base):
    assert learning(recipe("objective.tune=prompts"), base, digits) == {"visual_prompts", "head"}
    assert learning(recipe("objective.tune=all", "objective.proxies=plain"), base, digits) > {"blocks", "pos_embed", "head"}
    assert learning(recipe("objective.tune=head", "objective.proxies=plain"), base, digits) == {"head"}


@pytest.mark.identity
def test_phases_of_a_recipe_replace_the_frozen_trunk(digits, base, tmp_path):
    """First the head alone, then prompts too; the trunk stays as it was, and the file needs no more than what learned."""
    settings = recipe("budget.steps=4", "objective.proxies=plain", "phases=[{until: 2 steps, freeze: [model.visual_prompts]}]")
    learner = VPTProxiesLearner.create(base, digits, settings)
    seen = []
    learner.after_step = lambda step, total: seen.append({n: p.detach().clone() for n, p in learner.model.named_parameters()})
    before = {n: p.detach().clone() for n, p in learner.model.named_parameters()}
    fit(learner, digits, settings, tmp_path / "run")
    for name, values in before.items():
        moved = [not torch.equal(state[name], values) for state in seen]
        kind = name.split(".")[0]
        assert moved == {"visual_prompts": [False, False, True, True], "head": [True] * 4}.get(kind, [False] * 4), name
    vitarium.save(learner.eval_model(), tmp_path / "small.safetensors", trained_only=True)
    loaded = vitarium.load(tmp_path / "small.safetensors")
    assert torch.equal(loaded(images()), learner.eval_model().eval()(images()))


def test_random_weights_are_not_worth_adapting(digits):
    with pytest.raises(UsageError, match="cannot be adapted"):
        VPTProxiesLearner.create("timm/vit_pico", digits, recipe())


def test_the_learned_proxies_have_a_rate_of_their_own(digits, base):
    from vitarium.training.optim import create_optimizer

    learner = VPTProxiesLearner.create(base, digits, recipe())
    optimizer = create_optimizer(learner, recipe().optimizer)
    scales = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert scales[id(learner.proxies.bias)] == recipe().objective.get("proxy_rate", 20.0)
    assert scales[id(learner.proxies.proj.weight)] == 1


def test_the_family_is_saved_and_loaded(tmp_path):
    model = vitarium.create_model("vpt_proxies_pico").eval()
    vitarium.save(model, tmp_path / "m.safetensors")
    loaded = vitarium.load(tmp_path / "m.safetensors")
    assert torch.equal(loaded(images()), model(images()))
    assert torch.equal(loaded.proxies.container, model.proxies.container)
