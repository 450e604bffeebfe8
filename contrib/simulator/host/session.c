#include "session.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../include/vixDiskLib.h"
#include "memory.h"

/* A client with so much in flight is not read from until some of it is done. */
#define REQUESTS_ENOUGH 4096
#define BYTES_ENOUGH (UINT64_C(128) << 20)
/* A server takes no larger buffers from a client's configuration. */
#define BUFFER_BYTES_MAX (UINT64_C(2) << 20)

const char *const transport_names[TRANSPORTS] = {
    [TRANSPORT_NBD] = "nbd",
    [TRANSPORT_NBDSSL] = "nbdssl",
    [TRANSPORT_SAN] = "san",
    [TRANSPORT_HOTADD] = "hotadd",
};

static const char *const end_names[] = {
    [END_CLIENT_LOST] = "client-lost", [END_CLOSED] = "closed",       [END_IDLE] = "idle",
    [END_REFUSED] = "refused",         [END_HOST_LOST] = "host-lost", [END_STOPPED] = "stopped",
};

/* ---- requests ---- */

static void hold_back(struct session *session)
{
    peer_busy(&session->peer, session->request_count >= REQUESTS_ENOUGH ||
                                  session->request_bytes >= BYTES_ENOUGH);
}

struct request *request_new(struct session *session, const struct wire_request *head, char *body)
{
    struct request *request = memory_zeroed(1, sizeof *request);
    request->session = session;
    request->head = *head;
    request->body = body;
    list_append(&session->requests, &request->place);
    session->request_count++;
    session->request_bytes += head->body;
    hold_back(session);
    return request;
}

void request_end(struct request *request)
{
    struct session *session = request->session;
    if (request->has_job)
        job_cancel(&request->job, loop_now_ns());
    timers_clear(&session->site->loop.timers, &request->timer);
    list_remove(&request->place);
    session->request_count--;
    session->request_bytes -= request->head.body;
    session->active_ns = loop_now_ns();
    if (session->host != NULL)
        session->host->memory_bytes -= request->memory_bytes;
    if (session->closing == request)
        session->closing = NULL;
    free(request->body);
    free(request->why);
    free(request);
    hold_back(session);
    /* By a timer: the caller may be going through the requests. */
    if (session->closing != NULL && session->request_count == 1)
        timers_set(&session->site->loop.timers, &session->closing->timer, 0);
}

void request_refuse(struct request *request, uint32_t error, const char *why)
{
    peer_refuse(&request->session->peer, &request->head, error, why);
    request_end(request);
}

void request_done(struct request *request, const void *body, size_t size)
{
    peer_reply(&request->session->peer, &request->head, VIX_OK, body, size);
    request_end(request);
}

static void delay_over(struct timer *timer, uint64_t at_ns)
{
    (void)at_ns;
    struct request *request = LIST_OF(timer, struct request, timer);
    request->perform(request);
}

void request_delay(struct request *request, uint64_t delay_ns, void (*perform)(struct request *))
{
    request->perform = perform;
    request->timer.fire = delay_over;
    if (delay_ns == 0)
        perform(request);
    else
        timers_set(&request->session->site->loop.timers, &request->timer,
                   loop_now_ns() + delay_ns);
}

static void transfer_over(struct job *job, uint64_t at_ns)
{
    (void)at_ns;
    struct request *request = LIST_OF(job, struct request, job);
    request->has_job = false;
    request->perform(request);
}

void request_transfer(struct request *request, uint64_t bytes, void (*perform)(struct request *))
{
    request->perform = perform;
    request->has_job = true;
    job_start(&request->job, &request->session->channel, bytes, transfer_over, loop_now_ns());
}

/* ---- what a session takes ---- */

void session_use_rates(struct session *session, const struct settings *settings)
{
    const struct profile *profile = &settings->profile;
    struct timing_rates *rates = &session->channel.rates;
    if (session_is_device(session)) {
        *rates = (struct timing_rates){.latency_ns = profile->device_write_ns,
                                       .jitter = profile->net_jitter,
                                       .buffers = 1,
                                       .handle_rate = profile->device_rate};
        return;
    }
    *rates = (struct timing_rates){.latency_ns = profile->net_latency_ns,
                                   .jitter = profile->net_jitter,
                                   .buffers = profile->net_buffers,
                                   .buffer_bytes = profile->net_buffer_bytes,
                                   .handle_rate = profile->net_handle_rate,
                                   .host_rate = profile->net_host_rate};
    if (!profile->net_tunable)
        return;
    if (session->wanted_buffers > 0)
        rates->buffers = session->wanted_buffers;
    if (session->wanted_buffer_bytes > 0 && session->wanted_buffer_bytes <= BUFFER_BYTES_MAX)
        rates->buffer_bytes = session->wanted_buffer_bytes;
}

/* ---- the end of a session ---- */

/* The accepted writes that have not landed; the other requests are given up. */
static void give_up_requests(struct session *session, struct list *late)
{
    list_init(late);
    session->closing = NULL;
    while (!list_empty(&session->requests)) {
        struct request *request = LIST_OF(session->requests.next, struct request, place);
        if (request->head.op == WIRE_WRITE && session->lock != NULL) {
            struct late_write *write = memory_zeroed(1, sizeof *write);
            write->start = request->head.start;
            write->count = request->head.count;
            write->bytes = request->body;
            request->body = NULL;
            list_append(late, &write->place);
        }
        request_end(request);
    }
}

static void drop_late(struct list *late)
{
    LIST_EACH(link, after, late) {
        struct late_write *write = LIST_OF(link, struct late_write, place);
        list_remove(link);
        free(write->bytes);
        free(write);
    }
}

