"""The built-in engine: VMDK files read in pure Python, with nothing of VMware installed.

``discover`` finds the disks of a folder, a .vmx or a .vmdk; ``VmdkEngine`` opens one of the chains
it found. The modules, from the bottom up: ``text``, ``descriptor``, ``sparse`` and ``vmx`` parse
bytes and open nothing; ``files`` opens; ``extents``, ``tables`` and ``grains`` find sectors;
``link``, ``chain`` and ``discover`` describe; ``engine`` reads.
"""

from vddkfs.engines.vmdk.chain import describe_chain
from vddkfs.engines.vmdk.discover import Chain, Discovery, LeftOut, discover
from vddkfs.engines.vmdk.engine import VmdkEngine

__all__ = ["Chain", "Discovery", "LeftOut", "VmdkEngine", "describe_chain", "discover"]
