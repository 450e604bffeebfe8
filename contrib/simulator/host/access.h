/* Which file of a virtual machine may be opened, and by whom. */
#ifndef SIMULATOR_HOST_ACCESS_H
#define SIMULATOR_HOST_ACCESS_H

#include <stdbool.h>
#include <stdint.h>

#include "site.h"

#define WHY_MAX 512

struct access {
    const struct registry_vm *vm;
    const char *snapshot; /* its moref, or NULL */
    const char *path;     /* [DATASTORE] FOLDER/FILE */
    bool writable;
    uint64_t release; /* of the client's library: 65, 67, 70 ... */
    /* filled in */
    char datastore[64];
    char file[SITE_PATH_MAX];
    char why[WHY_MAX];
};

/* An error code, and why; 0 when it may be opened. */
int access_check(struct site *site, struct access *access);

#endif
