/* The logins to the VIM service, for the sessions that name them. */
#ifndef SIMULATOR_HOST_VIM_H
#define SIMULATOR_HOST_VIM_H

#include <stdbool.h>
#include <stdint.h>

#include "peer.h"
#include "site.h"

struct login {
    struct peer peer;
    struct site *site;
    struct list place;
    uint64_t id; /* 0: not logged in yet */
    uint64_t client, release;
    char *vmx_spec, *snapshot, *tmp_directory;
    bool read_only, orderly;
};

struct login *vim_login(struct site *site, uint64_t id); /* NULL when there is none */

#endif
