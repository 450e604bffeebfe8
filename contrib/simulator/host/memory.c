#include "memory.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void *needed(void *memory)
{
    if (memory == NULL) {
        fputs("vixsim-host: out of memory\n", stderr);
        abort();
    }
    return memory;
}

void *memory_zeroed(size_t count, size_t size)
{
    return needed(calloc(count > 0 ? count : 1, size));
}

void *memory_resized(void *old, size_t count, size_t size)
{
    return needed(reallocarray(old, count > 0 ? count : 1, size));
}

char *memory_text(const char *text)
{
    return text == NULL ? NULL : needed(strdup(text));
}
