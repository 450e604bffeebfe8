/* What most questions begin with: the library loaded, set up, connected, a disk open. */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "probe.h"

#define CALLBACK_SECONDS 5.0

struct kit vix;
struct log_counts logged;

int this_thread(void)
{
    return (int)syscall(SYS_gettid);
}

/* ---- the library's log ---- */

static void count_line(unsigned which, const char *format, va_list values)
{
    static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
    char line[8192];
    vsnprintf(line, sizeof line, format, values);
    pthread_mutex_lock(&mutex);
    logged.lines[which]++;
    logged.secrets[which] += holds_secret(line);
    logged.phone_home[which] += strstr(line, "CEIP") != NULL || strstr(line, "PhoneHome") != NULL;
    pthread_mutex_unlock(&mutex);
}

void probe_log(const char *format, va_list values)
{
    count_line(0, format, values);
}

void probe_warn(const char *format, va_list values)
{
    count_line(1, format, values);
}

void probe_panic(const char *format, va_list values)
{
    count_line(2, format, values);
}

/* ---- set-up ---- */

bool load(void)
{
    char why[512];
    if (kit_load(&vix, why, sizeof why))
        return true;
    answer_text("not_loaded", why);
    return false;
}

VixError initialise_as(unsigned major, unsigned minor, const char *config)
{
    return vix.InitEx(major, minor, probe_log, probe_warn, probe_panic, target.libdir, config);
}

/* 6.5 is what clients pass to every release: the question `init-version` asks about the others. */
bool initialise(const char *config)
{
    if (!load())
        return false;
    VixError error = initialise_as(6, 5, config);
    if (VIX_SUCCEEDED(error))
        return true;
    answer_error("init_failed", error);
    return false;
}

struct access usual_access(void)
{
    return (struct access){.login = target.login,
                           .snapshot = target.snapshot,
                           .transports = target.transports,
                           .path = target.disk,
                           .read_only = true,
                           .flags = VIXDISKLIB_FLAG_OPEN_READ_ONLY};
}

bool connect_as(const struct access *access, struct session *session)
{
    double began = kit_seconds();
    *session = (struct session){0};
    VixError error = kit_connect(&vix, &access->login, access->read_only, access->snapshot,
                                 access->transports, &session->connection);
    if (access->tell) {
        answer_error("connect", error);
        answer_real("connect_seconds", kit_seconds() - began);
    } else if (VIX_FAILED(error))
        answer_error("connect_failed", error);
    return VIX_SUCCEEDED(error);
}

bool open_as(const struct access *access, struct session *session)
{
    double began = kit_seconds();
    VixDiskLibInfo *info = NULL;
    VixError error = vix.Open(session->connection, access->path, access->flags, &session->handle);
    if (access->tell) {
        answer_error("open", error);
        answer_real("open_seconds", kit_seconds() - began);
    } else if (VIX_FAILED(error))
        answer_error("open_failed", error);
    if (VIX_FAILED(error)) {
        session->handle = NULL;
        return false;
    }
    if (access->tell)
        answer_text("transport", vix.GetTransportMode(session->handle));
    error = vix.GetInfo(session->handle, &info);
    if (VIX_FAILED(error)) {
        answer_error("info_failed", error);
        return false;
    }
    session->sectors = info->capacity;
    vix.FreeInfo(info);
    return true;
}

void close_session(struct session *session, bool tell)
{
    double began = kit_seconds();
    if (session->handle) {
        VixError error = vix.Close(session->handle);
        if (tell) {
            answer_error("close", error);
            answer_real("close_seconds", kit_seconds() - began);
        }
    }
    began = kit_seconds();
    if (session->connection) {
        VixError error = vix.Disconnect(session->connection);
        if (tell) {
            answer_error("disconnect", error);
            answer_real("disconnect_seconds", kit_seconds() - began);
        }
    }
    *session = (struct session){0};
}

bool usual_session(struct session *session)
{
    struct access access = usual_access();
    return initialise(NULL) && connect_as(&access, session) && open_as(&access, session);
}

/* ---- asynchronous reads ---- */

static atomic_uint tickets, completions;
static __thread struct read *submitting; /* inside ReadAsync of this record */

static void on_read(void *data, VixError error)
{
    struct read *read = data;
    read->ended = kit_seconds();
    read->completed = error;
    read->thread = this_thread();
    read->inside = submitting == read;
    read->called = true;
    read->order = atomic_fetch_add(&tickets, 1) + 1;
    atomic_fetch_add(&completions, 1); /* publishes the record */
}

void read_async(const struct session *session, struct read *read, uint64_t start, uint64_t count)
{
    submitting = read;
    read->started = kit_seconds();
    read->returned = vix.ReadAsync(session->handle, start, count, read->buffer, on_read, read);
    submitting = NULL;
}

unsigned callbacks_seen(void)
{
    return atomic_load(&completions);
}

bool wait_for_callbacks(unsigned count)
{
    double end = kit_seconds() + CALLBACK_SECONDS;
    while (callbacks_seen() < count && kit_seconds() < end)
        usleep(200);
    return callbacks_seen() >= count;
}

uint8_t *aligned_buffer(size_t bytes)
{
    void *buffer;
    if (posix_memalign(&buffer, 4096, bytes)) {
        answer_text("ended", "no memory");
        exit(1);
    }
    memset(buffer, 0, bytes);
    return buffer;
}
