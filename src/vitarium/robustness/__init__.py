"""Robustness: sharpness of minima, corrupted images, and training that improves both.

| file | holds |
|---|---|
| sharpness.py | eigenvalues and trace of the Hessian of a loss |
| surface.py | drawings of the loss around the weights |
| corruptions.py | ImageNet-C's fifteen kinds of corruption |
| benchmark.py | the error of a classifier under them |

Each other file is a system. SAM itself is a setting of every recipe: `optimizer.sam: {rho: 0.1}`.
"""
