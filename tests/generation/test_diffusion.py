"""The diffusion base: equality with the authors' code, identities of paths and samplers, and exchange of parts with diffusers."""

import math
import os

import pytest
import torch
from torch.nn import functional as F

import vitarium
from tests.golden import TOLERANCE, compare, fill_state, make_input, read_golden, time_rates
from vitarium.catalog import families
from vitarium.catalog.record import LearnerRecord, training_of
from vitarium.errors import InputError, UsageError
from vitarium.generation import Generator
from vitarium.generation.diffusion import (
    Denoiser,
    DiT,
    Flow,
    GaussianDiffusion,
    Latents,
    Path,
    SiT,
    generate,
    guided,
    parse_process,
    process_of,
    sample,
    sample_with,
    scheduler_for,
)
from vitarium.generation.diffusion.dit import OFFICIAL, SIZES
from vitarium.generation.diffusion.samplers import ddim, euler, heun, sde

TINY = dict(embed_dim=32, depth=2, num_heads=2, patch_size=2, image_size=8, latent_chans=0, latent_stride=1, num_classes=3)
SAMPLERS = "dit-ddim_flow_samplers"


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return awake(SiT(**TINY)).eval()


def awake(model):
    """With conditions and output that are not 0, as they are after training."""
    for name, parameter in model.named_parameters():
        if "modulation" in name or "final" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


# ---- networks


@pytest.mark.parametrize(
    ("golden", "cls", "options"),
    [("dit-dit_s4", DiT, dict(patch_size=4)), ("dit-sit_s2", SiT, dict(patch_size=2, image_size=128, num_classes=10))],
)
def test_equals_the_authors_network(golden, cls, options):
    doc = read_golden(golden)
    model = cls(**SIZES["s"], **options)
    model.double().load_state_dict(OFFICIAL(fill_state(doc["state"])), strict=True)
    assert torch.allclose(model.time_embed.rates, time_rates().double(), rtol=2**-23, atol=0)  # to the last bit of float32
    model.time_embed.rates = time_rates().double()
    table = model.pos_embed.numel()  # the authors count the fixed table
    assert sum(p.numel() for p in model.parameters()) + table == doc["parameters"]
    inputs = {key: make_input(key, spec) for key, spec in doc["inputs"].items()}
    for dtype, tolerance in TOLERANCE.items():
        with torch.no_grad():
            x, t, y = (v.to(dtype) if v.is_floating_point() else v for v in inputs.values())
            error = compare(golden, {"out": model.to(dtype).eval()(x, t, y)})
        assert error <= tolerance * (1e-3 if dtype is torch.float64 else 1)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("dit_s_2", 32.96), ("dit_s_4", 32.95), ("dit_s_8", 33.15), ("dit_b_2", 130.5), ("dit_l_2", 458.1), ("dit_xl_2", 675.1)],
)
def test_parameter_counts_of_the_card(name, millions):
    with torch.device("meta"):
        model = vitarium.create_model(name)
    count = sum(p.numel() for p in model.parameters()) + model.pos_embed.numel()
    assert count / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize("name", ["dit_pico", "sit_flow_pico"])
def test_pico_is_small_and_keeps_the_contract(name):
    model = vitarium.create_model(name)
    assert sum(p.numel() for p in model.parameters()) < 300_000
    assert isinstance(model, Generator)
    assert isinstance(model, Denoiser)


def test_starts_as_the_identity_with_output_zero():
    model = DiT(**TINY)
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([5, 900]), torch.tensor([0, 3])
    tokens, _ = model.embed(x)
    for block in model.blocks:
        torch.testing.assert_close(block(tokens, model.condition(t, y)), tokens)
    assert not model(x, t, y).any()


def test_takes_any_size_that_the_patches_divide(tiny):
    assert tiny(torch.randn(1, 3, 6, 10), torch.rand(1), torch.tensor([0])).shape == (1, 3, 6, 10)
    with pytest.raises(InputError, match=r"sides divisible by 2.*nearest is 8x8"):
        tiny(torch.randn(1, 3, 7, 8), torch.rand(1))
    with pytest.raises(InputError, match=r"image \(B, 3, H, W\)"):
        tiny(torch.randn(1, 4, 8, 8), torch.rand(1))
    with pytest.raises(InputError, match="one time per sample"):
        tiny(torch.randn(2, 3, 8, 8), torch.rand(1))
    with pytest.raises(UsageError, match="must divide by 16"):
        vitarium.create_model("dit_s_2", image_size=250)


