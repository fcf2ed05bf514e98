"""VPTSP: image retrieval with a frozen ViT, shared prompts, an embedding head, and proxies made from the images by class prompts.

"Learning Semantic Proxies from Visual Prompts for Parameter-Efficient Fine-Tuning in Deep Metric Learning" (Ren, Chen, Wang and Hua, ICLR
2024). The ViT is frozen. Trained are

    x_i = normalise(head(LN(ViT(image_i; prompts))))           10 shared prompts in each block: the embedding
    p_i = normalise(p_head(LN(ViT(image_i; prompts of y_i))))  5 prompts of the image's class in the first 3 blocks, training only
    h_c <- GRU(p_i, h_c) for each image i of class c           the semantic part of the proxy, kept throughout training
    proxy_c = normalise(bias_c / 2 + h_c / 2)                  bias_c: an ordinary learned proxy

and the ProxyAnchor loss attracts each x to the proxy of its class and repels it from others. After training the proxies are dropped;
prompts and head, 195 thousand numbers for ViT-S, are all that is saved beside the ViT (`vitarium.save(model, FILE, trained_only=True)`).

    vitarium.apply(model, "vpt_proxies:prompts=10,embed_dim=384")           any plain ViT: ours, timm's, transformers'
    vitarium train vpt_proxies --data cub/ --model timm/vit_small_patch16_224.augreg_in21k --pretrained
    vitarium index images/ --model FILE --output images.index; vitarium search images.index query.jpg

Follows the authors' code (Noahsark/ParameterEfficient-DML). Differences: prompts are additional keys and values of the attention, which is
the same function for less work (retrieval/prompts.py); the container of the h_c is a buffer, so that a training can be resumed (in the
authors' code it is not saved); images of a class need not be adjacent. Left out: BitFit and adapters, the baselines of its tables (LoRA is
here), and the bank that keeps prompts of many classes in host memory. Cost: two forward passes per step, without weight gradients of the
ViT; at test time 10 more keys per block.

Notation: B batch, C channels, E length of an embedding, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from vitarium.anatomy import Anatomy, Site, install, of
from vitarium.catalog.applying import apply
from vitarium.catalog.create import create_model
from vitarium.catalog.methods import AttachReport, Method, method
from vitarium.catalog.options import validated
from vitarium.catalog.registry import State, family, rename
from vitarium.errors import AttachError, UsageError
from vitarium.nn.inputs import foreign_sizes
from vitarium.perception.retrieval.lora import LoRA as LoRA
from vitarium.perception.retrieval.prompts import EmbeddingHead, PromptSite, VisualPrompts, freeze, head_width
from vitarium.perception.retrieval.proxies import PlainProxies, SemanticProxies
from vitarium.perception.retrieval.task import Grouped
from vitarium.training import Learner, learner
from vitarium.training.building import open_trained
from vitarium.training.recipe import Phase
from vitarium.training.settings import Section

if TYPE_CHECKING:
    pass

PROMPTS = "visual_prompts"
"""Name of the prompts' module in an adapted model."""


# ---- the method


