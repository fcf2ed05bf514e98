"""Denoisers and everything around them: the base of every system here that turns noise into images.

denoiser, dit      the networks: DiT (`dit_*`) and SiT (`sit_flow_*`), and what every denoiser keeps
paths, flow        flows, with both time conventions by name;  gaussian: diffusion in steps
samplers           functions from a prediction and noise to data;  guidance: which prediction
schedulers         diffusers' schedulers in their place
codecs             pixels, or diffusers' autoencoders
process, pipeline  one line of text for what a model was trained for, and from labels to pictures
alignment          tokens of any denoiser's block drawn to those of any frozen encoder
learner            training them
"""

from vitarium.generation.diffusion.alignment import Alignment, Encoder, hidden_tokens
from vitarium.generation.diffusion.codecs import Latents, Pixels, codec_of, open_autoencoder
from vitarium.generation.diffusion.denoiser import Denoiser
from vitarium.generation.diffusion.dit import DiT, DiTBlock, FinalLayer, SiT, TimeEmbed, modulate
from vitarium.generation.diffusion.flow import Flow
from vitarium.generation.diffusion.gaussian import GaussianDiffusion
from vitarium.generation.diffusion.guidance import guided
from vitarium.generation.diffusion.paths import Path
from vitarium.generation.diffusion.pipeline import generate, process_of
from vitarium.generation.diffusion.process import parse_process, sample
from vitarium.generation.diffusion.schedulers import sample_with, scheduler_for

__all__ = [
    "Alignment",
    "Denoiser",
    "DiT",
    "DiTBlock",
    "Encoder",
    "FinalLayer",
    "Flow",
    "GaussianDiffusion",
    "Latents",
    "Path",
    "Pixels",
    "SiT",
    "TimeEmbed",
    "codec_of",
    "generate",
    "guided",
    "hidden_tokens",
    "modulate",
    "open_autoencoder",
    "parse_process",
    "process_of",
    "sample",
    "sample_with",
    "scheduler_for",
]
