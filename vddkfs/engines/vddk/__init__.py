"""VDDK: disks of vCenter and ESXi through VMware's libvixDiskLib, loaded at run time.

The binding, from the bottom up: ``layouts``, ``calls`` and ``codes`` are tables; ``elf``, ``kit``
and ``loader`` find and load the library; ``messages``, ``completions`` and ``native`` speak with
it; ``library``, ``connection`` and ``handle`` are what an engine uses, with ``params`` and
``configuration`` to say what it wants.
"""