@method("vpt_proxies", kind="adapt")
@validated
class VisualPromptTuning(Method):
    """Add deep visual prompts to a plain ViT, and optionally replace its classifier by an embedding. Everything except the head is frozen.

    Args:
        prompts: number of prompts in each block; 0: none, and the blocks are unchanged.
        depth: number of first blocks with prompts; None: all.
        embed_dim: length E of the unit vectors that replace the logits; 0: the classifier is kept, and is trained.
    """

    training: ClassVar[Literal["none", "images", "required"]] = "required"

    prompts: Annotated[int, Field(ge=0)] = 10
    depth: Annotated[int, Field(ge=1)] | None = None
    embed_dim: Annotated[int, Field(ge=0)] = 0

    def __post_init__(self) -> None:
        if not self.prompts and not self.embed_dim:
            raise UsageError("with prompts=0 and embed_dim=0 there is nothing to train")

    def attach(self, model: nn.Module) -> AttachReport:
        """Add the prompts, replace the head, freeze the rest.

        Raises:
            UnsupportedModel: anatomy does not support the model.
            AttachError: fewer blocks than `depth`, no head to replace, or the model failed its check (see `anatomy.install`).
        """
        view = of(model)
        depth = view.depth if self.depth is None else self.depth
        if depth > view.depth:
            raise AttachError(f"{view.family} has {view.depth} blocks, fewer than depth={depth}")
        head = _name_of(model, view.head)
        if self.embed_dim and not head:
            raise AttachError(f"this {view.family} has no head that an embedding could replace; use embed_dim=0, or a classifier")
        weight: Any = view.blocks[0].norm1.weight
        report = AttachReport(self)
        if self.prompts:
            patch = 3 * view.patch_size[0] * view.patch_size[1]
            prompts = VisualPrompts(weight.shape[0], self.prompts, depth, patch).to(weight)

            def sites(view: Anatomy) -> list[Site]:
                return [PromptSite(prompts, block, i) for i, block in enumerate(view.blocks)]

            report.replaced, _ = install(model, sites)
            model.add_module(PROMPTS, prompts)
            report.added = (PROMPTS,)
            report.sites = tuple(block.name for block in view.blocks[:depth])
        if self.embed_dim:
            embedding = EmbeddingHead(head_width(view), self.embed_dim).to(weight)
            report.replaced[head] = model.get_submodule(head)
            model.set_submodule(head, embedding)
            report.sites += (head,)
        report.parameters_added = sum(p.numel() for p in trained_parts(model))
        report.frozen = freeze(model, model.get_submodule(head) if head else None)
        return report

    def rebuild(self, model: nn.Module, state: Any) -> AttachReport:
        """Attach like `attach`. The classifier that an embedding replaced is not saved, so that such a model cannot be undone."""
        report = self.attach(model)
        report.can_undo = not self.embed_dim
        return report


def _name_of(model: nn.Module, module: nn.Module | None) -> str:
    """Return the name of a module in a model, "" if it is not in it."""
    return next((name for name, m in model.named_modules() if m is module), "") if module is not None else ""


def trained_parts(model: nn.Module) -> list[nn.Parameter]:
    """Return the prompts of a model and its embedding head's parameters."""
    return [p for m in model.modules() if isinstance(m, VisualPrompts | EmbeddingHead) for p in m.parameters()]


def head_of(model: nn.Module) -> EmbeddingHead:
    """Return the embedding head of an adapted model.

    Raises:
        UsageError: it has none.
    """
    found = [module for module in model.modules() if isinstance(module, EmbeddingHead)]
    if len(found) != 1:
        raise UsageError(f"this {type(model).__name__} has no embedding head to train; apply vpt_proxies:embed_dim=384 to it first")
    return found[0]


def proxy_vectors(model: nn.Module, proxies: SemanticProxies, image: Tensor, labels: Tensor) -> Tensor:
    """Run the proxy pass: images (B, 3, H, W) of classes (B,), with their classes' prompts -> p, unit vectors (B, E)."""
    prompts = [module for module in model.modules() if isinstance(module, VisualPrompts)]
    if not prompts:
        raise UsageError("class prompts replace shared ones: apply vpt_proxies with prompts=1 or more")
    with prompts[0].instead(proxies.of(labels)), head_of(model).left_out():
        return proxies.project(model(image))


# ---- the authors' models


def official(state: State) -> State:
    """Rename the authors' parameters. timm's unused classifier and the cell's unused W_ia are dropped; the container, which the files lack,
    is initialised from the learned proxies."""
    if "proxies_bias" in state and "semantic_container" not in state:
        state = state | {"semantic_container": F.normalize(state["proxies_bias"], dim=1)}
    return rename(
        (r"^model\.head\.", None),
        (r"^rnn_update\.W_ia$", None),
        (r"^prompts\.", f"model.{PROMPTS}.layers."),
        (r"^fc_norm\.", "model.head.norm."),
        (r"^head\.", "model.head.proj."),
        (r"^p_prompts\.", "proxies.prompts."),
        (r"^p_fc_norm\.", "proxies.norm."),
        (r"^p_head\.", "proxies.proj."),
        (r"^proxies_bias$", "proxies.bias"),
        (r"^rnn_update\.", "proxies.cell."),
        (r"^semantic_container$", "proxies.container"),
    )(state)