def test_without_labels_it_speaks_of_the_null_class_and_training_drops_labels(tiny):
    x, t = torch.randn(2, 3, 8, 8), torch.rand(2)
    torch.testing.assert_close(tiny(x, t), tiny(x, t, torch.tensor([3, 3])))
    always = awake(SiT(**TINY, class_drop_rate=1.0)).train()
    torch.testing.assert_close(always(x, t, torch.tensor([0, 1])), always(x, t))


def test_is_saved_and_loaded_with_what_it_was_trained_for(tmp_path):
    model = awake(vitarium.create_model("sit_flow_pico", num_classes=3))
    training_of(model).learner = LearnerRecord(name="diffusion", settings={"process": "flow:data_at=0,path=cosine", "steps": 3})
    vitarium.save(model, tmp_path / "m.safetensors")
    again = vitarium.load(tmp_path / "m.safetensors")
    assert process_of(again) == Flow("cosine", 0)
    labels = torch.tensor([0, 2])
    torch.testing.assert_close(again.generate(labels), model.generate(labels), rtol=0, atol=0)


def test_compiles_into_one_graph(tiny):
    x, t, y = torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([0, 1])
    compiled = torch.compile(tiny, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, t, y), tiny(x, t, y))


def test_gradient_checkpointing_changes_nothing():
    model = awake(SiT(**TINY, class_drop_rate=0.0)).train()
    x, t, y = torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([0, 1])
    model(x, t, y).square().sum().backward()
    plain = model.blocks[0].attn.qkv.weight.grad.clone()
    model.zero_grad()
    model.set_grad_checkpointing()
    model(x, t, y).square().sum().backward()
    torch.testing.assert_close(model.blocks[0].attn.qkv.weight.grad, plain)


def test_diffusers_network_says_the_same_and_its_names_load(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    from safetensors.torch import save_file

    torch.manual_seed(0)
    theirs = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2, sample_size=8, num_embeds_ada_norm=10
    ).eval()
    for block in theirs.transformer_blocks:  # the authors' rates; diffusers spreads them over 127 steps instead of 128
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        block.norm1.emb.load_state_dict(theirs.transformer_blocks[0].norm1.emb.state_dict())
    save_file({k: v.contiguous().clone() for k, v in theirs.state_dict().items()}, tmp_path / "theirs.safetensors")
    options = dict(embed_dim=32, depth=2, num_heads=2, patch_size=2, image_size=64, num_classes=10)
    ours = vitarium.create_model("dit_s_2", checkpoint=tmp_path / "theirs.safetensors", **options).eval()
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 981]), torch.tensor([1, 7])
    with torch.no_grad():
        want = theirs(x, timestep=t, class_labels=y).sample
        torch.testing.assert_close(ours(x, t, y), want, rtol=1e-4, atol=1e-4)


# ---- paths and samplers


def toy():
    """The network of the samplers' golden, its inputs, and the comparison of single outputs."""
    doc = read_golden(SAMPLERS)
    state = fill_state(doc["state"])
    inputs = [make_input(key, spec) for key, spec in doc["inputs"].items()]

    def network(x, t, labels):
        table = state["emb.weight"][labels][:, :, None, None]
        return torch.tanh(F.conv2d(x, state["conv.weight"], state["conv.bias"])) * (1 + t.to(x).view(-1, 1, 1, 1)) + 0.1 * table

    return network, inputs


