"""T-TAME: equality with the authors' code, parameter names, properties, and training, saving and loading."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import vitarium
from tests.golden import RESULTS, TOLERANCE, compare, fill_state, make_input, read_golden
from vitarium.catalog.checkpoints import load_checkpoint
from vitarium.errors import InputError, UsageError
from vitarium.explanation.explainers import create_explainer
from vitarium.explanation.faithfulness import measure
from vitarium.explanation.reading import to_pixels
from vitarium.explanation.t_tame import TTAME, TameAttention, TTAMELearner, area, chosen_maps, official, pick, variation


def vit(**options) -> nn.Module:
    torch.manual_seed(0)
    return vitarium.create_model("timm/vit_pico", num_classes=5, image_size=16, **options).eval()


def images(count: int = 3, size: int = 16) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def steps(learner: TTAMELearner, count: int) -> None:
    learner.train()
    optimizer = torch.optim.SGD([p for p in learner.parameters() if p.requires_grad], lr=0.1)
    for _ in range(count):
        optimizer.zero_grad()
        learner({"image": images()})["loss"].backward()
        optimizer.step()


# ---- the authors' numbers and names


@pytest.mark.parametrize(("golden", "class_token"), [("t_tame-vit", "drop"), ("t_tame-vit-ttame", "multiply")])
def test_equals_the_authors_module_and_loss_terms(golden: str, class_token: str):
    """Through the classifier's taps: its norms are replaced by what the golden's features are."""
    doc = read_golden(golden)
    (_, channels, *_), classes = doc["config"]["ft_size"][0], doc["config"]["num_classes"]
    classifier = vitarium.create_model("timm/vit_pico", image_size=56, embed_dim=channels, depth=3, num_heads=2, num_classes=classes)
    model = TTAME(classifier, class_token=class_token).double().eval()
    assert [name.rpartition(".")[0] for name in model.taps] == ["blocks.0", "blocks.1", "blocks.2"]
    model.attention.load_state_dict(fill_state(doc["state"]), strict=True)
    assert sum(p.numel() for p in model.attention.parameters()) == doc["parameters"]
    given = {key: make_input(key, spec) for key, spec in doc["inputs"].items()}
    labels = given.pop("labels")
    for name, features in zip(model.taps, given.values(), strict=True):
        classifier.get_submodule(name).register_forward_hook(lambda _, __, output, features=features: features.to(output))
    for dtype, tolerance in TOLERANCE.items():
        with torch.no_grad():
            _, c = model.to(dtype).maps(torch.zeros(2, 3, 56, 56, dtype=dtype))
        a = c.sigmoid()
        chosen = chosen_maps(a, labels, a.mean((2, 3)), "random")
        masks = {"area": 2 * area(chosen)[None], "variation": 0.01 * variation(chosen)[None]}
        enlarged = to_pixels(pick(a, labels), (224, 224))[:, None, ::16, ::16]
        error = compare(golden, {"a": a, "c": c, "masks_224": enlarged, **masks})
        assert error <= tolerance
        if dtype == torch.float64:
            RESULTS.append((golden, error))


@pytest.mark.parametrize("form", ["sigmoid", "no_skip", "no_skip_no_norm"])
def test_the_authors_ablations(form: str):
    """Sigmoid in the branch; no skip, whose branches have as many channels as classes; neither skip nor batch norm."""
    torch.manual_seed(0)
    module = TameAttention([6, 4], 3, form).double().eval()
    features = [torch.randn(2, 6, 5, 5, dtype=torch.float64), torch.randn(2, 4, 5, 5, dtype=torch.float64)]
    parts = []
    for i, f in enumerate(features):
        u = module.convs[i](f)
        u = u if form == "no_skip_no_norm" else module.bns[i](u)
        parts.append(torch.sigmoid(u + f) if form == "sigmoid" else u.relu())
    widths = [3, 3] if form == "no_skip" else [6, 4]
    assert [part.shape[1] for part in parts] == widths
    torch.testing.assert_close(module(features), module.fuser(torch.cat(parts, 1)), rtol=1e-12, atol=1e-12)


def test_the_authors_choices_of_maps():
    maps, logits = torch.rand(2, 4, 3, 3), torch.tensor([[0.0, 3.0, 1.0, 2.0], [5.0, 0.0, 4.0, 1.0]])
    label = torch.tensor([2, 0])
    assert torch.equal(chosen_maps(maps, label, logits, "random"), maps[:, [2, 0]])
    assert torch.equal(chosen_maps(maps, label, logits, "diagonal"), torch.stack([maps[0, 2:3], maps[1, 0:1]]))
    assert torch.equal(chosen_maps(maps, label, logits, "max"), torch.stack([maps[0, [1, 3]], maps[1, [0, 2]]]))


def test_pixels_that_are_masked_are_black():
    learner = TTAMELearner(TTAME.over(vit()), TTAMELearner.Settings(masked="pixels"))
    preparation, mask = learner.model.preprocessing, torch.zeros(2, 1, 16, 16)
    black = torch.stack([torch.full((16, 16), -m / s) for m, s in zip(preparation.mean, preparation.std, strict=True)])
    torch.testing.assert_close(learner._masked(images(2), mask), black.expand(2, -1, -1, -1))
    torch.testing.assert_close(learner._masked(images(2), mask + 1), images(2))


def test_options_of_the_module_are_saved(tmp_path):
    model = TTAME.over(vit(), class_token="multiply", form="sigmoid").eval()
    vitarium.save(model, tmp_path / "model.safetensors")
    loaded = vitarium.load(tmp_path / "model.safetensors")
    assert torch.equal(loaded.maps(images())[1], model.maps(images())[1])
    assert not torch.equal(TTAME.over(model.classifier).eval().maps(images())[1], model.maps(images())[1])


def test_without_a_class_token_there_is_nothing_to_multiply_by():
    with pytest.raises(UsageError, match="class_token='drop'"):
        TTAME.over(vitarium.create_model("swin_pico", num_classes=5), class_token="multiply")
    with pytest.raises(UsageError, match="drop, multiply"):
        TTAME.over(vit(), class_token="keep")
    with pytest.raises(UsageError, match="no_skip"):
        TTAME.over(vit(), form="none")


def test_parameters_on_vit_base():
    with torch.device("meta"):
        model = vitarium.create_model("t_tame_vit_base")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 3 * (768 * 768 + 768 + 2 * 768) + 2304 * 1000 + 1000


@pytest.mark.parametrize(("variant", "torchvision_name"), [("vit_base", "vit_b_16"), ("vgg16", "vgg16"), ("resnet50", "resnet50")])
def test_the_authors_checkpoints_fit_name_by_name(variant: str, torchvision_name: str):
    """Frozen torchvision classifier and attention module, under Lightning's names, all shapes as they are (no memory is used)."""
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        model = vitarium.create_model(f"t_tame_{variant}")
        body = torchvision.models.get_model(torchvision_name).state_dict()
    state = {f"generic.body.{name}": tensor for name, tensor in body.items()}
    place = "generic.attn_mech.1." if variant == "vit_base" else "generic.attn_mech."
    state |= {place + name: tensor for name, tensor in model.attention.state_dict().items()}
    renamed = official(state)
    assert {n: t.shape for n, t in renamed.items()} == {n: t.shape for n, t in model.state_dict().items()}


