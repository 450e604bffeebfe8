/* WIRE_OPEN: whether a disk may be opened, and by which host it is served. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "../include/vixDiskLib.h"
#include "memory.h"
#include "opening.h"
#include "random.h"

int opening_refuse(struct opening *opening, int code, const char *why)
{
    snprintf(opening->why, sizeof opening->why, "%s", why);
    return code;
}

/* ---- the host that serves it ---- */

static bool reaches(const struct registry_host *host, const char *datastore)
{
    for (unsigned i = 0; i < host->datastore_count; i++)
        if (strcmp(host->datastores[i], datastore) == 0)
            return true;
    return false;
}

/* Where a snapshot is read over the network any host will do that reaches its datastore, as long as
 * the vCenter does not know it to be out of service. */
static const char *any_host(struct opening *opening, const char *datastore)
{
    const struct registry *registry = opening->site->registry;
    const char *chosen = NULL;
    uint64_t candidates = 0;
    for (unsigned i = 0; i < registry->host_count; i++) {
        const struct registry_host *host = &registry->hosts[i];
        int state = site_host_state(opening->settings, host->name);
        if (!reaches(host, datastore) || state == HOST_SHUTDOWN || state == HOST_MAINTENANCE)
            continue;
        if (random_below(&opening->site->random, ++candidates) == 0)
            chosen = host->name;
    }
    return chosen;
}

static void choose_host(struct opening *opening)
{
    const struct registry_vm *vm = opening->access.vm;
    char datastore[64], file[SITE_PATH_MAX];
    const char *name = NULL;
    if (opening->access.snapshot != NULL && !transport_is_device(opening->transport) &&
        site_file(opening->site, opening->path, datastore, file))
        name = any_host(opening, datastore);
    opening->host = site_host(opening->site, name != NULL ? name : vm->host);
    opening->host->state = site_host_state(opening->settings, opening->host->name);
}

static int check_host(struct opening *opening)
{
    switch (opening->host->state) {
    case HOST_SHUTDOWN:
        return opening_refuse(opening, VIX_E_HOST_SERVER_SHUTDOWN, "the host is shutting down");
    case HOST_MAINTENANCE:
        return opening_refuse(opening, VIX_E_HOST_SERVER_NOT_AVAILABLE,
                              "the host is in maintenance mode");
    case HOST_DOWN:
        return opening_refuse(opening, VIX_E_HOST_NETWORK_CONN_REFUSED,
                              "the connection was refused");
    case HOST_LOST:
        return opening_refuse(opening, VIX_E_HOST_TCP_CONN_LOST, "the connection is lost");
    default:
        return VIX_OK;
    }
}

static int check_thumbprint(struct opening *opening)
{
    const char *wanted = opening->settings->thumbprint;
    if (wanted[0] == '\0' ||
        (opening->thumbprint != NULL && strcasecmp(wanted, opening->thumbprint) == 0))
        return VIX_OK;
    return opening_refuse(opening, VIX_E_FAIL, "the thumbprint is not the server's");
}

static int check_sessions(struct opening *opening)
{
    if (opening->settings->session_limit == 0 ||
        opening->host->sessions < opening->settings->session_limit)
        return VIX_OK;
    return opening_refuse(opening, VIX_E_CANNOT_CONNECT_TO_HOST,
                          "the host takes no more NFC sessions");
}

/* ---- opening ---- */

static int open_file(struct opening *opening)
{
    int flags = opening->access.writable ? VMDK_WRITABLE : 0;
    char why[VMDK_WHY] = "";
    if ((opening->flags & VIXDISKLIB_FLAG_OPEN_SINGLE_LINK) != 0)
        flags |= VMDK_SINGLE_LINK;
    /* The lock comes first: what a dead writer still has on its way is settled before the file is
     * looked at. */
    if (opening->access.writable) {
        opening->lock = lock_take(opening->site, opening->access.file, opening->session->id);
        if (opening->lock == NULL)
            return opening_refuse(opening, VIX_E_FILE_ALREADY_LOCKED,
                                  "somebody else has locked the file");
    }
    int error = vmdk_open(opening->access.file, flags, &opening->disk, why);
    return error == VIX_OK ? VIX_OK : opening_refuse(opening, error, why);
}

static int check_all(struct opening *opening)
{
    int error = VIX_OK;
    opening->access.vm =
        registry_vm_by_spec(site_registry(opening->site), opening->login->vmx_spec);
    if (opening->access.vm != NULL) {
        choose_host(opening);
        error = check_host(opening);
    }
    if (error == VIX_OK)
        error = check_thumbprint(opening);
    if (error != VIX_OK)
        return error;
    error = access_check(opening->site, &opening->access);
    if (error != VIX_OK)
        return opening_refuse(opening, error, opening->access.why);
    if ((error = check_sessions(opening)) == VIX_OK &&
        (error = transport_check(opening)) == VIX_OK && (error = open_file(opening)) == VIX_OK)
        error = transport_begin(opening);
    return error;
}

static void undo(struct opening *opening)
{
    for (unsigned i = 0; i < opening->device_count; i++)
        device_release(opening->site, opening->devices[i]);
    free(opening->devices);
    vmdk_close(opening->disk);
    if (opening->lock != NULL)
        lock_drop(opening->lock);
}

