"""Builds ``vddkfs.engines.vddk._reads``, the C module of reads.c (cffi, API mode).

Run by setup.py when the package is installed.
"""

from pathlib import Path

from cffi import FFI

DECLARATIONS = """
enum next { NEXT_TURN, NEXT_PACKET, ... };
struct received { uint64_t length; int fd; int cut; };
struct ended {
    uint64_t id; uint64_t sector;
    uint32_t image; uint32_t count; uint32_t chunk; uint32_t offset; uint32_t code;
};
struct reads;
struct reads *reads_new(int sock, int woken, uint64_t read_async, int64_t spin_ns,
                        unsigned image_count);
void reads_close(struct reads *reads);
int reads_lend(struct reads *reads, uint32_t number, uint64_t address, uint64_t size);
void reads_take_back(struct reads *reads, uint32_t number);
void reads_offer(struct reads *reads, unsigned index, uint64_t handle, uint64_t room,
                 uint64_t piece, int no_direct, int aligned, int watch);
void reads_under_way(struct reads *reads, unsigned index, int watch, uint64_t *requests,
                     uint64_t *bytes);
int64_t reads_news(struct reads *reads, unsigned index, uint64_t *came_back);
void reads_figures(struct reads *reads, uint64_t *figures);
uint64_t reads_strays(struct reads *reads);
int reads_take_ended(struct reads *reads, struct ended *ended);
int reads_next(struct reads *reads, int64_t until, uint8_t *packet, uint64_t size,
               struct received *received);
"""


def builder() -> FFI:
    """Return the FFI builder of the module."""
    ffi = FFI()
    ffi.cdef(DECLARATIONS)
    ffi.set_source(
        "vddkfs.engines.vddk._reads",
        Path(__file__).with_name("reads.c").read_text(encoding="ascii"),
        extra_compile_args=["-fvisibility=hidden", "-pthread"],
    )
    return ffi


if __name__ == "__main__":
    builder().compile(verbose=True)
