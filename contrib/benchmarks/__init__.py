"""Benchmarks of vddkfs against what else shows a VMDK as a raw file. See README.md."""
