"""The selective scan of state-space models, by the fastest implementation of the device."""

from vitarium.ops.scan.dispatch import IMPLEMENTATIONS, choose, selective_scan
from vitarium.ops.scan.reference import scan_doubling, scan_reference, scan_step

__all__ = ["IMPLEMENTATIONS", "choose", "scan_doubling", "scan_reference", "scan_step", "selective_scan"]