static void release_devices(struct session *session, enum session_end end)
{
    for (unsigned i = 0; i < session->device_count; i++)
        device_release(session->site, session->devices[i]);
    free(session->devices);
    session->devices = NULL;
    session->device_count = 0;
    if (session->attachment == NULL)
        return;
    if (end == END_CLOSED || end == END_REFUSED)
        attachment_detach(session->site, session->attachment);
    else
        attachment_orphan(session->site, session->attachment);
    session->attachment = NULL;
}

void session_release(struct session *session, enum session_end end)
{
    struct list late;
    if (!session->open)
        return;
    session->open = false;
    if (end == END_CLOSED) /* all but the request to close was waited for */
        list_init(&late);
    else
        give_up_requests(session, &late);
    if (session->lock != NULL && (end == END_CLIENT_LOST || end == END_HOST_LOST)) {
        lock_abandon(session->lock, session->disk, &late);
    } else {
        vmdk_close(session->disk);
        if (session->lock != NULL)
            lock_drop(session->lock);
        drop_late(&late);
    }
    session->lock = NULL;
    session->disk = NULL;
    release_devices(session, end);
    session->host->sessions--;
    char path[1024];
    events_note(session->site->events, end == END_CLOSED ? "close" : "session-ended",
                "session=%llu how=%s path=%s host=%s reads=%llu read_bytes=%llu writes=%llu "
                "written_bytes=%llu",
                (unsigned long long)session->id, end_names[end],
                events_quote(session->path, path, sizeof path), session->host->name,
                (unsigned long long)session->reads, (unsigned long long)session->read_bytes,
                (unsigned long long)session->writes, (unsigned long long)session->written_bytes);
}

void session_break(struct session *session, enum session_end end)
{
    session->end = end;
    peer_close(&session->peer);
}

/* ---- the service ---- */

static void close_now(struct request *request)
{
    struct session *session = request->session;
    session->closing = NULL;
    session_release(session, END_CLOSED);
    session->end = END_CLOSED;
    peer_reply(&session->peer, &request->head, VIX_OK, NULL, 0);
    request_end(request);
    peer_close_after(&session->peer);
}

static void close_when_idle(struct session *session, const struct wire_request *head)
{
    struct request *request = request_new(session, head, NULL);
    request->perform = close_now;
    request->timer.fire = delay_over;
    session->closing = request;
    if (session->request_count == 1)
        close_now(request);
}

static void request(struct peer *peer, const struct wire_request *head, char *body)
{
    struct session *session = LIST_OF(peer, struct session, peer);
    session->active_ns = loop_now_ns();
    if (session->closing != NULL) {
        peer_refuse(peer, head, VIX_E_INVALID_HANDLE, "the session is being closed");
        free(body);
    } else if (head->op == WIRE_CLOSE) {
        free(body);
        struct wire_request empty = *head;
        empty.body = 0;
        close_when_idle(session, &empty);
    } else if (head->op == WIRE_OPEN) {
        open_disk(session, head, body);
    } else {
        disk_request(session, head, body);
    }
}

static void gone(struct peer *peer)
{
    struct session *session = LIST_OF(peer, struct session, peer);
    struct list late;
    session_release(session, session->end);
    give_up_requests(session, &late); /* of an open that was refused, perhaps */
    list_remove(&session->place);
}

static void freed(struct peer *peer)
{
    struct session *session = LIST_OF(peer, struct session, peer);
    free(session->path);
    free(session);
}

void nfc_accept(struct site *site, int socket)
{
    static const struct peer_events events = {request, gone, freed};
    struct session *session = memory_zeroed(1, sizeof *session);
    session->site = site;
    session->id = site_new_id(site);
    session->active_ns = loop_now_ns();
    list_init(&session->requests);
    channel_init(&session->channel, &site->loop.timers, &site->random, NULL);
    if (!peer_init(&session->peer, &site->loop, socket, &events)) {
        fprintf(stderr, "vixsim-host: a session: %s\n", strerror(errno));
        free(session);
        return;
    }
    list_append(&site->sessions, &session->place);
}

void nfc_free(struct site *site)
{
    LIST_EACH(link, after, &site->sessions)
        session_break(LIST_OF(link, struct session, place), END_STOPPED);
}

/* ---- what goes on without requests ---- */

static void answer_shutdown(struct session *session)
{
    LIST_EACH(link, after, &session->requests) {
        struct request *request = LIST_OF(link, struct request, place);
        if (request != session->closing)
            request_refuse(request, VIX_E_HOST_SERVER_SHUTDOWN, "the host is shutting down");
    }
}

void nfc_host_changed(struct site *site, struct site_host *host)
{
    LIST_EACH(link, after, &site->sessions) {
        struct session *session = LIST_OF(link, struct session, place);
        if (!session->open || session->host != host)
            continue;
        if (host->state == HOST_LOST)
            session_break(session, END_HOST_LOST);
        else if (host->state == HOST_SHUTDOWN)
            answer_shutdown(session);
    }
}

void nfc_tick(struct site *site, uint64_t now_ns)
{
    const struct settings *settings = site_settings(site);
    devices_tick(site);
    LIST_EACH(link, after, &site->sessions) {
        struct session *session = LIST_OF(link, struct session, place);
        session_use_rates(session, settings);
        if (settings->idle_ns > 0 && session->open && !session_is_device(session) &&
            session->request_count == 0 && session->active_ns + settings->idle_ns <= now_ns)
            session_break(session, END_IDLE);
    }
}