def test_torchvisions_vit_under_our_names_is_the_same_function():
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    theirs = torchvision.models.VisionTransformer(16, 4, num_layers=2, num_heads=2, hidden_dim=24, mlp_dim=48, num_classes=5).eval()
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.2)
    ours = vitarium.create_model("timm/vit_pico", num_classes=5, embed_dim=24, depth=2, num_heads=2, mlp_ratio=2).eval()
    state = official({f"generic.body.{name}": tensor for name, tensor in theirs.state_dict().items()})
    ours.load_state_dict({name.removeprefix("classifier."): tensor for name, tensor in state.items()})
    torch.testing.assert_close(ours(images()), theirs(images()), rtol=1e-4, atol=1e-4)


def test_a_tame_file_holds_the_attention_module_alone(tmp_path):
    model = TTAME.over(vit())
    other = TTAME.over(vit())
    torch.save({"epoch": 7, "global_counter": 1, "state_dict": other.attention.state_dict(), "optimizer": {}}, tmp_path / "tame.pt")
    report = load_checkpoint(model.attention, tmp_path / "tame.pt")
    assert report.complete
    torch.testing.assert_close(model.maps(images())[1], other.maps(images())[1])


# ---- what the card promises


@pytest.mark.identity
def test_training_changes_nothing_of_the_classifier():
    classifier = vitarium.create_model("timm/resnet_pico", num_classes=5)
    before = copy.deepcopy(classifier.state_dict())
    learner = TTAMELearner(TTAME.over(classifier))
    fuser = learner.model.attention.fuser.weight.clone()
    steps(learner, 2)
    assert all(torch.equal(before[name], tensor) for name, tensor in classifier.state_dict().items())
    assert not torch.equal(fuser, learner.model.attention.fuser.weight)
    assert not classifier.training
    assert learner.model.attention.training


