"""Tests on real DINOv2-S weights and photographs from packages: `make real`; `make test` does not run them."""