VARIANTS: dict[str, dict[str, Any]] = {
    "small": dict(backbone="timm/vit_small_patch16_224", embed_dim=384),
    "base": dict(backbone="timm/vit_base_patch16_224", embed_dim=512),
    "pico": dict(backbone="timm/vit_pico", embed_dim=32, prompts=4, class_prompts=2, class_depth=2, num_classes=5, image_size=16),
}


@family("vpt_proxies", variants=VARIANTS, official=official, learner="vpt_proxies", mean=(0.5,) * 3, std=(0.5,) * 3)
class VPTProxies(nn.Module):
    """A prompted ViT with its semantic proxies, as in the authors' files. Image (B, 3, H, W) -> unit vectors (B, E).

    `model` is the prompted ViT alone, which is saved after training (`vitarium.save(vptsp.model, FILE)`).

    Args:
        backbone: name of a plain ViT.
        embed_dim: E.
        num_classes: classes of the training; 0: without proxies.
        prompts, depth: number of shared prompts, and of first blocks with them (None: all).
        class_prompts, class_depth: number of prompts of a class, and of first blocks with them.
        image_size: side of the input, pixels.
        backbone_arguments: further arguments for `create_model`.
    """

    def __init__(
        self,
        backbone: str,
        *,
        embed_dim: int,
        num_classes: int = 100,
        prompts: int = 10,
        depth: int | None = None,
        class_prompts: int = 5,
        class_depth: int = 3,
        image_size: int | None = None,
        backbone_arguments: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.num_classes, self.embed_dim = num_classes, embed_dim
        self.model = create_model(backbone, image_size=image_size, **(backbone_arguments or {}))
        self.preprocessing: Any = self.model.preprocessing
        self.labels: list[str] | None = None
        apply(self.model, VisualPromptTuning(prompts, depth, embed_dim), quiet=True)
        self.proxies = make_proxies(self.model, num_classes, prompts=class_prompts, depth=class_depth) if num_classes else None

    def forward(self, image: Tensor) -> Tensor:
        with foreign_sizes(self, image, self.preprocessing.channels):
            return self.model(image)


def make_proxies(model: nn.Module, num_classes: int, **options: Any) -> SemanticProxies:
    """Create semantic proxies for a model with an embedding head."""
    view, head = of(model), head_of(model)
    dim = view.blocks[0].norm1.weight.shape[0]  # type: ignore[union-attr, arg-type, index]
    if options.get("depth", 0) > view.depth:
        raise UsageError(f"class_depth={options['depth']}, but the model has {view.depth} blocks")
    return SemanticProxies(num_classes, head.embed_dim, int(dim), features=head.in_features, **options)


# ---- training


@learner("vpt_proxies", task="retrieve")
class VPTProxiesLearner(Learner):
    """Embeddings from prompts (or all weights), trained with proxies of the classes.

    Metrics, on images of classes that are not in the training part: recall at 1, 2, 4 and 8, and MAP@R.

    A batch holds groups of images of one class (data/retrieval.py): `batch_size: 16` means 64 images in training.
    """

    class Settings(Section):
        """Settings of the training.

        Args:
            tune: trained parameters besides the head: "prompts", "all" weights (with prompts as well), "head": none.
            proxies: "semantic", or "plain" ProxyAnchor.
            prompts, depth: number of shared prompts, and of first blocks with them (None: all).
            embed_dim: length of an embedding.
            class_prompts, class_depth: number of prompts of a class, and of first blocks with them.
            ratio: share of the learned proxies in the mix.
            cell: update of a proxy from its images.
            over, mode: see `PlainProxies.loss`.
            alpha, delta: see `proxy_loss`.
            proxy_rate: the learned proxies' learning rate over everything else's.
        """

        tune: Literal["prompts", "all", "head"] = "prompts"
        proxies: Literal["semantic", "plain"] = "semantic"
        prompts: Annotated[int, Field(ge=1)] = 10
        depth: Annotated[int, Field(ge=1)] | None = None
        embed_dim: Annotated[int, Field(ge=1)] = 384
        class_prompts: Annotated[int, Field(ge=1)] = 5
        class_depth: Annotated[int, Field(ge=1)] = 3
        ratio: Annotated[float, Field(ge=0, le=1)] = 0.5
        cell: Literal["gru_relu", "gru", "mix"] = "gru_relu"
        over: Literal["in_batch", "both_all"] = "in_batch"
        mode: Literal["anchor", "nca"] = "anchor"
        alpha: Annotated[float, Field(gt=0)] = 32.0
        delta: float = 0.1
        proxy_rate: Annotated[float, Field(gt=0)] = 20.0

    def __init__(self, model: nn.Module, settings: Any = None, num_classes: int = 0):
        super().__init__(model, settings)
        s = self.settings
        self.proxies: PlainProxies | None = None
        self.rates = {"proxies.bias": s.proxy_rate}
        if not num_classes:
            return
        if s.proxies == "plain":
            self.proxies = PlainProxies(num_classes, head_of(model).embed_dim)
        else:
            self.proxies = make_proxies(
                model, num_classes, prompts=s.class_prompts, depth=min(s.class_depth, of(model).depth), ratio=s.ratio, cell=s.cell
            )

    @classmethod
    def create(
        cls, name: str | nn.Module, data: Any, recipe: Any, *, pretrained: bool = False, checkpoint: str | None = None
    ) -> VPTProxiesLearner:
        """Create the learner for a trained model.

        Args:
            name: a model; a file of `vitarium.save`; or a model's name with `pretrained` or `checkpoint`.
            data, recipe, pretrained, checkpoint: see `Learner.create`.

        Raises:
            UsageError: a name without weights, unless all weights are trained.
        """
        from vitarium.data.loader import generators_kept, seed_generators

        settings = recipe.settings_of(cls)
        useless = None if settings.tune == "all" else "cannot be adapted"
        given = dict(image_size=recipe.image_size, **recipe.model_arguments)
        model = open_trained(name, useless, pretrained=pretrained, checkpoint=checkpoint, **given)
        with generators_kept():
            seed_generators(recipe.seed)
            return cls(adapted(model, settings), settings, len(data.classes))

    def phases(self) -> Sequence[Phase]:
        """Return phases that freeze the trunk for the whole training, unless the settings or the recipe override them."""
        if self.settings.tune == "all":
            return (Phase(train=("model",)),)
        kinds: Any = EmbeddingHead if self.settings.tune == "head" else EmbeddingHead | VisualPrompts
        learning = tuple(f"model.{name}" for name, module in self.model.named_modules() if isinstance(module, kinds))
        return (Phase(freeze=("model",), train=learning),)

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        image, labels, s = batch["image"], batch["target"], self.settings
        how: dict[str, Any] = dict(over=s.over, mode=s.mode, alpha=s.alpha, delta=s.delta)
        if self.proxies is None:
            raise UsageError("training needs proxies: VPTProxiesLearner(model, settings, num_classes=...)")
        if isinstance(self.proxies, SemanticProxies):
            p = proxy_vectors(self.model, self.proxies, image, labels)
            return {"loss": self.proxies.semantic_loss(self.model(image), p, labels, **how)}
        return {"loss": self.proxies.loss(self.model(image), labels, **how)}

    def transform(self, augment: Any) -> Any:
        return super().transform(None) if augment is None else Grouped(super().transform(augment))


def adapted(model: nn.Module, settings: VPTProxiesLearner.Settings) -> nn.Module:
    """Return the model with prompts and an embedding head, which are added if it has none."""
    if isinstance(model, VPTProxies):
        model = model.model
    if not any(isinstance(module, EmbeddingHead) for module in model.modules()):
        apply(model, VisualPromptTuning(settings.prompts, settings.depth, settings.embed_dim), quiet=True)
    return model
