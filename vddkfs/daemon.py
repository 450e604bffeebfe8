"""One mount, put together and taken down in reverse.

Order of things: arena and cache, a supervisor for each disk's worker, the tree, the FUSE session,
the control socket, the kernel's requests. "Ready" is said when the mount answers. For its end see
``departure``; SIGHUP does what ``vddkfs invalidate`` does.
"""

import contextlib
import functools
import json
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import trio

from vddkfs.cache.arena import Arena
from vddkfs.cache.frames import SectorCache
from vddkfs.control import ControlServer
from vddkfs.departure import Departure
from vddkfs.disks.describe import describe_disk, describe_source
from vddkfs.disks.disk import Disk
from vddkfs.disks.extents import qemu_map
from vddkfs.disks.image import Image
from vddkfs.disks.vm import Chain, Source
from vddkfs.engines.base import EngineFacts, EngineReport, LinkIdentity
from vddkfs.engines.client import WorkerClient
from vddkfs.engines.config import EngineConfig, VmdkConfig
from vddkfs.engines.requests import Patience
from vddkfs.errors import VddkfsError
from vddkfs.fuse import session
from vddkfs.fuse.notify import KernelPages
from vddkfs.fuse.operations import Operations
from vddkfs.fuse.tree import Tree
from vddkfs.invalidation import Invalidation
from vddkfs.memory import default_cache_size, keep_buffers, write_back_without_waiting
from vddkfs.observe.figures import Family
from vddkfs.observe.logs import Log
from vddkfs.observe.metrics import Metrics
from vddkfs.observe.status import StatusReport
from vddkfs.options import MountOptions
from vddkfs.overlays import overlay_of
from vddkfs.state import held, socket_path, state_folder

log = logging.getLogger(__name__)

_OPEN_SECONDS = 300.0
_HOTADD_SECONDS = 900.0
"""How long a worker may take to open its disks."""
_STATISTICS_SECONDS = 0.08
"""How long a worker may take to tell what its library did: status must not wait for a hung one."""


