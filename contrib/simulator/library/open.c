/* Open, Close, GetTransportMode: which transport it is to be, and a handle for it. */
#include <stdlib.h>
#include <stdio.h>
#include <string.h>

#include "library.h"

static const struct transport *const transports[] = {&transport_san, &transport_hotadd,
                                                     &transport_nbdssl, &transport_nbd};

static const struct transport *transport_named(const char *name)
{
    for (unsigned i = 0; i < sizeof transports / sizeof *transports; i++)
        if (!strcmp(transports[i]->name, name))
            return transports[i];
    return NULL;
}

static bool offered(const char *name)
{
    size_t length = strlen(name);
    for (const char *at = library.transports; (at = strstr(at, name)); at += length)
        if ((at == library.transports || at[-1] == ':') && (!at[length] || at[length] == ':'))
            return true;
    return false;
}

/* Is this answer a reason to try the next transport? */
static bool not_to_be_had(VixError error)
{
    return error == VIX_E_NOT_SUPPORTED || error == VIX_E_DISK_NOLICENSE || error == VIX_E_LICENSE;
}

static VixError try_transport(handle_t *handle, const char *name)
{
    const struct transport *transport = transport_named(name);
    VixError error;
    if (!transport) {
        if (strcmp(name, "file"))
            say(SAY_WARNING, "VixDiskLib: transport %s is not known, it is left out", name);
        return VIX_E_NOT_SUPPORTED;
    }
    if (!offered(name)) {
        say(SAY_WARNING, "VixDiskLib: transport %s is not available", name);
        return VIX_E_NOT_SUPPORTED;
    }
    error = net_open(handle, transport);
    if (not_to_be_had(error))
        say(SAY_WARNING, "VixDiskLib: transport %s cannot be used for %s, error %d", name, handle->path,
            (int)error);
    return error;
}

/* The wished transports in order; when none is to be had, silently the network. */
static VixError open_remote(handle_t *handle)
{
    const struct VixDiskLibConnectionStruct *connection = handle->connection;
    const struct settings *settings = settings_get(connection->settings);
    bool fallback = settings->fallback;
    char modes[256], *rest = modes, *name;
    VixError error = VIX_E_NOT_SUPPORTED;
    settings_release(settings);
    snprintf(modes, sizeof modes, "%s", *connection->modes ? connection->modes : library.transports);
    while (not_to_be_had(error) && (name = strsep(&rest, ":")))
        if (*name)
            error = try_transport(handle, name);
    if (not_to_be_had(error) && fallback && offered("nbdssl"))
        error = net_open(handle, &transport_nbdssl);
    return error;
}

static handle_t *new_handle(struct VixDiskLibConnectionStruct *connection, const char *path,
                            uint32_t flags)
{
    handle_t *handle = calloc(1, sizeof *handle);
    char *own_path = strdup(path);
    if (!handle || !own_path) {
        free(handle);
        free(own_path);
        return NULL;
    }
    handle->connection = connection;
    handle->path = own_path;
    handle->flags = flags | (connection->read_only ? VIXDISKLIB_FLAG_OPEN_READ_ONLY : 0);
    handle->nfc.socket = -1;
    handle->disk_lock = -1;
    pthread_mutex_init(&handle->call, NULL);
    pthread_mutex_init(&handle->lock, NULL);
    pthread_mutex_init(&handle->map_lock, NULL);
    pthread_cond_init(&handle->idle, NULL);
    return handle;
}

static void free_handle(handle_t *handle)
{
    facts_clear(&handle->facts);
    pthread_mutex_destroy(&handle->call);
    pthread_mutex_destroy(&handle->lock);
    pthread_mutex_destroy(&handle->map_lock);
    pthread_cond_destroy(&handle->idle);
    free(handle->path);
    free(handle);
}

