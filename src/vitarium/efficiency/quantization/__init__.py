"""Fewer bits: number formats of ops, packed layers, range estimators, calibration, allocation of bits, and the systems built on them."""
