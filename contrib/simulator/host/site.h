/* What all parts of the host process share: one site and what is going on in it. */
#ifndef SIMULATOR_HOST_SITE_H
#define SIMULATOR_HOST_SITE_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/stat.h>

#include "../common/events.h"
#include "../common/settings.h"
#include "list.h"
#include "loop.h"
#include "registry.h"
#include "timing.h"

#define SITE_PATH_MAX 4096

/* One ESXi host. They are never freed before the end: whoever holds one needs no reference. */
struct site_host {
    struct list place;
    char name[64];
    int state; /* as in struct host_state */
    struct trunk trunk;
    uint64_t memory_bytes; /* of the requests in flight */
    uint64_t sessions;
};

struct site {
    char folder[SITE_PATH_MAX], state_folder[SITE_PATH_MAX];
    struct loop loop;
    struct events *events;
    struct settings_source *source;
    const struct settings *settings; /* of this turn */
    struct chore settings_chore;
    struct timer tick;
    struct registry *registry;
    struct stat registry_stat;
    uint64_t random, seed, next_id;
    struct list hosts, logins, sessions, accesses;
    struct list locks;       /* locks.c */
    struct list devices;     /* devices.c */
    struct list attachments; /* attachments.c */
    char **removed;          /* morefs of VMs that lost their disks */
    unsigned removed_count;
    bool devices_refused; /* that loop devices cannot be had is told once */
};

bool site_init(struct site *site, const char *folder); /* false: said on stderr */
void site_free(struct site *site);

/* The settings as they are in this turn: read anew at the first use in each. */
const struct settings *site_settings(struct site *site);
/* Read anew when the file changed; NULL when there never was a good one. */
const struct registry *site_registry(struct site *site);
struct site_host *site_host(struct site *site, const char *name);
uint64_t site_new_id(struct site *site); /* unlike any of this or an earlier host process */

int site_host_state(const struct settings *settings, const char *name);
const char *site_host_state_name(int state);

/* SITE/DATASTORE/FILE of `[DATASTORE] FILE`; false when it is not of that form. `datastore` has 64
 * bytes. */
bool site_file(const struct site *site, const char *path, char datastore[64],
               char file[SITE_PATH_MAX]);

/* The two services; they take over the socket (nfc.c, vim.c). */
void vim_accept(struct site *site, int socket);
void nfc_accept(struct site *site, int socket);
void vim_free(struct site *site);
void nfc_free(struct site *site);
/* The host's state has changed, settings may have (nfc.c). */
void nfc_host_changed(struct site *site, struct site_host *host);
void nfc_tick(struct site *site, uint64_t now_ns);

#endif
