"""Image restoration: the base class of networks, the learner, tiling, metrics."""
