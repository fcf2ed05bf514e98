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
from vitarium.explanation.reading import to_pixels, tokens_to_map
from vitarium.explanation.t_tame import TTAME, TameAttention, TTAMELearner, area, official, pick, variation


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


def test_equals_the_authors_module_and_loss_terms():
    doc = read_golden("t_tame-vit")
    module = TameAttention([24, 24, 24], 10).double().eval()
    module.load_state_dict(fill_state(doc["state"]), strict=True)
    assert sum(p.numel() for p in module.parameters()) == doc["parameters"]
    for dtype, tolerance in TOLERANCE.items():
        given = {key: make_input(key, spec) for key, spec in doc["inputs"].items()}
        labels = given.pop("labels")
        with torch.no_grad():
            c = module.to(dtype)([tokens_to_map(x.to(dtype), 1, (14, 14)) for x in given.values()])
        a = c.sigmoid()
        masks = {"area": 2 * area(a[:, labels])[None], "variation": 0.01 * variation(a[:, labels])[None]}
        enlarged = to_pixels(pick(a, labels), (224, 224))[:, None, ::16, ::16]
        error = compare("t_tame-vit", {"a": a, "c": c, "masks_224": enlarged, **masks})
        assert error <= tolerance
        if dtype == torch.float64:
            RESULTS.append(("t_tame-vit", error))


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
