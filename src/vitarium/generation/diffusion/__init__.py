"""Denoising models: networks, processes, samplers, guidance, codecs, training and generation.

denoiser, dit      the networks: DiT (`dit_*`) and SiT (`sit_flow_*`), and the base class of denoisers
paths, flow        flows, with both time conventions by name;  gaussian: diffusion in steps
samplers           functions from a prediction and noise to data;  guidance: the prediction that they call
schedulers         diffusers' schedulers as samplers
codecs             pixels, or diffusers' autoencoders
process, pipeline  the text form of a process, and generation from labels
alignment          alignment of a denoiser's tokens with those of a frozen encoder
learner            training
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
