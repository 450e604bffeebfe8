/*
 * An NFC session: one socket to the host for each open disk, and the thread that receives from it.
 * Answers come in any order; the thread finds the request that each belongs to and finishes it. When
 * the connection ends, so does every request that is on its way.
 */
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "library.h"

/* ---- requests on the wire; nfc.lock is held ---- */

static void link_request(struct nfc *nfc, struct request *request)
{
    struct request *last = nfc->first ? nfc->first->previous : request;
    request->next = NULL;
    if (!nfc->first)
        nfc->first = request;
    else
        last->next = request;
    request->previous = last; /* of the first: the last */
    nfc->first->previous = request;
}

static void unlink_request(struct nfc *nfc, struct request *request)
{
    if (request == nfc->first) {
        nfc->first = request->next;
        if (nfc->first)
            nfc->first->previous = request->previous;
        return;
    }
    request->previous->next = request->next;
    if (request->next)
        request->next->previous = request->previous;
    else
        nfc->first->previous = request->previous;
}

static struct request *take_request(struct nfc *nfc, uint64_t id)
{
    struct request *request;
    pthread_mutex_lock(&nfc->lock);
    for (request = nfc->first; request; request = request->next)
        if ((uint64_t)(uintptr_t)request == id)
            break;
    if (request)
        unlink_request(nfc, request);
    pthread_mutex_unlock(&nfc->lock);
    return request;
}

static void end_all(struct nfc *nfc, VixError error)
{
    struct request *request, *next;
    pthread_mutex_lock(&nfc->lock);
    if (!nfc->lost)
        nfc->lost = error;
    error = nfc->lost;
    request = nfc->first;
    nfc->first = NULL;
    if (!nfc->closing)
        say_nfc(1, "[NFC ERROR] NfcNetTcpRead: the connection is lost, error %d", (int)error);
    pthread_mutex_unlock(&nfc->lock);
    for (; request; request = next) {
        next = request->next;
        request->done(request, error, NULL, 0, NULL, 0);
    }
}

/* ---- time-outs that the client's configuration file asked for ---- */

static uint64_t timeout_of(const struct request *request)
{
    uint64_t ms = request->op == WIRE_WRITE ? library.config.write_timeout_ms
                                            : library.config.read_timeout_ms;
    return ms * 1000000u;
}

/* Milliseconds until the first request is overdue: 0 when one is, -1 when none ever will be. */
static int until_overdue(struct nfc *nfc)
{
    uint64_t now = now_ns(), first = UINT64_MAX;
    if (!library.config.read_timeout_ms && !library.config.write_timeout_ms)
        return -1;
    pthread_mutex_lock(&nfc->lock);
    for (struct request *request = nfc->first; request; request = request->next) {
        uint64_t timeout = timeout_of(request);
        if (timeout && request->sent_ns + timeout < first)
            first = request->sent_ns + timeout;
    }
    pthread_mutex_unlock(&nfc->lock);
    /* A request that is sent while the thread sleeps must not wait for the next message. */
    if (first == UINT64_MAX)
        return 100;
    if (first <= now)
        return 0;
    return (first - now) / 1000000u < 100 ? (int)((first - now) / 1000000u) + 1 : 100;
}

/* Waits for a message; false when a request is overdue. */
static bool await_message(struct nfc *nfc)
{
    for (;;) {
        struct pollfd waiting = {.fd = nfc->socket, .events = POLLIN};
        int timeout = until_overdue(nfc);
        int ready = timeout < 0 ? 1 : poll(&waiting, 1, timeout);
        if (ready > 0)
            return true;
        if (ready == 0 && until_overdue(nfc) == 0)
            return false;
    }
}

/* ---- receiving ---- */

struct message {
    struct wire_reply head;
    char *body;
    size_t room;
    int *fds;
    unsigned fd_count, fd_room;
};

static bool receive_fds(int socket, struct message *message)
{
    char plus;
    while (message->fd_count < message->head.fds) {
        unsigned before = message->fd_count;
        if (wire_receive(socket, &plus, 1, message->fds, &message->fd_count, message->fd_room) != 1 ||
            message->fd_count == before)
            return false;
    }
    return true;
}

