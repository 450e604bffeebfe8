/*
 * Small allocations that the host cannot do without: it ends when there is no memory for them.
 * Bodies whose size a peer chooses are allocated with malloc() and may fail.
 */
#ifndef SIMULATOR_HOST_MEMORY_H
#define SIMULATOR_HOST_MEMORY_H

#include <stddef.h>

void *memory_zeroed(size_t count, size_t size);
void *memory_resized(void *old, size_t count, size_t size);
char *memory_text(const char *text); /* a copy; NULL stays NULL */

#endif
