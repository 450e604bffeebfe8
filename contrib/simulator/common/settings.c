/* Settings that follow their file: see settings.h. */
#include "settings.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "faults.h"

#define FILE_ROOM (1u << 20) /* a longer sim.conf is a mistake */

struct snapshot {
    struct settings settings; /* first: a reference to it is one to the snapshot */
    unsigned references;      /* atomic */
};

struct stamp { /* what tells one state of the file from another; all 0 where it is missing */
    ino_t inode;
    off_t size;
    struct timespec modified, changed;
};

struct settings_source {
    char folder[PATH_MAX], path[PATH_MAX];
    uint64_t own_seed; /* where the settings have none */
    struct fault_counters *counters;
    pthread_mutex_t mutex; /* of what follows */
    struct stamp stamp;
    struct snapshot *current;
    char complaint[PATH_MAX + 1024];
    bool complained; /* `complaint` was not taken yet */
};

static bool same_stamp(const struct stamp *one, const struct stamp *other)
{
    return one->inode == other->inode && one->size == other->size &&
           one->modified.tv_sec == other->modified.tv_sec &&
           one->modified.tv_nsec == other->modified.tv_nsec &&
           one->changed.tv_sec == other->changed.tv_sec &&
           one->changed.tv_nsec == other->changed.tv_nsec;
}

static struct stamp stamp_of(const struct stat *status)
{
    return (struct stamp){status->st_ino, status->st_size, status->st_mtim, status->st_ctim};
}

static void complain(struct settings_source *source, const char *what)
{
    snprintf(source->complaint, sizeof source->complaint, "%s: %s", source->path, what);
    source->complained = true;
}

/* The file as a string, to be freed; NULL with `why`. */
static char *read_text(int fd, char *why, size_t size)
{
    char *text = malloc(FILE_ROOM + 1);
    size_t used = 0;
    ssize_t got = 1;
    while (text && got > 0 && used <= FILE_ROOM - 1) {
        got = read(fd, text + used, FILE_ROOM - used);
        if (got < 0 && errno == EINTR)
            got = 1;
        else if (got > 0)
            used += (size_t)got;
    }
    const char *wrong = !text                     ? "no memory"
                        : got < 0                 ? strerror(errno)
                        : got > 0                 ? "is too long"
                        : memchr(text, 0, used) ? "holds a NUL byte"
                                                  : NULL;
    if (wrong) {
        snprintf(why, size, "%s", wrong);
        free(text);
        return NULL;
    }
    text[used] = 0;
    return text;
}

static struct snapshot *new_snapshot(void)
{
    struct snapshot *snapshot = calloc(1, sizeof *snapshot);
    if (snapshot) {
        snapshot->references = 1;
        settings_defaults(&snapshot->settings);
    }
    return snapshot;
}

/* The settings in the file, or NULL with `why`; and which state of the file they are of. */
static struct snapshot *load(const char *path, struct stamp *stamp, char *why, size_t size)
{
    struct stat status;
    char *text = NULL;
    struct snapshot *snapshot = new_snapshot();
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0 && (errno == ENOENT || errno == ENOTDIR)) {
        *stamp = (struct stamp){0};
        return snapshot;
    }
    /* Stamped before it is read: what changes from here on shows at the next look. */
    if (fd < 0 || fstat(fd, &status) < 0)
        snprintf(why, size, "%s", strerror(errno));
    else {
        *stamp = stamp_of(&status);
        text = read_text(fd, why, size);
    }
    if (fd >= 0)
        close(fd);
    bool ok = snapshot && text && settings_parse(text, &snapshot->settings, why, size);
    free(text);
    if (ok)
        return snapshot;
    if (!snapshot)
        snprintf(why, size, "no memory");
    free(snapshot);
    return NULL;
}

void settings_release(const struct settings *settings)
{
    struct snapshot *snapshot = (struct snapshot *)settings;
    if (snapshot && __atomic_sub_fetch(&snapshot->references, 1, __ATOMIC_ACQ_REL) == 0)
        free(snapshot);
}

/* Under the mutex. */
static void refresh(struct settings_source *source, bool first)
{
    struct stat status;
    struct stamp now = {0};
    char why[512] = "no memory";
    if (stat(source->path, &status) == 0)
        now = stamp_of(&status);
    if (!first && same_stamp(&now, &source->stamp))
        return;
    struct snapshot *fresh = load(source->path, &now, why, sizeof why);
    source->stamp = now; /* also of one in error: it is read and told about once */
    if (!fresh) {
        complain(source, why);
        return;
    }
    if (source->current)
        settings_release(&source->current->settings);
    source->current = fresh;
}

static uint64_t clock_seed(void)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    return ((uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec) ^
           ((uint64_t)getpid() << 40);
}

struct settings_source *settings_source_open(const char *folder, const char *state)
{
    char why[512];
    struct settings_source *source = calloc(1, sizeof *source);
    if (!source)
        return NULL;
    pthread_mutex_init(&source->mutex, NULL);
    snprintf(source->folder, sizeof source->folder, "%s", folder);
    int length = snprintf(source->path, sizeof source->path, "%s/sim.conf", folder);
    if (length < 0 || (size_t)length >= sizeof source->path)
        complain(source, "the path is too long");
    source->own_seed = clock_seed();
    source->counters = fault_counters_open(state, why, sizeof why);
    refresh(source, true);
    /* A file in error at first leaves the settings by default. */
    if (!source->current)
        source->current = new_snapshot();
    if (!source->current || !source->counters) {
        settings_source_close(source);
        return NULL;
    }
    if (*why && !source->complained)
        complain(source, why);
    return source;
}

void settings_source_close(struct settings_source *source)
{
    if (!source)
        return;
    if (source->current)
        settings_release(&source->current->settings);
    fault_counters_close(source->counters);
    pthread_mutex_destroy(&source->mutex);
    free(source);
}

const struct settings *settings_get(struct settings_source *source)
{
    pthread_mutex_lock(&source->mutex);
    refresh(source, false);
    struct snapshot *snapshot = source->current;
    __atomic_add_fetch(&snapshot->references, 1, __ATOMIC_RELAXED);
    pthread_mutex_unlock(&source->mutex);
    return &snapshot->settings;
}

bool settings_error(struct settings_source *source, char *text, size_t size)
{
    pthread_mutex_lock(&source->mutex);
    bool told = source->complained;
    if (told)
        snprintf(text, size, "%s", source->complaint);
    source->complained = false;
    pthread_mutex_unlock(&source->mutex);
    return told;
}

const struct fault *settings_strike(struct settings_source *source, const struct settings *settings,
                                    const char *function, const char *path, const char *transport,
                                    uint64_t start, uint64_t count)
{
    uint64_t seed = settings->seed ? settings->seed : source->own_seed;
    for (size_t i = 0; i < settings->fault_count; i++) {
        const struct fault *fault = &settings->faults[i];
        if (fault_matches(fault, function, path, transport, start, count) &&
            fault_counters_strike(source->counters, fault, source->folder, seed))
            return fault;
    }
    return NULL;
}
