"""What a cache did, counted: for status and metrics."""


class Counts:
    """Of one image's cache, since the mount began. What ends in ``_bytes`` is bytes.

    A *hit* is a read that was answered at once, a *miss* one that had something fetched,
    *coalesced* one that waited for what another had asked for. ``fetched_bytes`` came from the
    source, for whatever reason; of these ``ahead_bytes`` were fetched before anybody asked, and in
    the end were used or wasted (not read before they went). ``direct_bytes`` went past the cache,
    and ``zero_bytes`` were answered from the allocation map. ``invalidations`` counts how often old
    content was dropped on purpose.
    """

    __slots__ = (
        "ahead_bytes",
        "ahead_used_bytes",
        "ahead_wasted_bytes",
        "coalesced",
        "direct_bytes",
        "fetched_bytes",
        "hits",
        "invalidations",
        "misses",
        "zero_bytes",
    )

    def __init__(self) -> None:
        self.hits = 0
        self.misses = 0
        self.coalesced = 0
        self.fetched_bytes = 0
        self.ahead_bytes = 0
        self.ahead_used_bytes = 0
        self.ahead_wasted_bytes = 0
        self.direct_bytes = 0
        self.zero_bytes = 0
        self.invalidations = 0
