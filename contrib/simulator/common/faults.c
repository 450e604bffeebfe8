/* Which calls a fault strikes: see settings.h and faults.h. */
#include "faults.h"

#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* Slots are never given back, so that a rule that comes back goes on counting; the file is sparse. */
#define SLOTS 16384u

struct slot {
    uint64_t id; /* of the rule; 0 is free. All three are atomic. */
    uint64_t matched;
    uint64_t struck;
};

struct fault_counters {
    struct slot *slots;
};

static struct slot *map_slots(int fd)
{
    void *slots = mmap(NULL, SLOTS * sizeof(struct slot), PROT_READ | PROT_WRITE,
                       MAP_SHARED | (fd < 0 ? MAP_ANONYMOUS : 0), fd, 0);
    return slots == MAP_FAILED ? NULL : slots;
}

static struct slot *map_file(const char *state, char *why, size_t size)
{
    char path[PATH_MAX];
    int length = snprintf(path, sizeof path, "%s/faults", state);
    if (length < 0 || (size_t)length >= sizeof path) {
        snprintf(why, size, "the path of the faults' counters is too long");
        return NULL;
    }
    struct slot *slots = NULL;
    mkdir(state, 0777); /* if that fails, so does open() */
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    /* A new file is all zeros, that is all free; for one that is there this changes nothing. */
    if (fd >= 0 && ftruncate(fd, SLOTS * sizeof(struct slot)) == 0)
        slots = map_slots(fd);
    if (!slots)
        snprintf(why, size, "%s: %s; faults are counted by each process alone", path,
                 strerror(errno));
    if (fd >= 0)
        close(fd);
    return slots;
}

struct fault_counters *fault_counters_open(const char *state, char *why, size_t size)
{
    struct fault_counters *counters = calloc(1, sizeof *counters);
    *why = 0;
    if (!counters)
        return NULL;
    if (state)
        counters->slots = map_file(state, why, size);
    if (!counters->slots)
        counters->slots = map_slots(-1);
    if (!counters->slots) {
        free(counters);
        return NULL;
    }
    return counters;
}

void fault_counters_close(struct fault_counters *counters)
{
    if (!counters)
        return;
    munmap(counters->slots, SLOTS * sizeof(struct slot));
    free(counters);
}

/* The rule's slot, taken by the first who asks. NULL when all are taken. */
static struct slot *slot_of(struct fault_counters *counters, uint64_t id)
{
    for (unsigned i = 0; i < SLOTS; i++) {
        struct slot *slot = &counters->slots[(id + i) % SLOTS];
        uint64_t found = __atomic_load_n(&slot->id, __ATOMIC_ACQUIRE);
        if (found == 0 && __atomic_compare_exchange_n(&slot->id, &found, id, false,
                                                      __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
            return slot;
        if (found == id) /* also when another process was faster just now */
            return slot;
    }
    return NULL;
}

static uint64_t mixed(uint64_t value)
{
    value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9;
    value = (value ^ (value >> 27)) * 0x94d049bb133111eb;
    return value ^ (value >> 31);
}

/* The n-th throw for this rule is the same whichever process makes it. */
static bool falls(const struct fault *fault, uint64_t seed, uint64_t number)
{
    if (fault->probability >= 1)
        return true;
    uint64_t bits = mixed(mixed(seed ^ fault->id) + number * 0x9e3779b97f4a7c15);
    return (double)(bits >> 11) * 0x1p-53 < fault->probability;
}

static bool take_one(struct slot *slot, uint64_t limit)
{
    uint64_t struck = __atomic_load_n(&slot->struck, __ATOMIC_RELAXED);
    while (struck < limit)
        if (__atomic_compare_exchange_n(&slot->struck, &struck, struck + 1, false, __ATOMIC_ACQ_REL,
                                        __ATOMIC_RELAXED))
            return true;
    return false;
}

static bool trigger_path(const struct fault *fault, const char *folder, char path[PATH_MAX])
{
    bool absolute = *fault->trigger == '/';
    int length = snprintf(path, PATH_MAX, "%s%s%s", absolute ? "" : folder, absolute ? "" : "/",
                          fault->trigger);
    return length > 0 && length < PATH_MAX;
}

bool fault_counters_strike(struct fault_counters *counters, const struct fault *fault,
                           const char *folder, uint64_t seed)
{
    char trigger[PATH_MAX];
    if (*fault->trigger && (!trigger_path(fault, folder, trigger) || access(trigger, F_OK) != 0))
        return false;
    struct slot *slot = slot_of(counters, fault->id);
    if (!slot)
        return false;
    uint64_t number = __atomic_fetch_add(&slot->matched, 1, __ATOMIC_ACQ_REL);
    if (number < fault->after || !falls(fault, seed, number) || !take_one(slot, fault->count))
        return false;
    /* Of several calls that saw the file, the one that removes it is struck. */
    if (*fault->trigger && unlink(trigger) != 0 && errno == ENOENT) {
        __atomic_fetch_sub(&slot->struck, 1, __ATOMIC_ACQ_REL);
        return false;
    }
    return true;
}

/* `web01.vmdk` of `[ds1] web01/web01.vmdk`, and of `[ds1] web01.vmdk` too. */
static const char *last_component(const char *path)
{
    const char *slash = strrchr(path, '/');
    if (slash)
        return slash + 1;
    const char *store = *path == '[' ? strstr(path, "] ") : NULL;
    return store ? store + 2 : path;
}

bool fault_matches(const struct fault *fault, const char *function, const char *path,
                   const char *transport, uint64_t start, uint64_t count)
{
    if (strcmp(fault->function, "*") && strcmp(fault->function, function))
        return false;
    if (*fault->transport && (!transport || strcmp(fault->transport, transport)))
        return false;
    if (fault->at != UINT64_MAX && (fault->at < start || fault->at - start >= count))
        return false;
    /* The whole path also as it is: the brackets of a datastore mean something else in a glob. */
    return !*fault->path ||
           (path && (!strcmp(fault->path, path) || !fnmatch(fault->path, path, 0) ||
                     !fnmatch(fault->path, last_component(path), 0)));
}