static bool receive(int socket, struct message *message)
{
    message->fd_count = 0;
    if (wire_receive(socket, &message->head, sizeof message->head, message->fds, &message->fd_count,
                     message->fd_room) != 1 ||
        message->head.body > WIRE_BODY_MAX)
        return false;
    if (message->head.body > message->room) {
        char *larger = realloc(message->body, message->head.body);
        if (!larger)
            return false;
        message->body = larger;
        message->room = message->head.body;
    }
    if (message->head.fds > message->fd_room) {
        int *more = reallocarray(message->fds, message->head.fds, sizeof *more);
        if (!more)
            return false;
        message->fds = more;
        message->fd_room = message->head.fds;
    }
    if (message->head.body &&
        wire_receive(socket, message->body, message->head.body, NULL, NULL, 0) != 1)
        return false;
    return receive_fds(socket, message);
}

static void tell_reason(const struct message *message)
{
    struct wire_reader reader = {message->body, message->head.body, false};
    const char *why = message->head.body ? wire_take_str(&reader) : NULL;
    say_nfc(1, "[NFC ERROR] NfcFssrvrProcessErrorMsg: received NFC error %d from server: %s",
            message->head.error == VIX_E_OUT_OF_MEMORY ? 5 : (int)message->head.error,
            why ? why : "no reason was given");
}

static void *receiver(void *argument)
{
    handle_t *handle = argument;
    struct nfc *nfc = &handle->nfc;
    struct message message = {.fd_room = WIRE_FDS_MAX};
    VixError end = VIX_E_HOST_TCP_CONN_LOST;
    message.fds = calloc(WIRE_FDS_MAX, sizeof *message.fds);
    for (;;) {
        struct request *request;
        if (!await_message(nfc)) {
            end = VIX_E_HOST_TCP_SOCKET_ERROR;
            shutdown(nfc->socket, SHUT_RDWR);
            break;
        }
        if (!message.fds || !receive(nfc->socket, &message))
            break;
        if (message.head.error)
            tell_reason(&message);
        request = take_request(nfc, message.head.id);
        if (!request)
            break; /* the host answers what was never asked: the stream is not to be trusted */
        request->done(request, message.head.error, message.body, message.head.body, message.fds,
                      message.fd_count);
    }
    end_all(nfc, end);
    free(message.body);
    free(message.fds);
    return NULL;
}

/* ---- sending ---- */

VixError nfc_open(handle_t *handle)
{
    struct nfc *nfc = &handle->nfc;
    char state[1300];
    *nfc = (struct nfc){.socket = -1}; /* an earlier transport of this handle may have failed */
    snprintf(state, sizeof state, "%s/.sim", handle->connection->site);
    nfc->socket = wire_connect(state, "nfc.sock");
    if (nfc->socket < 0) {
        say_nfc(1, "[NFC ERROR] NfcNewAuthdConnectionEx: Failed to connect: %s", strerror(errno));
        return VIX_E_HOST_NETWORK_CONN_REFUSED;
    }
    pthread_mutex_init(&nfc->lock, NULL);
    pthread_mutex_init(&nfc->sending, NULL);
    start_thread_or_die(&nfc->thread, "vixsim-nfc", receiver, handle);
    nfc->running = true;
    return VIX_OK;
}

void nfc_submit(struct request *request, const void *body, size_t size)
{
    struct nfc *nfc = &request->handle->nfc;
    struct wire_request head = {.op = request->op,
                                .body = (uint32_t)size,
                                .id = (uint64_t)(uintptr_t)request,
                                .start = request->start,
                                .count = request->count};
    VixError lost;
    request->sent_ns = now_ns();
    pthread_mutex_lock(&nfc->sending);
    pthread_mutex_lock(&nfc->lock);
    lost = nfc->lost;
    if (!lost)
        link_request(nfc, request);
    pthread_mutex_unlock(&nfc->lock);
    /* From here on the receiver may finish the request: it is not touched again. When sending fails,
     * the receiver sees the end of the connection and finishes all requests. */
    if (!lost && wire_send(nfc->socket, &head, sizeof head, body, size, NULL, 0) < 0)
        shutdown(nfc->socket, SHUT_RDWR);
    pthread_mutex_unlock(&nfc->sending);
    if (lost)
        request->done(request, lost, NULL, 0, NULL, 0);
}

