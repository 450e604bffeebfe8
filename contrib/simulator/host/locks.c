#include "locks.h"

#include <stdlib.h>
#include <string.h>

#include "memory.h"
#include "random.h"

struct lock {
    struct list place;
    struct site *site;
    char *file; /* its real path: a descriptor that is written anew becomes another inode */
    uint64_t owner;      /* the session that took it last */
    bool held;           /* by a living session */
    struct timer linger; /* while it is set, a dead one's */
    struct vmdk *disk;   /* for the late writes of `owner` */
    struct list late;
};

static void note(const struct lock *lock, const char *name)
{
    char file[SITE_PATH_MAX];
    events_note(lock->site->events, name, "session=%llu file=%s",
                (unsigned long long)lock->owner, events_quote(lock->file, file, sizeof file));
}

static void free_if_unused(struct lock *lock)
{
    if (list_empty(&lock->late)) {
        vmdk_close(lock->disk);
        lock->disk = NULL;
    }
    if (lock->held || timer_is_set(&lock->linger) || !list_empty(&lock->late))
        return;
    list_remove(&lock->place);
    free(lock->file);
    free(lock);
}

/* ---- late writes ---- */

static void end_late(struct late_write *late, bool lands)
{
    struct lock *lock = late->lock;
    int error = 0;
    if (lands)
        error = vmdk_write(lock->disk, late->start, late->count, late->bytes);
    events_note(lock->site->events, lands ? "late-write-landed" : "late-write-dropped",
                "session=%llu start=%llu count=%llu error=%d", (unsigned long long)lock->owner,
                (unsigned long long)late->start, (unsigned long long)late->count, error);
    timers_clear(&lock->site->loop.timers, &late->timer);
    list_remove(&late->place);
    free(late->bytes);
    free(late);
}

static void late_fired(struct timer *timer, uint64_t at_ns)
{
    (void)at_ns;
    struct late_write *late = LIST_OF(timer, struct late_write, timer);
    struct lock *lock = late->lock;
    end_late(late, true);
    free_if_unused(lock);
}

static void settle(struct lock *lock)
{
    LIST_EACH(link, after, &lock->late)
        end_late(LIST_OF(link, struct late_write, place),
                 (random_next(&lock->site->random) & 1) != 0);
    vmdk_close(lock->disk);
    lock->disk = NULL;
}

/* ---- locks ---- */

static void linger_over(struct timer *timer, uint64_t at_ns)
{
    (void)at_ns;
    struct lock *lock = LIST_OF(timer, struct lock, linger);
    note(lock, "lock-released");
    free_if_unused(lock);
}

static struct lock *find(struct site *site, const char *file)
{
    LIST_EACH(link, after, &site->locks) {
        struct lock *lock = LIST_OF(link, struct lock, place);
        if (strcmp(lock->file, file) == 0)
            return lock;
    }
    return NULL;
}

static struct lock *make(struct site *site, const char *file)
{
    struct lock *lock = memory_zeroed(1, sizeof *lock);
    lock->site = site;
    lock->file = memory_text(file);
    lock->linger.fire = linger_over;
    list_init(&lock->late);
    list_append(&site->locks, &lock->place);
    return lock;
}

static void note_refusal(const struct lock *lock, uint64_t owner)
{
    char file[SITE_PATH_MAX];
    events_note(lock->site->events, "lock-refused", "session=%llu file=%s holder=%llu holds=%s",
                (unsigned long long)owner, events_quote(lock->file, file, sizeof file),
                (unsigned long long)lock->owner, lock->held ? "open" : "lingers");
}

struct lock *lock_take(struct site *site, const char *file, uint64_t owner)
{
    char real[SITE_PATH_MAX];
    if (realpath(file, real) == NULL)
        return NULL;
    struct lock *lock = find(site, real);
    if (lock != NULL && (lock->held || timer_is_set(&lock->linger))) {
        note_refusal(lock, owner);
        return NULL;
    }
    if (lock == NULL)
        lock = make(site, real);
    settle(lock);
    lock->owner = owner;
    lock->held = true;
    note(lock, "lock-granted");
    return lock;
}

void lock_drop(struct lock *lock)
{
    lock->held = false;
    note(lock, "lock-released");
    free_if_unused(lock);
}

void lock_abandon(struct lock *lock, struct vmdk *disk, struct list *late)
{
    struct site *site = lock->site;
    const struct settings *settings = site_settings(site);
    uint64_t now_ns = loop_now_ns();
    lock->held = false;
    lock->disk = disk;
    LIST_EACH(link, after, late) {
        struct late_write *write = LIST_OF(link, struct late_write, place);
        list_remove(link);
        list_append(&lock->late, link);
        write->lock = lock;
        write->timer = (struct timer){.fire = late_fired};
        timers_set(&site->loop.timers, &write->timer,
                   now_ns + random_below(&site->random, settings->late_write_ns));
    }
    if (settings->lock_linger_ns > 0) {
        note(lock, "lock-lingers");
        timers_set(&site->loop.timers, &lock->linger, now_ns + settings->lock_linger_ns);
    } else {
        note(lock, "lock-released");
    }
    free_if_unused(lock);
}

void locks_free(struct site *site)
{
    LIST_EACH(link, after, &site->locks) {
        struct lock *lock = LIST_OF(link, struct lock, place);
        LIST_EACH(late, next, &lock->late)
            end_late(LIST_OF(late, struct late_write, place), false);
        timers_clear(&site->loop.timers, &lock->linger);
        lock->held = false;
        free_if_unused(lock);
    }
}