@pytest.mark.identity
def test_an_explanation_is_one_forward_pass():
    model = TTAME.over(vit()).eval()
    passes = []
    model.classifier.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    create_explainer("t_tame", model)(images())
    assert passes == [False]


@pytest.mark.identity
def test_a_mask_of_ones_drops_nothing_and_raises_nothing():
    found = measure(vit(), images(), torch.ones(3, 16, 16), measures=["average_drop", "increase"])
    assert found["average_drop_100"].tolist() == [0, 0, 0]
    assert found["increase_100"].tolist() == [0, 0, 0]


@pytest.mark.identity
def test_each_image_is_explained_as_if_it_were_alone():
    explain = create_explainer("t_tame", TTAME.over(vit()).double())
    together = explain(images().double())
    alone = torch.cat([explain(image[None]) for image in images().double()])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


@pytest.mark.identity
def test_logits_are_the_classifiers_own():
    classifier = vit()
    model = TTAME.over(classifier)
    assert torch.equal(model(images()), classifier(images()))
    assert torch.equal(model.maps(images())[0], classifier(images()))


def test_the_loss_is_the_sum_of_its_terms():
    learner = TTAMELearner(TTAME.over(vit()))
    terms = learner.eval()({"image": images()})
    terms = {name: term.detach() for name, term in terms.items()}
    assert float(terms["loss"]) == pytest.approx(float(terms["cross_entropy"] + terms["area"] + terms["variation"]), rel=1e-6)
    own = TTAMELearner(learner.model, TTAMELearner.Settings(masks="diagonal"))({"image": images()})
    own = {name: term.detach() for name, term in own.items()}
    logits, c = learner.model.maps(images())
    assert float(own["area"]) == pytest.approx(2 * float(area(pick(c.sigmoid(), logits.argmax(1)).detach())), rel=1e-6)


def test_training_makes_the_masks_smaller():
    learner = TTAMELearner(TTAME.over(vit()))
    before = float(learner({"image": images()})["loss"].detach())
    steps(learner, 20)
    assert float(learner({"image": images()})["loss"].detach()) < before


# ---- any classifier, saved with it


@pytest.mark.parametrize("name", ["timm/resnet_pico", "swin_pico", "convnext_pico", "convnext_iso_pico", "vim_pico", "timm/deit_pico"])
def test_any_classifier(name: str, tmp_path):
    torch.manual_seed(0)
    classifier = vitarium.create_model(name, num_classes=5).eval()
    classifier.labels = list("abcde")
    model = TTAME.over(classifier).eval()
    size = classifier.preprocessing.image_size
    maps = create_explainer("t_tame", model)(images(2, size), "c")
    assert maps.shape == (2, size, size)
    assert maps.amin() == 0
    assert maps.amax() == 1
    vitarium.save(model, tmp_path / "model.safetensors")
    loaded = vitarium.load(tmp_path / "model.safetensors")
    assert loaded.taps == model.taps
    assert loaded.labels == loaded.classifier.labels == list("abcde")
    assert loaded.preprocessing == loaded.classifier.preprocessing == classifier.preprocessing
    assert torch.equal(create_explainer("t_tame", loaded)(images(2, size), "c"), maps)
    assert torch.equal(create_explainer("grad_cam", loaded)(images(2, size)), create_explainer("grad_cam", classifier)(images(2, size)))