VixError open_disk(struct VixDiskLibConnectionStruct *connection, const char *path, uint32_t flags,
                   handle_t **result)
{
    char quoted[600];
    handle_t *handle = new_handle(connection, path, flags);
    VixError error;
    if (!handle)
        return VIX_E_OUT_OF_MEMORY;
    error = connection->local ? file_open(handle) : open_remote(handle);
    if (error) {
        say(SAY_ERROR, "VixDiskLib_Open: cannot open %s, error %d", path, (int)error);
        free_handle(handle);
        return error;
    }
    say(SAY_AUDIT, "VixDiskLib_Open: opened %s, transport %s", path, handle->transport->name);
    events_note(connection->events, "client-open", "transport=%s read_only=%s path=%s",
                handle->transport->name, handle->flags & VIXDISKLIB_FLAG_OPEN_READ_ONLY ? "yes" : "no",
                events_quote(path, quoted, sizeof quoted));
    connection->handles++;
    *result = handle;
    return VIX_OK;
}

void close_disk(handle_t *handle)
{
    struct VixDiskLibConnectionStruct *connection = handle->connection;
    const char *transport = handle->transport->name;
    char quoted[600];
    handle->transport->close(handle);
    events_note(connection->events, "client-close",
                "transport=%s reads=%llu read_bytes=%llu writes=%llu write_bytes=%llu wire_bytes=%llu "
                "path=%s",
                transport, (unsigned long long)handle->reads, (unsigned long long)handle->read_bytes,
                (unsigned long long)handle->writes, (unsigned long long)handle->write_bytes,
                (unsigned long long)handle->wire_bytes,
                events_quote(handle->path, quoted, sizeof quoted));
    connection->handles--;
    connection->failed_closes -= handle->close_failed;
    free_handle(handle);
}

VIX_EXPORT VixError VixDiskLib_Open(const VixDiskLibConnection connection, const char *path,
                                    uint32_t flags, VixDiskLibHandle *handle)
{
    struct call call;
    struct subject subject = {.source = connection ? connection->settings : NULL, .path = path};
    VixError error = call_begin(&call, "Open", &subject);
    if (!error && !(error = session_thread_only(&call)) &&
        !(error = required(&call, connection, "the connection")) &&
        !(error = required(&call, path, "the path")) && !(error = required(&call, handle, "handle"))) {
        const VixDiskLibCreds *creds = &connection->params.creds;
        bool by_name = connection->params.credType == VIXDISKLIB_CRED_UID;
        chatter_secrets(call.settings, by_name ? creds->uid.userName : creds->sessionId.userName,
                        by_name ? creds->uid.password : creds->sessionId.key);
        error = open_disk(connection, path, flags, handle);
    }
    return call_end(&call, error);
}

/* Who gets an error from Close can only go on to Disconnect: that is not held against the client. */
static void note_failed_close(handle_t *handle)
{
    if (!handle || handle->close_failed)
        return;
    handle->close_failed = true;
    handle->connection->failed_closes++;
}

VIX_EXPORT VixError VixDiskLib_Close(VixDiskLibHandle handle)
{
    struct call call;
    unsigned outstanding = 0;
    VixError error = handle_begin(&call, "Close", handle, 0, 0);
    if (error && call.fault)
        note_failed_close(handle);
    if (!error && !(error = session_thread_only(&call))) {
        pthread_mutex_lock(&handle->lock);
        outstanding = handle->outstanding;
        pthread_mutex_unlock(&handle->lock);
        if (outstanding)
            error = broken(call.settings->strict_close, "Close", VIX_E_OBJECT_IS_BUSY,
                           "%u requests are outstanding on this handle", outstanding);
    }
    if (!error)
        wait_until_idle(handle);
    error = handle_end(&call, error);
    if (!error)
        close_disk(handle);
    return error;
}

VIX_EXPORT const char *VixDiskLib_GetTransportMode(VixDiskLibHandle handle)
{
    struct call call;
    const char *mode = NULL;
    if (!handle_begin(&call, "GetTransportMode", handle, 0, 0))
        mode = handle->transport->name;
    handle_end(&call, VIX_OK);
    return mode;
}
