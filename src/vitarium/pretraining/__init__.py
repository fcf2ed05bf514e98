"""Pretraining of features without labels, and their evaluation."""