def test_paths_and_samplers_equal_the_authors():
    """Also the forms of REPA's sampler: 8 steps, guidance 1.8 between 0 and 0.7. DiT's code rounds its tables to float32 on the way."""
    network, (x, n, t, y) = toy()
    out = {}
    for key, kind in (("linear", "linear"), ("gvp", "cosine"), ("vp", "vp")):
        path, at = Path(kind, data_at=1), 0.8 * t + 0.1
        x_t, velocity = path.mix(x, n, at), path.velocity(x, n, at)
        out |= {f"sit_xt_{key}": x_t, f"sit_ut_{key}": velocity}
        out |= {f"sit_score_{key}": path.score_of(velocity, x_t, at), f"sit_noise_{key}": path.noise_of(velocity, x_t, at)}
        forms = {"SBDM": "vp", "sigma": "sigma", "linear": "linear", "decreasing": "decreasing", "inccreasing-decreasing": "rise_and_fall"}
        out |= {f"sit_w_{key}_{theirs}": path.sde_rate(at, ours, 1.3) for theirs, ours in forms.items()}
        out[f"sit_w_{key}_constant"] = path.sde_rate(at, "constant", 1.3)[:1].float()
    for key in ("linear", "cosine"):
        out[f"repa_score_{key}"] = Path(key, data_at=0).score_of(n, x, 0.8 * t + 0.1)
    out["repa_euler"] = euler(guided(network, y, 1000), x, Flow().grid(8))
    out["repa_heun_cfg_interval"] = heun(guided(network, y, 1000, scale=1.8, interval=(0, 0.7)), x, Flow().grid(8))

    def thousandths(z, step, decided_at=None):
        return network(z, torch.full((2,), step / 1000, dtype=z.dtype), y)

    linear, cosine = GaussianDiffusion(), GaussianDiffusion("cosine")
    out["ddim10_linear"] = ddim(thousandths, x, linear, linear.grid(10, stride=True))
    out["ddim7_cosine"] = ddim(thousandths, x, cosine, cosine.grid(7))
    out |= {"betas_linear_1000": torch.tensor(linear.betas), "betas_cos_1000": torch.tensor(cosine.betas)}
    out |= {"timesteps_250": torch.tensor(linear.grid(250)), "timesteps_ddim50": torch.tensor(linear.grid(50, stride=True))}
    assert compare(SAMPLERS, out) < 1e-6


@pytest.mark.parametrize("data_at", [0, 1])
@pytest.mark.parametrize("kind", ["linear", "cosine", "vp"])
def test_a_velocity_tells_data_noise_and_score_and_comes_back(kind, data_at):
    path = Path(kind, data_at)
    x, noise, t = torch.randn(4, 3, 2, 2).double(), torch.randn(4, 3, 2, 2).double(), torch.rand(4).double() * 0.8 + 0.1
    x_t, velocity = path.mix(x, noise, t), path.velocity(x, noise, t)
    torch.testing.assert_close(path.data_of(velocity, x_t, t), x)
    torch.testing.assert_close(path.noise_of(velocity, x_t, t), noise)
    torch.testing.assert_close(path.velocity_of_noise(noise, x_t, t), velocity)
    torch.testing.assert_close(path.velocity_of_data(x, x_t, t), velocity)
    sigma = path.coefficients(t)[1].view(-1, 1, 1, 1)
    torch.testing.assert_close(path.score_of(velocity, x_t, t), -noise / sigma)
    torch.testing.assert_close(path.mix(x, noise, torch.full((4,), float(data_at)).double()), x)
    with torch.enable_grad():  # the derivatives, by autograd
        moment = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        alpha, other, d_alpha, d_sigma = path.coefficients(moment)
        for value, rate in ((alpha, d_alpha), (other, d_sigma)):
            (slope,) = torch.autograd.grad(value, moment, retain_graph=True)
            torch.testing.assert_close(slope, rate.detach())


def gaussian_velocity(path, mean, deviation):
    """The exact velocity where the data are normal: x_t is normal as well."""

    def predict(x, t, decided_at=None):
        alpha, sigma, d_alpha, d_sigma = path.coefficients(torch.tensor(t, dtype=x.dtype))
        variance = alpha**2 * deviation**2 + sigma**2
        growth = (alpha * d_alpha * deviation**2 + sigma * d_sigma) / variance
        return d_alpha * mean + growth * (x - alpha * mean)

    return predict


@pytest.mark.parametrize("data_at", [0, 1])
@pytest.mark.parametrize("sampler", ["euler", "heun", "dopri5", "sde"])
def test_samplers_reproduce_a_gaussian(sampler, data_at):
    flow = Flow(data_at=data_at)
    noise = torch.randn(4000, 1, 1, 1, generator=torch.Generator().manual_seed(0)).double()
    made = sample(flow, gaussian_velocity(flow.way, 2.0, 0.5), noise, steps=60, sampler=sampler, generator=torch.Generator().manual_seed(1))
    assert float(made.mean()) == pytest.approx(2.0, abs=0.03)
    assert float(made.std()) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("data_at", [0, 1])
