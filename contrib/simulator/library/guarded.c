/*
 * Memory for the structures that the library gives out. It ends where an unreadable page begins: a
 * client that takes a structure for the longer one of a newer release dies at once instead of
 * reading what happens to lie behind.
 */
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "library.h"

struct header {
    void *mapping;
    size_t length;
    uint64_t strings_are_ours;
    uint64_t mark;
};

#define MARK 0x67756172646564u

void *guarded_alloc(size_t size, bool strings_are_ours)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    size_t room = (size + 7) / 8 * 8;
    size_t body = (room + sizeof(struct header) + page - 1) / page * page;
    char *mapping = mmap(NULL, body + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    struct header *header;
    if (mapping == MAP_FAILED)
        return NULL;
    mprotect(mapping + body, page, PROT_NONE);
    header = (struct header *)(void *)(mapping + body - room) - 1;
    *header = (struct header){mapping, body + page, strings_are_ours, MARK};
    return header + 1;
}

static struct header *header_of(const void *memory)
{
    struct header *header = (struct header *)(uintptr_t)memory - 1;
    if (header->mark != MARK)
        broken(STRICT_ABORT, "Free", VIX_E_FAIL, "%p is not of this library", memory);
    return header;
}

bool guarded_owns_strings(const void *memory)
{
    return header_of(memory)->strings_are_ours;
}

void guarded_free(void *memory)
{
    struct header *header = header_of(memory);
    munmap(header->mapping, header->length);
}
