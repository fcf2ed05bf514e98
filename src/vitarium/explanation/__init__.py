"""Explanations of a classifier's predictions: explainers, heat maps, and measures of faithfulness.

| file | holds |
|---|---|
| explainers.py | the contract of explainers, and their registry |
| reading.py | feature maps of any classifier, from any library |
| simple.py | attention rollout, Grad-CAM, gradient x input, RISE, and random maps as a baseline |
| token_tree.py, tree_drawing.py | dependency trees over patches, of DependencyViT and of any plain vision transformer |
| from_captum.py | explainers of the library captum |
| faithfulness.py | average drop, increase in confidence, insertion, deletion, ROAD, pointing |
| heatmap.py | drawings of maps |
| classifier.py | a classifier's description as plain values, saved with its explainer |

Each other file is a system.
"""
