"""The built-in engine: VMDK files read in pure Python, with nothing of VMware installed.

``discover`` finds the disks of a folder, an .ova, a .vmx or a .vmdk; ``VmdkEngine`` opens one of
the chains it found. The modules, from the bottom up:

- ``text``, ``descriptor``, ``vmx``, ``archive``, ``layout`` and the headers (``sparse``, ``cowd``,
  ``sesparse``) parse bytes and open nothing; ``files`` opens, ``formats`` and ``recognise`` say
  what can be read;
- ``extents``, ``tables``, ``directory``, ``grains``, ``packed`` and ``deferred`` find sectors;
- ``link`` and ``opening`` make one VMDK of them, ``chain``, ``folder`` and ``discover`` describe;
- ``owners`` and ``engine`` read; ``write`` writes to the base; ``check`` looks for damage.
"""

from vddkfs.engines.vmdk.chain import describe_chain
from vddkfs.engines.vmdk.discover import Chain, Discovery, LeftOut, discover
from vddkfs.engines.vmdk.engine import VmdkEngine

__all__ = ["Chain", "Discovery", "LeftOut", "VmdkEngine", "describe_chain", "discover"]