def test_a_classifier_of_ones_own_is_explained_but_not_saved(tmp_path):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 12, 3, 2, 1), nn.ReLU())
            self.head = nn.Linear(12, 4)
            self.preprocessing = vitarium.catalog.Preprocessing(16)

        def forward(self, image):
            return self.head(self.body(image).mean((2, 3)))

    model = TTAME.over(Own())
    assert model.taps == ("body.1", "body")
    assert create_explainer("t_tame", model)(images()).shape == (3, 16, 16)
    with pytest.raises(UsageError, match="create_model did not make"):
        vitarium.save(model, tmp_path / "model.safetensors")


def test_transformers_classifiers(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=4, num_labels=3
    )
    config.architectures = ["ViTForImageClassification"]
    config.save_pretrained(tmp_path / "vit")
    classifier = vitarium.create_model(f"hf/{tmp_path / 'vit'}", num_classes=3).eval()
    model = TTAME.over(classifier)
    assert len(model.taps) == 2
    vitarium.save(model, tmp_path / "model.safetensors")
    loaded = vitarium.load(tmp_path / "model.safetensors")
    assert torch.equal(loaded.maps(images())[1], model.eval().maps(images())[1])


def test_a_classifier_with_fewer_tokens_is_refused():
    classifier = vitarium.apply(vit(depth=4), "evit:keep=0.5,blocks=[1]", quiet=True)
    with pytest.raises(InputError, match="token reduction"):
        TTAME.over(classifier)


@pytest.mark.parametrize(
    ("taps", "message"),
    [(["blocks.9.norm1"], "no module"), ([], "one or more"), ([1, "norm"], "not both"), (["fc_norm", "head_drop"], "tokens")],
)
def test_wrong_taps_are_refused(taps, message):
    with pytest.raises((UsageError, InputError), match=message):
        TTAME(vit(), taps=taps)


def test_only_a_trained_classifier_is_worth_explaining():
    from vitarium.training import load_recipe

    recipe = load_recipe("t_tame_pico")
    with pytest.raises(UsageError, match="without weights"):
        TTAMELearner.create("timm/vit_pico", None, recipe)


def test_trained_by_the_common_loop(tmp_path):
    from vitarium.training import evaluate, find_learner, fit, load_recipe
    from vitarium.training.learners import learner_of

    vitarium.save(vit(), tmp_path / "classifier.safetensors")
    recipe = load_recipe("t_tame_pico", ["budget.steps=3", "batch_size=4", "eval_every=1.0"])
    data = vitarium.open_data("scenes:length=30,image_size=16", task="image")
    learner = find_learner("t_tame").create(str(tmp_path / "classifier.safetensors"), data, recipe)
    result = fit(learner, data, recipe, tmp_path / "run")
    assert set(result.metrics) >= {f"{kind}_{v}" for kind in ("average_drop", "increase") for v in (100, 50, 15)}
    assert list((tmp_path / "run/pictures").glob("explained-*.png"))
    vitarium.save(learner.eval_model(), tmp_path / "tame.safetensors")
    again = learner_of(vitarium.load(tmp_path / "tame.safetensors"))
    assert isinstance(again, TTAMELearner)
    assert evaluate(again, data.val)["average_drop_50"] == pytest.approx(result.metrics["average_drop_50"])
    picture, _ = data.val[0]
    answer = again.task.answers(again.model, {"image": again.transform(None)(picture)[None]})[0]
    assert answer["label"].startswith("class ")
    assert again.task.draw(picture, answer).size == (224, 224)