static void take_over(struct opening *opening)
{
    struct session *session = opening->session;
    struct registry_datastore defaults;
    const struct registry_datastore *datastore = registry_datastore_by_name(
        opening->site->registry, opening->access.datastore, &defaults);
    session->open = true;
    session->transport = opening->transport;
    free(session->path);
    session->path = memory_text(opening->path);
    session->host = opening->host;
    session->host->sessions++;
    session->disk = opening->disk;
    session->writable = opening->access.writable;
    session->lock = opening->lock;
    session->attachment = opening->attachment;
    session->devices = opening->devices;
    session->device_count = opening->device_count;
    session->local = datastore->kind == STORE_LOCAL || datastore->kind == STORE_VSAN;
    session->channel.trunk = session_is_device(session) ? NULL : &session->host->trunk;
    session->wanted_buffers = opening->buffers;
    session->wanted_buffer_bytes = opening->buffer_bytes;
}

/* ---- the request ---- */

static void send_refusal(struct request *request)
{
    request_refuse(request, (uint32_t)request->error, request->why);
}

static bool take_ask(struct opening *opening, struct wire_reader *reader, uint64_t *login)
{
    *login = wire_take_u64(reader);
    opening->path = wire_take_str(reader);
    opening->flags = wire_take_u64(reader);
    opening->transport_name = wire_take_str(reader);
    opening->thumbprint = wire_take_str(reader);
    opening->port = wire_take_u64(reader);
    opening->buffer_bytes = wire_take_u64(reader);
    opening->buffers = wire_take_u64(reader);
    if (reader->failed || opening->path == NULL || opening->transport_name == NULL)
        return false;
    while (opening->transport < TRANSPORTS &&
           strcmp(transport_names[opening->transport], opening->transport_name) != 0)
        opening->transport++;
    return opening->transport < TRANSPORTS;
}

static void note_refusal(const struct opening *opening, int error)
{
    char path[1024], why[WHY_MAX + 16];
    events_note(opening->site->events, "open-refused",
                "session=%llu login=%llu client=%ld path=%s transport=%s writable=%d error=%d "
                "why=%s",
                (unsigned long long)opening->session->id, (unsigned long long)opening->login->id,
                opening->session->peer.pid, events_quote(opening->path, path, sizeof path),
                transport_names[opening->transport], opening->access.writable, error,
                events_quote(opening->why, why, sizeof why));
}

/* The devices that a session reads, as many as fit. */
static const char *list_devices(const struct session *session, char *text, size_t size)
{
    size_t used = 0;
    if (!session_is_device(session) || vmdk_files(session->disk) == 0)
        return "-";
    for (unsigned i = 0; i < vmdk_files(session->disk) && used < size; i++)
        used += (size_t)snprintf(text + used, size - used, "%s%s", i > 0 ? "," : "",
                                 answer_device(session, i));
    return text;
}

static void note(const struct opening *opening)
{
    char path[1024], devices[1024], quoted[1200];
    const struct session *session = opening->session;
    events_note(opening->site->events, "open",
                "session=%llu login=%llu client=%ld path=%s transport=%s host=%s writable=%d "
                "snapshot=%s port=%llu links=%u files=%u devices=%s",
                (unsigned long long)session->id, (unsigned long long)opening->login->id,
                session->peer.pid, events_quote(opening->path, path, sizeof path),
                transport_names[session->transport], session->host->name, session->writable,
                opening->access.snapshot != NULL ? opening->access.snapshot : "-",
                (unsigned long long)opening->port, vmdk_links(session->disk),
                vmdk_files(session->disk),
                events_quote(list_devices(session, devices, sizeof devices), quoted,
                             sizeof quoted));
}

static void answer_later(struct opening *opening, struct request *request)
{
    const struct profile *profile = &opening->settings->profile;
    bool device = transport_is_device(opening->transport);
    uint64_t trips = 1;
    uint64_t latency = timing_latency(profile->net_latency_ns, profile->net_jitter,
                                      &opening->site->random);
    if (device && request->error == VIX_E_NOT_SUPPORTED)
        latency = 0; /* found out on this machine */
    else if (!device && request->error == VIX_OK && profile->net_open_trips > 0)
        trips = profile->net_open_trips;
    request_delay(request, trips * latency,
                  request->error == VIX_OK ? answer_open : send_refusal);
}

void open_disk(struct session *session, const struct wire_request *head, char *body)
{
    struct site *site = session->site;
    struct request *request = request_new(session, head, body);
    struct wire_reader reader = {.bytes = body, .left = head->body};
    struct opening *opening = memory_zeroed(1, sizeof *opening);
    uint64_t login = 0;
    opening->session = session;
    opening->site = site;
    opening->settings = site_settings(site);
    if (session->open || session->request_count > 1 || !take_ask(opening, &reader, &login)) {
        request_refuse(request, VIX_E_INVALID_ARG, "not a request to open a disk, or a second one");
        free(opening);
        return;
    }
    opening->login = vim_login(site, login);
    if (opening->login == NULL) {
        request_refuse(request, VIX_E_INVALID_AUTHENTICATION_SESSION, "there is no such login");
        free(opening);
        return;
    }
    const char *snapshot = opening->login->snapshot;
    opening->access.snapshot = snapshot != NULL && snapshot[0] != '\0' ? snapshot : NULL;
    opening->access.path = opening->path;
    opening->access.release = opening->login->release;
    opening->access.writable = !opening->login->read_only &&
                               (opening->flags & VIXDISKLIB_FLAG_OPEN_READ_ONLY) == 0;
    request->error = check_all(opening);
    if (request->error == VIX_OK) {
        take_over(opening);
        session_use_rates(session, opening->settings);
        note(opening);
    } else {
        undo(opening);
        request->why = memory_text(opening->why);
        note_refusal(opening, request->error);
    }
    answer_later(opening, request);
    free(opening);
}
