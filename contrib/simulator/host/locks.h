/*
 * Who may write which disk, and the writes of dead clients.
 *
 * A disk's file has one writer at a time. When a writer's connection breaks, the host does not
 * know that its client is dead: the lock is held for a while, and the writes that had arrived land
 * when they land. Only when a new writer takes the lock is their fate settled: each lands before
 * the lock is granted, or never.
 */
#ifndef SIMULATOR_HOST_LOCKS_H
#define SIMULATOR_HOST_LOCKS_H

#include <stdbool.h>
#include <stdint.h>

#include "../vmdk/vmdk.h"
#include "list.h"
#include "site.h"

struct lock;

struct late_write {
    struct list place;
    struct timer timer;
    struct lock *lock;
    uint64_t start, count;
    char *bytes; /* freed with it */
};

/* NULL when somebody else holds it; the file is the descriptor of the disk, `owner` a session. */
struct lock *lock_take(struct site *site, const char *file, uint64_t owner);

/* The writer has closed. */
void lock_drop(struct lock *lock);
/* The writer is gone. The list of late writes is emptied, and the disk kept until the last of them
 * has landed. */
void lock_abandon(struct lock *lock, struct vmdk *disk, struct list *late);

void locks_free(struct site *site); /* drops all late writes */

#endif
