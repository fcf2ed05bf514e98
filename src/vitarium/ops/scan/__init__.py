"""Selective scan of state-space models, with the fastest implementation for the device."""

from vitarium.ops.scan.causal_conv import causal_conv_silu
from vitarium.ops.scan.dispatch import selective_scan
from vitarium.ops.scan.implementations import IMPLEMENTATIONS, choose
from vitarium.ops.scan.reference import scan_doubling, scan_matrix, scan_reference, scan_step

__all__ = ["IMPLEMENTATIONS", "causal_conv_silu", "choose", "scan_doubling", "scan_matrix", "scan_reference", "scan_step", "selective_scan"]
