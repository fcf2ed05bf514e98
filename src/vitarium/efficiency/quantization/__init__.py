"""Quantization: packed low-bit layers, range estimators, calibration, allocation of bits, and the methods built on them."""
