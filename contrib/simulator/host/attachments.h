/*
 * The disks that HotAdd has attached to the proxy VM, in SITE/.sim/attachments.
 *
 * An attachment outlives the client that asked for it and this process: it is the hypervisor's, and
 * uses a slot of the proxy VM until its session closes or a Cleanup finds it.
 */
#ifndef SIMULATOR_HOST_ATTACHMENTS_H
#define SIMULATOR_HOST_ATTACHMENTS_H

#include <stdbool.h>
#include <stdint.h>

#include "devices.h"
#include "site.h"

struct attachment {
    struct list place;
    char *moref, *path;  /* of the VM and its disk */
    char *tmp_directory; /* "" for none */
    char (*devices)[DEVICE_PATH_MAX];
    unsigned device_count;
    uint64_t session;
    long pid;   /* of the client */
    bool alive; /* its session is: cleaning up leaves it */
};

void attachments_load(struct site *site);
void attachments_free(struct site *site); /* the memory; what is attached stays so */
unsigned attachments_count(const struct site *site);

/* Attaches the files; NULL with errno when that cannot be had. The texts are copied. */
struct attachment *attachment_make(struct site *site, const struct attachment *like,
                                   const char *const *files, unsigned file_count);
void attachment_detach(struct site *site, struct attachment *attachment);
void attachment_refresh(const struct attachment *attachment); /* its devices have grown, perhaps */
void attachment_orphan(struct site *site, struct attachment *attachment);

/* Detaches what dead clients with that tmpDirectory left on the VM (NULL: on any). */
void attachments_cleanup(struct site *site, const char *moref, const char *tmp_directory,
                         unsigned *cleaned, unsigned *remaining);

/* Whether the VM lost a disk because it had been hot-added to itself. */
bool attachments_removed(const struct site *site, const char *moref);

#endif