/* ---- asking and waiting ---- */

struct waiter {
    struct request request; /* first: request_done gets its address */
    pthread_mutex_t lock;
    pthread_cond_t over;
    bool is_over;
    VixError error;
    struct nfc_answer *answer;
};

static void keep_answer(struct nfc_answer *answer, const char *body, size_t size, const int *fds,
                        unsigned fd_count)
{
    *answer = (struct nfc_answer){.body = malloc(size + 1), .fds = calloc(fd_count + 1u, sizeof *fds)};
    if (!answer->body || !answer->fds) {
        for (unsigned i = 0; i < fd_count; i++)
            close(fds[i]);
        return;
    }
    if (size)
        memcpy(answer->body, body, size);
    answer->size = size;
    if (fd_count)
        memcpy(answer->fds, fds, fd_count * sizeof *fds);
    answer->fd_count = fd_count;
}

static void answered(struct request *request, VixError error, char *body, size_t size, int *fds,
                     unsigned fd_count)
{
    struct waiter *waiter = (struct waiter *)request;
    pthread_mutex_lock(&waiter->lock);
    keep_answer(waiter->answer, body, size, fds, fd_count);
    waiter->error = error;
    waiter->is_over = true;
    pthread_cond_signal(&waiter->over);
    pthread_mutex_unlock(&waiter->lock);
}

VixError nfc_call(handle_t *handle, unsigned op, uint64_t start, uint64_t count,
                  const struct wire_body *body, struct nfc_answer *answer)
{
    static const struct wire_body empty;
    struct waiter waiter = {
        .request = {.handle = handle, .op = op, .start = start, .count = count, .done = answered},
        .answer = answer,
    };
    if (!body)
        body = &empty;
    if (body->failed)
        return VIX_E_OUT_OF_MEMORY;
    pthread_mutex_init(&waiter.lock, NULL);
    pthread_cond_init(&waiter.over, NULL);
    nfc_submit(&waiter.request, body->bytes, body->used);
    pthread_mutex_lock(&waiter.lock);
    while (!waiter.is_over)
        pthread_cond_wait(&waiter.over, &waiter.lock);
    pthread_mutex_unlock(&waiter.lock);
    pthread_cond_destroy(&waiter.over);
    pthread_mutex_destroy(&waiter.lock);
    return waiter.error;
}

void nfc_answer_free(struct nfc_answer *answer)
{
    for (unsigned i = 0; i < answer->fd_count; i++)
        close(answer->fds[i]);
    free(answer->fds);
    free(answer->body);
    *answer = (struct nfc_answer){0};
}

/* ---- ending ---- */

void nfc_close(handle_t *handle)
{
    struct nfc *nfc = &handle->nfc;
    struct nfc_answer answer = {0};
    if (!nfc->running)
        return;
    pthread_mutex_lock(&nfc->lock);
    nfc->closing = true;
    pthread_mutex_unlock(&nfc->lock);
    nfc_call(handle, WIRE_CLOSE, 0, 0, NULL, &answer);
    nfc_answer_free(&answer);
    shutdown(nfc->socket, SHUT_RDWR);
    pthread_join(nfc->thread, NULL);
    close(nfc->socket);
    pthread_mutex_destroy(&nfc->lock);
    pthread_mutex_destroy(&nfc->sending);
    nfc->running = false;
}

void nfc_lose(handle_t *handle)
{
    if (handle->nfc.running)
        shutdown(handle->nfc.socket, SHUT_RDWR);
}

void nfc_stop_host(handle_t *handle)
{
    struct ucred host;
    socklen_t size = sizeof host;
    if (handle->nfc.running &&
        getsockopt(handle->nfc.socket, SOL_SOCKET, SO_PEERCRED, &host, &size) == 0)
        kill(host.pid, SIGSTOP);
}