@pytest.mark.parametrize(
    "options",
    [
        dict(form="vp"),
        dict(form="sigma", last="euler"),
        dict(form="constant", norm=0.5, last="tweedie"),
        dict(form="linear", last="none"),
        dict(form="decreasing", solver="heun"),
        dict(form="rise_and_fall", solver="heun", last="tweedie"),
    ],
    ids=str,
)
def test_sits_stochastic_samplers_reproduce_a_gaussian(options: dict, data_at: int):
    flow = Flow(data_at=data_at)
    noise = torch.randn(4000, 1, 1, 1, generator=torch.Generator().manual_seed(0)).double()
    generator = torch.Generator().manual_seed(1)
    made = sample(flow, gaussian_velocity(flow.way, 2.0, 0.5), noise, steps=100, sampler="sde", generator=generator, **options)
    near = 0.1 if options.get("last") == "none" else 0.03  # which stops at t = 0.04
    assert float(made.mean()) == pytest.approx(2.0, abs=near)
    assert float(made.std()) == pytest.approx(0.5, abs=0.03)


def test_a_heun_step_is_sits():
    """Noise first, then the mean of the drifts at both ends; written out for one step."""
    path, predict = Path("linear", data_at=1), gaussian_velocity(Path("linear", data_at=1), 1.0, 0.7)
    x = torch.randn(3, 1, 2, 2).double()
    got = sde(
        predict, x, [0.2, 0.5, 0.9], path, form="sigma", norm=1.3, solver="heun", last="none", generator=torch.Generator().manual_seed(2)
    )
    drawn = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).double()

    def drift(z: torch.Tensor, at: float) -> torch.Tensor:
        t = torch.tensor(at, dtype=torch.float64)
        velocity = predict(z, at)
        return velocity + path.sde_rate(t, "sigma", 1.3) * path.score_of(velocity, z, t)

    moved = x + (2 * 1.3 * 0.8 * 0.3) ** 0.5 * drawn
    first = drift(moved, 0.2)
    torch.testing.assert_close(got, moved + 0.15 * (first + drift(moved + 0.3 * first, 0.5)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["linear", "cosine", "vp"])
def test_weighted_errors_of_noise_and_score(kind: str):
    """SiT's: the weight "velocity" makes the error of the noise (or score) that of the velocity; "likelihood" is w / sigma^2."""
    x, noise, t = torch.randn(4, 3, 2, 2).double(), torch.randn(4, 3, 2, 2).double(), torch.rand(4).double() * 0.8 + 0.1
    wrong, path = torch.randn(4, 3, 2, 2).double(), Path(kind, data_at=1)
    x_t, (_, sigma, _, _) = path.mix(x, noise, t), path.coefficients(t)

    def loss(prediction: str, weight: str, model) -> torch.Tensor:
        return Flow(kind, 1, prediction, weight=weight).loss(model, x, noise=noise, t=t)["denoising"]

    plain = loss("noise", "none", lambda x, t: wrong)
    as_score = lambda x, t: -wrong / sigma.view(-1, 1, 1, 1)
    torch.testing.assert_close(loss("score", "none", as_score), plain)
    velocity = loss("velocity", "none", lambda x, t: path.velocity_of_noise(wrong, x_t, t))
    torch.testing.assert_close(loss("noise", "velocity", lambda x, t: wrong), velocity)
    torch.testing.assert_close(loss("score", "velocity", as_score), velocity)
    torch.testing.assert_close(loss("noise", "likelihood", lambda x, t: wrong), plain * path.sde_rate(t, "vp") / sigma**2)
    score = path.score_of(path.velocity(x, noise, t), x_t, t)
    torch.testing.assert_close(path.velocity_of_score(score, x_t, t), path.velocity(x, noise, t))
    at = torch.tensor(0.4).double()
    found = Flow(kind, 1, "score").velocities(lambda x, t, decided_at=None: -wrong / path.coefficients(at)[1])
    torch.testing.assert_close(found(x_t, 0.4), path.velocity_of_noise(wrong, x_t, at))
    with pytest.raises(UsageError, match="use weight=none"):
        Flow(weight="velocity")
    with pytest.raises(UsageError, match="last of the sampler sde"):
        sde(lambda x, t, d=None: x, x, [0.1, 0.9], path, last="men")


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("prediction", ["noise", "data", "v"])
def test_gaussian_diffusion_reproduces_a_gaussian(sampler, prediction):
    process = GaussianDiffusion(prediction=prediction)
    bars = torch.tensor(process.respaced().alpha_bar)

    def predict(x, t, decided_at=None):
        bar = bars[t]
        data = 2.0 + 0.25 * bar.sqrt() / (bar * 0.25 + 1 - bar) * (x - bar.sqrt() * 2.0)
        noise = (x - bar.sqrt() * data) / (1 - bar).sqrt()
        return {"noise": noise, "data": data, "v": bar.sqrt() * noise - (1 - bar).sqrt() * data}[prediction]

    start = torch.randn(4000, 1, 1, 1, generator=torch.Generator().manual_seed(0)).double()
    made = sample(process, predict, start, steps=100, sampler=sampler, generator=torch.Generator().manual_seed(1))
    assert float(made.mean()) == pytest.approx(2.0, abs=0.05)
    assert float(made.std()) == pytest.approx(0.5, abs=0.05)


def test_ddim_with_eta_one_is_as_noisy_as_ddpm():
    process = GaussianDiffusion()
    tables = process.respaced(range(0, 1000, 100))
    here, before = tables.alpha_bar[5], tables.alpha_bar_before[5]
    assert math.exp(tables.log_variance[5]) == pytest.approx((1 - before) / (1 - here) * (1 - here / before))


def test_losses_are_zero_for_the_truth_and_count_samples_apart():
    x, noise = torch.randn(3, 2, 4, 4).double(), torch.randn(3, 2, 4, 4).double()
    flow = Flow("cosine", 1)
    losses = flow.loss(lambda x_t, t, labels: flow.way.velocity(x, noise, t), x, noise=noise, labels=None)
    assert losses["denoising"].shape == (3,)
    assert losses["denoising"].max() < 1e-20
    steps = torch.tensor([0, 500, 999])
    gaussian = GaussianDiffusion()
    losses = gaussian.loss(lambda x_t, t: torch.cat([noise, -torch.ones_like(noise)], 1), x, noise=noise, t=steps)
    assert losses["denoising"].max() == 0
    assert losses["variance"][1:].max() < 1e-9  # with the posterior's own variance (logits -1) and the truth the divergence is 0
    assert float(losses["variance"][0]) > 0  # step 0 is a likelihood


def test_training_times_follow_shift_and_convention():
    like = torch.zeros(1)
    torch.manual_seed(0)
    shifted, plain = Flow(shift=3.0).times(2000, like), Flow().times(2000, like)
    assert shifted.mean() > plain.mean() + 0.1  # towards noise, which is at 1
    assert Flow(shift=3.0, data_at=1).times(2000, like).mean() < 0.4
    shares = torch.tensor([0.0, 0.5, 1.0]).double()
    torch.testing.assert_close(Flow(prediction="noise").times_at(shares), torch.tensor([0.001, 0.5, 0.999]).double())
    assert Flow(data_at=1).times_at(shares).tolist() == [1.0, 0.5, 0.0]
    assert GaussianDiffusion().times_at(shares).tolist() == [0, 500, 999]


# ---- guidance


def test_guidance_moves_the_first_channels_inside_the_interval_only(tiny):
    x, labels = torch.randn(2, 3, 8, 8), torch.tensor([0, 1])
    t = torch.full((2,), 0.5)
    with torch.no_grad():
        cond, free = tiny(x, t, labels), tiny(x, t)
        plain, strong = (guided(tiny, labels, 3, scale=s, interval=(0.2, 0.7)) for s in (1.0, 4.0))
        torch.testing.assert_close(plain(x, 0.5), cond)
        torch.testing.assert_close(strong(x, 0.5), free + 4 * (cond - free), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(strong(x, 0.8, decided_at=0.5), guided(tiny, labels, 3, scale=4.0)(x, 0.8))
        torch.testing.assert_close(strong(x, 0.8), plain(x, 0.8))
        first = guided(tiny, labels, 3, scale=4.0, channels=1)(x, 0.5)
    torch.testing.assert_close(first[:, 1:], cond[:, 1:])
    torch.testing.assert_close(first[:, :1], (free + 4 * (cond - free))[:, :1], rtol=1e-4, atol=1e-5)


def test_guidance_acts_at_integer_timesteps(tiny):
    x, labels = torch.randn(2, 3, 8, 8), torch.tensor([0, 1])
    with torch.no_grad():
        plain, strong = (guided(tiny, labels, 3, scale=s)(x, 500) for s in (1.0, 4.0))
        free = tiny(x, torch.full((2,), 500))
        torch.testing.assert_close(strong, free + 4 * (plain - free), rtol=1e-4, atol=1e-5)
        inside = guided(tiny, labels, 3, scale=4.0, interval=(0.2, 0.7), length=1000)
        torch.testing.assert_close(inside(x, 500), strong)
        torch.testing.assert_close(inside(x, 900), guided(tiny, labels, 3)(x, 900))


def test_an_interval_of_timesteps_needs_their_length(tiny):
    x, labels = torch.randn(1, 3, 8, 8), torch.tensor([0])
    for time, length in ((500, None), (1, None), (500.0, None), (500, 100)):
        with pytest.raises(UsageError, match="give length="):
            guided(tiny, labels, 3, scale=4.0, interval=(0.2, 0.7), length=length)(x, time)
    with pytest.raises(UsageError, match="0 <= low <= high <= 1"):
        guided(tiny, labels, 3, scale=4.0, interval=(0.7, 0.2))


@pytest.mark.parametrize("data_at", [0, 1])
@pytest.mark.parametrize("kind", ["linear", "cosine", "vp"])
def test_lognormal_times_have_a_lognormal_ratio_of_noise_to_data(kind: str, data_at: int):
    """REPA: sigmoid(n) on the linear path, 2/pi atan(e^n) on the cosine path."""
    flow, like = Flow(path=kind, data_at=data_at, time="lognormal"), torch.zeros((), dtype=torch.float64)
    torch.manual_seed(0)
    t = flow.times(2000, like)
    torch.manual_seed(0)
    n = torch.randn(2000, dtype=torch.float64)
    alpha, sigma, _, _ = flow.way.coefficients(t)
    margin = 2e-5 if kind == "vp" else 1e-9  # the path of vp keeps this distance from its ends
    torch.testing.assert_close((sigma / alpha).log(), n, rtol=0, atol=500 * margin)
    want = {"linear": n.sigmoid(), "cosine": n.exp().atan() * 2 / math.pi}.get(kind)
    if want is not None:
        torch.testing.assert_close(t, want if data_at == 0 else 1 - want, rtol=0, atol=1e-12)


# ---- images


def test_generate_is_a_function_of_labels_seed_and_options(tiny):
    labels = torch.tensor([0, 2, 1])
    state = torch.get_rng_state()
    one = tiny.generate(labels, seed=1, steps=4)
    assert one.shape == (3, 3, 8, 8)
    assert one.dtype is torch.float32
    assert 0 <= one.min() <= one.max() <= 1
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    assert torch.equal(one, tiny.generate(labels, seed=1, steps=4))
    assert not torch.equal(one, tiny.generate(labels, seed=2, steps=4))
    assert not torch.equal(one, tiny.generate(labels, seed=1, steps=4, sampler="sde"))
    assert tiny.generate(labels, steps=2, image_size=12).shape == (3, 3, 12, 12)


def test_generate_refuses_what_it_cannot_do(tiny):
    labels = torch.tensor([0])
    for options, message in (
        (dict(sampler="ddim"), "sampler of a flow must be euler, heun, dopri5, sde"),
        (dict(sampler="EulerScheduler"), "diffusers has no scheduler 'EulerScheduler'"),
        (dict(eta=1.0), "has no option 'eta'"),
        (dict(interval=[0.7, 0.1]), "two times"),
        (dict(steps=0), "at least 1 step"),
        (dict(autoencoder="x"), "uses no autoencoder"),
    ):
        with pytest.raises(UsageError, match=message):
            generate(tiny, labels, **options)
    with pytest.raises(UsageError, match="classes 0 to 2, got 9"):
        tiny.generate(torch.tensor([9]))


@pytest.mark.parametrize("text", ["flows", "flow:path=lineal", "flow:pathh=linear", "gaussian:schedule", "flow:data_at=2", "flow:time=x"])
def test_a_process_is_read_from_a_line_or_refused(text):
    assert parse_process("flow:path=cosine,data_at=1") == Flow("cosine", 1)
    assert parse_process("gaussian:schedule=cosine,prediction=v") == GaussianDiffusion("cosine", "v")
    with pytest.raises(UsageError):
        parse_process(text)


# ---- diffusers


@pytest.mark.parametrize("data_at", [0, 1])
def test_diffusers_euler_equals_ours(data_at):
    pytest.importorskip("diffusers")
    flow = Flow(data_at=data_at)
    predict = gaussian_velocity(flow.way, 2.0, 0.5)
    noise = torch.randn(2, 3, 4, 4)
    scheduler = scheduler_for(flow)
    ours = sample(flow, predict, noise.double(), steps=10)
    scheduler.set_timesteps = lambda steps, device: type(scheduler).set_timesteps(scheduler, sigmas=flow_sigmas(steps), device=device)
    theirs = sample_with(scheduler, flow, predict, noise, steps=10)
    torch.testing.assert_close(theirs, ours.float(), rtol=1e-4, atol=1e-4)


def flow_sigmas(steps):
    """diffusers' own default ends at 1/1000; these are the even ones."""
    return [1 - i / steps for i in range(steps)]


def test_diffusers_ddim_equals_ours():
    pytest.importorskip("diffusers")
    network, (x, _, _, y) = toy()
    process = GaussianDiffusion("cosine")

    def predict(z, t, decided_at=None):
        return network(z.double(), torch.full((2,), t / 1000), y).to(z)

    ours = sample(process, predict, x, steps=20)
    theirs = sample_with("DDIMScheduler", process, predict, x, steps=20)
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", "DPMSolverMultistepScheduler", "FlowMatchHeunDiscreteScheduler"])
def test_other_schedulers_of_diffusers_reproduce_a_gaussian(name):
    pytest.importorskip("diffusers")
    flow = Flow(data_at=1)
    noise = torch.randn(2000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    made = sample(flow, gaussian_velocity(flow.way, 2.0, 0.5), noise, steps=30, sampler=name)
    assert float(made.mean()) == pytest.approx(2.0, abs=0.06)
    assert float(made.std()) == pytest.approx(0.5, abs=0.06)


def test_an_autoencoder_of_diffusers_stands_between_pictures_and_latents(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    autoencoder = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2, norm_num_groups=4
    )
    autoencoder.save_pretrained(tmp_path / "vae")
    model = awake(vitarium.create_model("sit_flow_pico", image_size=16, latent_chans=4, latent_stride=2, patch_size=2))
    picture = model.generate(torch.tensor([0, 1]), steps=2, autoencoder=str(tmp_path / "vae"))
    assert picture.shape == (2, 3, 16, 16)
    codec = Latents(autoencoder)
    image = torch.rand(1, 3, 16, 16)
    assert codec.encode(image).shape == (1, 4, 8, 8)
    torch.testing.assert_close(
        codec.decode(torch.ones(1, 4, 8, 8)), autoencoder.decode(torch.ones(1, 4, 8, 8) / autoencoder.config.scaling_factor).sample
    )
    with pytest.raises(UsageError, match="4 latent channels, the model 8"):
        vitarium.create_model("sit_flow_pico", latent_chans=8, latent_stride=2, patch_size=2).generate(
            torch.tensor([0]), autoencoder=str(tmp_path / "vae")
        )
    with pytest.raises(vitarium.errors.CheckpointError, match="cannot open the autoencoder"):
        model.generate(torch.tensor([0]), autoencoder=str(tmp_path / "nothing"))


def test_models_are_found_by_name_and_by_pattern():
    assert {f.name for f in families("dit")} == {"dit", "sit_flow"}
    assert "sit_flow_xl_2" in vitarium.list_models("*sit*")


def test_an_extractor_is_opened_once_and_again_when_its_file_changes(tmp_path, monkeypatch):
    from vitarium.generation import frechet
    from vitarium.generation.diffusion import alignment

    opened = []
    original = alignment.open_encoder
    monkeypatch.setattr(alignment, "open_encoder", lambda name: opened.append(name) or original(name))
    frechet._encoder.cache_clear()
    path = tmp_path / "judge.safetensors"
    vitarium.save(vitarium.create_model("convnext_pico", num_classes=3), path)
    first, second = (frechet.extractor(str(path))[0] for _ in range(2))
    image = torch.rand(2, 3, 16, 16)
    assert torch.equal(first(image), second(image))
    assert len(opened) == 1
    os.utime(path, ns=(1, 1))
    frechet.extractor(str(path))
    assert len(opened) == 2
