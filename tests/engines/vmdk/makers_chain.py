"""Writers of links and chains of VMDKs, and their model. See ``makers``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.engines.vmdk.makers import DESCRIPTOR_SECTORS, SECTOR, Extent, Flat, Zero

NO_PARENT = 0xFFFFFFFF


@dataclass(frozen=True)
class Link:
    """One VMDK: createType *kind* and its extents; *embedded* is one file with its descriptor.

    *qemu_kind* is the createType that qemu-img is shown, where it does not know *kind*.
    """

    kind: str
    extents: tuple[Extent, ...]
    embedded: bool = False
    qemu_kind: str = ""

    @property
    def sectors(self) -> int:
        """The capacity."""
        return sum(extent.sectors for extent in self.extents)


def describe(link: Link, names: Sequence[str], cid: int, parent_cid: int, hint: str) -> str:
    """Return a descriptor's text."""
    lines = ["# Disk DescriptorFile", "version=1", 'encoding="UTF-8"']
    lines += [f"CID={cid:08x}", f"parentCID={parent_cid:08x}", f'createType="{link.kind}"']
    if hint:
        lines.append(f'parentFileNameHint="{hint}"')
    lines += ["", "# Extent description"]
    lines += [extent.line(name) for extent, name in zip(link.extents, names, strict=True)]
    lines += ["", "# The Disk Data Base", "#DDB", "", 'ddb.adapterType = "lsilogic"']
    lines += ['ddb.virtualHWVersion = "14"', 'ddb.geometry.cylinders = "1"']
    lines += ['ddb.geometry.heads = "255"', 'ddb.geometry.sectors = "63"']
    return "\n".join(lines) + "\n"


def extent_names(link: Link, number: int) -> list[str]:
    """Return the file names of the extents of link *number* of a chain."""
    if link.embedded:
        return [f"{number}.vmdk"]
    return [f"{number}-s{index:03}.vmdk" for index in range(1, len(link.extents) + 1)]


def write_chain(folder: Path, links: Sequence[Link]) -> list[Path]:
    """Write *links*, base first, as 0.vmdk, 1.vmdk ... in *folder*; return those paths."""
    paths = []
    for number, link in enumerate(links):
        path = folder / f"{number}.vmdk"
        names = extent_names(link, number)
        text = _text(links, number)
        if not link.embedded:
            path.write_text(text)
        assert len(text) <= DESCRIPTOR_SECTORS * SECTOR
        for extent, name in zip(link.extents, names, strict=True):
            extent.write(folder / name, text.encode() if link.embedded else b"")
        paths.append(path)
    return paths


def write_twin(folder: Path, twin: Path, links: Sequence[Link]) -> list[Path]:
    """Write into *twin* a chain of the same files for qemu-img, if it needs one; return its paths.

    It leaves ZERO extents and all that is not RW out, refuses VMFS extents with an offset, and
    knows few createTypes. In the twin's descriptors flat extents stand for them.
    """
    if not any(_odd(link) for link in links):
        return [folder / f"{number}.vmdk" for number in range(len(links))]
    for file in folder.iterdir():
        (twin / file.name).symlink_to(file)
    for number, link in enumerate(links):
        if not _odd(link):
            continue
        lines = []
        names = extent_names(link, number)
        for extent, name in zip(link.extents, names, strict=True):
            if isinstance(extent, Zero):
                with open(twin / name, "wb") as zeros:
                    zeros.truncate(extent.sectors * SECTOR)
                lines.append(f'RW {extent.sectors} FLAT "{name}" 0')
            elif isinstance(extent, Flat):
                lines.append(f'RW {extent.sectors} FLAT "{name}" {extent.offset}')
            else:
                lines.append(extent.line(name))
        text = _text(links, number)
        for extent, name, line in zip(link.extents, names, lines, strict=True):
            text = text.replace(extent.line(name) + "\n", line + "\n", 1)
        text = text.replace(f'"{link.kind}"', f'"{link.qemu_kind or link.kind}"')
        (twin / f"{number}.vmdk").unlink()
        (twin / f"{number}.vmdk").write_text(text)
    return [twin / f"{number}.vmdk" for number in range(len(links))]


def _odd(link: Link) -> bool:
    """Say whether qemu-img needs another descriptor of *link*."""
    return bool(link.qemu_kind) or any(
        isinstance(extent, Zero)
        or (
            isinstance(extent, Flat)
            and (extent.access != "RW" or (extent.keyword == "VMFS" and extent.offset))
        )
        for extent in link.extents
    )


def _text(links: Sequence[Link], number: int) -> str:
    parent_cid = _cid(number - 1) if number else NO_PARENT
    hint = f"{number - 1}.vmdk" if number else ""
    names = extent_names(links[number], number)
    return describe(links[number], names, _cid(number), parent_cid, hint)


def _cid(number: int) -> int:
    return 0x0C1D0000 + number * 0x101


def paint_chain(path: Path, links: Sequence[Link]) -> None:
    """Write the model: the raw file that the last of *links* must look like."""
    with open(path, "wb+") as raw:
        for link in links:
            # What a smaller link hides of its parent is not seen by a larger child either.
            raw.truncate(link.sectors * SECTOR)
            start = 0
            for extent in link.extents:
                extent.paint(raw, start)
                start += extent.sectors
