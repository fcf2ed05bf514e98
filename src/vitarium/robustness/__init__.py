"""What breaks a model, and what makes it hold: sharp minima, corrupted pictures.

| file | holds |
|---|---|
| sharpness.py | eigenvalues and trace of the Hessian of a loss |
| surface.py | the loss around the weights, as a picture |
| corruptions.py | ImageNet-C's fifteen kinds of corruption |
| benchmark.py | the error of a classifier under them |

The others are systems, a file each. SAM itself is a setting of every recipe: `optimizer.sam: {rho: 0.1}`.
"""
