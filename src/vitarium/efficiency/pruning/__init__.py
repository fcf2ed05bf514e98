"""Pruning: masks of single weights, structured removal of heads and channels, and a penalty for training before it."""
