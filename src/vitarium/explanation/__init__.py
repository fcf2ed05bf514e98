"""Why the model said so: explainers for any classifier, heat maps, and measures of how faithful they are.

| file | holds |
|---|---|
| explainers.py | the contract, and every explainer by name |
| reading.py | feature maps of any classifier, whoever wrote it |
| simple.py | explainers of a few lines: attention rollout, Grad-CAM, gradient x input, RISE, chance |
| token_tree.py | the tree of tokens, of DependencyViT and of any plain vision transformer |
| from_captum.py | those of the library captum |
| faithfulness.py | average drop, increase in confidence, insertion, deletion, ROAD, pointing |
| heatmap.py | maps as pictures |
| classifier.py | a classifier as plain values, so that what explains it can be saved with it |

The others are systems, a file each.
"""
