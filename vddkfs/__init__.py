"""vddkfs: VMware virtual machine disks, and every point of their snapshot chains, as raw files."""

__version__ = "0.1.0"