class Daemon:
    """Serves *source* at *mountpoint* (canonical) until it is unmounted or told to stop.

    *log_to* is where its log goes, for status.
    """

    def __init__(
        self,
        source: Source,
        mountpoint: str,
        options: MountOptions,
        log_to: Log,
    ) -> None:
        self._source = source
        self._mountpoint = mountpoint
        self._options = options
        self._log = log_to
        self._clients: list[WorkerClient] = []
        self._disks: list[Disk] = []
        self._operations: Operations | None = None
        self._report: StatusReport | None = None
        self._invalidation: Invalidation | None = None
        self._metrics: Metrics | None = None
        self._overlay = ""

    async def run(self, ready: Callable[[], None]) -> None:
        """Mount, call *ready* when the mount answers, and serve. Raises VddkfsError."""
        state_folder(create=True)
        writing = self._options.overlay or self._options.writable
        if writing:
            keep_buffers()
        if writing and not write_back_without_waiting():
            log.info(
                "the kernel does not let the daemon have memory first (CAP_SYS_RESOURCE): under a "
                "memory limit that it shares with who writes through a loop device, both may stand "
                "still"
            )
        async with AsyncExitStack() as stack:
            for folder in {plan.folder for plan in self._source.workers if plan.folder}:
                stack.enter_context(held(Path(folder)))
            cache_size = self._options.cache_size or default_cache_size()
            readers = {(c.name, image.worker) for c in self._source.chains for image in c.images}
            arena = Arena(cache_size, len(readers), self._options.block_size)
            stack.callback(arena.close)
            nursery = await stack.enter_async_context(_cancelled_at_end())
            self._make_disks(arena, nursery)
            if self._options.overlay:
                self._overlay = await stack.enter_async_context(self._overlaid())
            for client in self._clients:
                nursery.start_soon(client.run)
                stack.callback(client.stop)
            await self._prove_access()
            shown = (self._mountpoint, self._source.path, arena, self._disks)
            self._report = StatusReport(*shown)
            self._metrics = Metrics(*shown)
            tree = self._make_tree(nursery)
            capacity = sum(disk.capacity for disk in self._disks)
            source = self._source
            self._operations = Operations(
                tree, self._options, capacity, source.engine, source.facts.transport
            )
            await self._serve(self._operations, nursery, ready)

    def _make_disks(self, arena: Arena, nursery: trio.Nursery) -> None:
        options = self._options
        cache = SectorCache(arena, nursery)
        for number, plan in enumerate(self._source.workers):
            opened = functools.partial(self._opened, number)
            client = WorkerClient(
                plan.name, plan.config, self._patience(plan.config), opened, secret=plan.secret
            )
            self._clients.append(client)
        for chain in self._source.chains:
            disk = Disk(
                self._as_mounted(chain),
                self._clients,
                nursery=nursery,
                cache=cache,
                read_ahead=options.readahead,
                mode=options.cache,
            )
            self._disks.append(disk)

    async def _prove_access(self) -> None:
        """Open every base that is to be written, so that a refusal is met now and not at the first
        write. Raises VddkfsError.
        """
        for disk in self._disks:
            if disk.images[0].writes is not None:
                await disk.prove_access()
        for plan in self._source.workers:
            if isinstance(plan.config, VmdkConfig) and plan.config.keep_content_id:
                log.info(
                    "%s: its content id stays what it is when the base is written: links lie "
                    "above it",
                    plan.name,
                )

    def _overlaid(self) -> AbstractAsyncContextManager[str]:
        options = self._options
        remote = self._source.engine == "vddk" and not options.assume
        return overlay_of(self._disks, options.overlay, options.overlay_force == "yes", remote)

    def _as_mounted(self, chain: Chain) -> Chain:
        """Return *chain*, frozen altogether where an overlay takes the writes of a local disk.

        Its owner must not write it then, and it is noticed if he does: what the overlay has would
        lie on top of another disk. Where he may all the same (``overlay_force``) it stays live.
        """
        options = self._options
        local = self._source.engine == "vmdk"
        if options.overlay and local and options.overlay_force == "no":
            return msgspec.structs.replace(chain, live=-1)
        return chain

    def _patience(self, config: EngineConfig) -> Patience:
        """Return how long a worker is waited for; attaching a disk to a machine takes its time."""
        return Patience(
            op_timeout=self._options.op_timeout,
            open_timeout=_HOTADD_SECONDS if config.hot_adds else _OPEN_SECONDS,
            retry_budget=self._options.retry_budget,
            idle_timeout=self._options.idle_timeout,
            fence_timeout=self._options.fence_timeout,
        )

    def _opened(self, worker: int, identities: Sequence[LinkIdentity]) -> None:
        for disk in self._disks:
            disk.opened(worker, identities)

    def _make_tree(self, nursery: trio.Nursery) -> Tree:
        newest = max(disk.top.mtime_ns for disk in self._disks)
        changing = self._source.engine == "vddk"
        tree = Tree(self._described, self._status, self._measured, newest, changing=changing)
        pages = KernelPages(tree)
        for disk in self._disks:
            allocation = functools.partial(_allocation, disk.top)
            tree.add_disk(disk, functools.partial(self._described_disk, disk), allocation)
            for image in disk.images:
                image.superseded = functools.partial(_superseded, tree, image, pages, nursery)
        self._invalidation = Invalidation(tree, self._disks, pages.drop)
        return tree

    async def _described(self) -> bytes:
        facts = await self._facts(self._clients)
        return _json(describe_source(msgspec.structs.replace(self._source, facts=facts)))

    async def _described_disk(self, disk: Disk) -> bytes:
        facts = await self._facts(disk.clients)
        writers = [image.name for image in disk.images if image.writable]
        return _json(describe_disk(disk, self._source.engine, facts, writers))

    async def _facts(self, clients: Sequence[WorkerClient]) -> EngineFacts:
        """Return what reads the disks, with the transports that are in use now, if any is."""
        reports = await self._engine_reports(clients)
        used = dict.fromkeys(name for one in reports.values() for name in one.transports)
        facts = self._source.facts
        return msgspec.structs.replace(facts, transport=", ".join(used) or facts.transport)

    async def _serve(
        self, operations: Operations, workers: trio.Nursery, ready: Callable[[], None]
    ) -> None:
        """Serve the mount; signals are taken from before it is there until it is gone."""
        assert self._invalidation is not None
        with (
            trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals,
            trio.open_signal_receiver(signal.SIGHUP) as hangups,
        ):
            session.mount(
                operations,
                self._mountpoint,
                self._source.path,
                self._options.allow_other,
                writable=any(image.writable for disk in self._disks for image in disk.images),
            )
            try:
                async with trio.open_nursery() as nursery:
                    handlers = {
                        "status": self._answer,
                        "metrics": self._answer_metrics,
                        "invalidate": self._invalidation.answer,
                        "invalidating": self._invalidation.waiting,
                    }
                    control = ControlServer(socket_path(self._mountpoint), handlers)
                    await nursery.start(control.run)
                    departure = Departure(
                        self._mountpoint, self._options.stop_timeout, operations, self._clients
                    )
                    nursery.start_soon(departure.on_signals, signals, nursery.cancel_scope)
                    nursery.start_soon(self._invalidation.on_hangups, hangups, self._mountpoint)
                    nursery.start_soon(self._serve_requests, operations, nursery)
                    await self._say_ready(ready)
            finally:
                session.close()
                log.info("%s is unmounted", self._mountpoint)

    async def _say_ready(self, ready: Callable[[], None]) -> None:
        if not session.has_hooks():
            log.warning(
                "the C module is missing: no SEEK_HOLE and a shorter queue; "
                "`contrib/setup` builds it where libfuse's headers are"
            )
        await trio.to_thread.run_sync(os.stat, self._mountpoint, abandon_on_cancel=True)
        # Not before the mount has answered: the kernel sets its own value when it begins.
        reason = session.raise_read_ahead(self._mountpoint)
        if reason:
            log.info("the kernel's read-ahead stays as it is, which is slower: %s", reason)
        log.info("%s is mounted at %s", self._source.path, self._mountpoint)
        ready()

    async def _serve_requests(self, operations: Operations, nursery: trio.Nursery) -> None:
        def busy() -> bool:
            return any(client.in_flight for client in self._clients)

        await session.serve(operations.lseek, busy, nursery)
        nursery.cancel_scope.cancel()

    async def _status(self) -> bytes:
        return _json(await self._answer({}))

    async def _answer(self, _request: dict[str, Any]) -> dict[str, Any]:
        assert self._report is not None
        assert self._operations is not None
        reports = await self._engine_reports(self._clients)
        shown = self._operations
        return self._report.collect(
            session.agreed(),
            shown.open_files,
            self._log,
            shown.served,
            reports,
            self._overlay,
        )

    async def _measured(self) -> bytes:
        assert self._metrics is not None
        assert self._operations is not None
        reports = await self._engine_reports(self._clients)
        shown = self._operations
        families = self._metrics.collect(shown.open_files, shown.served, reports)
        return await trio.to_thread.run_sync(_rendered, families)

    async def _answer_metrics(self, _request: dict[str, Any]) -> dict[str, Any]:
        return {"metrics": (await self._measured()).decode()}

    async def _engine_reports(self, clients: Sequence[WorkerClient]) -> dict[str, EngineReport]:
        """Ask the workers how their libraries do; one that does not answer is left out."""
        found: dict[str, EngineReport] = {}

        async def ask(client: WorkerClient) -> None:
            with trio.move_on_after(_STATISTICS_SECONDS), contextlib.suppress(VddkfsError):
                found[client.name] = await client.report()

        async with trio.open_nursery() as nursery:
            for client in clients:
                if client.config.uses_library:
                    nursery.start_soon(ask, client)
        return found


@asynccontextmanager
async def _cancelled_at_end() -> AsyncIterator[trio.Nursery]:
    """A nursery for services that would run for ever."""
    async with trio.open_nursery() as nursery:
        try:
            yield nursery
        finally:
            nursery.cancel_scope.cancel()


def _superseded(tree: Tree, image: Image, pages: KernelPages, nursery: trio.Nursery) -> None:
    pages.forget(nursery, tree.renew(image))


def _rendered(families: Sequence[Family]) -> bytes:
    """Return the metrics' text, from a thread: with many disks it takes a while."""
    # Imported here, because that alone takes longer than anybody should wait for a read.
    from vddkfs.observe.exposition import render

    return render(families)


async def _allocation(image: Image) -> bytes:
    """Return map.json; a long one is written in a thread, because that takes a while."""
    allocation = await image.map_now()
    return await trio.to_thread.run_sync(
        lambda: msgspec.json.format(msgspec.json.encode(qemu_map(allocation)), indent=1) + b"\n"
    )


def _json(content: object) -> bytes:
    return json.dumps(content, indent=2).encode() + b"\n"
