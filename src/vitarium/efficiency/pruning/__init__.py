"""Fewer weights: masks of single weights, smaller layers, and what to train with before and after."""
