#include "peer.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "memory.h"

#define OUTPUT_ENOUGH (1u << 20) /* who leaves so much untaken is not read from */
#define TURN_BYTES (2u << 20)    /* read from one peer before it is another one's turn */

/* Descriptors that travel with the byte at `at` of the output. */
struct parcel {
    struct list place;
    size_t at;
    unsigned count;
    int fds[WIRE_FDS_MAX];
};

/* ---- output ---- */

static size_t output_waiting(const struct peer *peer)
{
    return peer->output_end - peer->output_start;
}

static void parcel_free(struct parcel *parcel)
{
    for (unsigned i = 0; i < parcel->count; i++)
        close(parcel->fds[i]);
    list_remove(&parcel->place);
    free(parcel);
}

static struct parcel *first_parcel(const struct peer *peer)
{
    return list_empty(&peer->descriptors) ? NULL
                                          : LIST_OF(peer->descriptors.next, struct parcel, place);
}

static ssize_t send_some(struct peer *peer)
{
    struct parcel *parcel = first_parcel(peer);
    struct iovec piece = {.iov_base = peer->output + peer->output_start,
                          .iov_len = output_waiting(peer)};
    struct msghdr message = {.msg_iov = &piece, .msg_iovlen = 1};
    union {
        char bytes[CMSG_SPACE(sizeof(int) * WIRE_FDS_MAX)];
        struct cmsghdr aligned;
    } control;
    if (parcel != NULL && parcel->at > peer->output_start) {
        piece.iov_len = parcel->at - peer->output_start;
        parcel = NULL;
    } else if (parcel != NULL) {
        memset(&control, 0, sizeof control);
        message.msg_control = control.bytes;
        message.msg_controllen = CMSG_SPACE(sizeof(int) * parcel->count);
        struct cmsghdr *header = CMSG_FIRSTHDR(&message);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(sizeof(int) * parcel->count);
        memcpy(CMSG_DATA(header), parcel->fds, sizeof(int) * parcel->count);
        if (parcel->place.next != &peer->descriptors)
            piece.iov_len =
                LIST_OF(parcel->place.next, struct parcel, place)->at - peer->output_start;
    }
    ssize_t sent = sendmsg(peer->watch.fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent > 0 && parcel != NULL)
        parcel_free(parcel);
    return sent;
}

static void want_events(struct peer *peer)
{
    bool deaf = peer->closing || ((peer->busy || output_waiting(peer) > OUTPUT_ENOUGH) &&
                                  !peer->hungup);
    loop_change(peer->loop, &peer->watch,
                (deaf ? 0u : (uint32_t)EPOLLIN) |
                    (output_waiting(peer) > 0 ? (uint32_t)EPOLLOUT : 0u));
}

static void flush(struct peer *peer)
{
    while (output_waiting(peer) > 0) {
        ssize_t sent = send_some(peer);
        if (sent < 0 && errno == EINTR)
            continue;
        if (sent < 0 && (errno == EAGAIN || errno == ETOOMANYREFS))
            break;
        if (sent < 0) {
            /* The other end is gone, but what it sent before may still be waiting to be read. */
            peer->output_start = peer->output_end;
            while (first_parcel(peer) != NULL)
                parcel_free(first_parcel(peer));
            break;
        }
        peer->output_start += (size_t)sent;
    }
    if (output_waiting(peer) == 0 && list_empty(&peer->descriptors)) {
        peer->output_start = peer->output_end = 0;
        if (peer->closing) {
            peer_close(peer);
            return;
        }
    }
    want_events(peer);
}

static char *output_room(struct peer *peer, size_t size)
{
    if (peer->output_room - peer->output_end < size) {
        peer->output_room = 2 * (peer->output_end + size);
        peer->output = memory_resized(peer->output, peer->output_room, 1);
    }
    char *room = peer->output + peer->output_end;
    peer->output_end += size;
    return room;
}

static void put(struct peer *peer, const void *bytes, size_t size)
{
    if (size > 0)
        memcpy(output_room(peer, size), bytes, size);
}

static void put_parcel(struct peer *peer, const int *fds, unsigned count)
{
    if (count == 0)
        return;
    struct parcel *parcel = memory_zeroed(1, sizeof *parcel);
    parcel->at = peer->output_end;
    parcel->count = count;
    memcpy(parcel->fds, fds, sizeof(int) * count);
    list_append(&peer->descriptors, &parcel->place);
}

static unsigned fewer(unsigned a, unsigned b)
{
    return a < b ? a : b;
}

static void send_reply(struct peer *peer, const struct wire_request *to, uint32_t error,
                       const void *body, size_t size, const int *fds, unsigned fd_count)
{
    struct wire_reply reply = {.op = to->op,
                               .error = error,
                               .id = to->id,
                               .body = (uint32_t)size,
                               .fds = fd_count};
    unsigned sent = fewer(fd_count, WIRE_FDS_MAX);
    put_parcel(peer, fds, sent);
    put(peer, &reply, sizeof reply);
    put(peer, body, size);
    while (sent < fd_count) {
        unsigned more = fewer(fd_count - sent, WIRE_FDS_MAX);
        put_parcel(peer, fds + sent, more);
        put(peer, "+", 1);
        sent += more;
    }
    loop_later(peer->loop, &peer->chore);
}

void peer_reply(struct peer *peer, const struct wire_request *to, uint32_t error, const void *body,
                size_t size)
{
    if (!peer->closed)
        send_reply(peer, to, error, body, size, NULL, 0);
}

void peer_refuse(struct peer *peer, const struct wire_request *to, uint32_t error, const char *why)
{
    struct wire_body body = {0};
    wire_put_str(&body, why);
    if (!body.failed)
        peer_reply(peer, to, error, body.bytes, body.used);
    wire_body_free(&body);
}

void peer_reply_with(struct peer *peer, const struct wire_request *to, const struct wire_body *body,
                     const int *fds, unsigned fd_count)
{
    if (!peer->closed) {
        send_reply(peer, to, 0, body->bytes, body->used, fds, fd_count);
        return;
    }
    for (unsigned i = 0; i < fd_count; i++)
        close(fds[i]);
}

/* ---- input ---- */

static bool has_room_for_work(const struct peer *peer)
{
    return !peer->closed && !peer->closing &&
           (peer->hungup || (!peer->busy && output_waiting(peer) <= OUTPUT_ENOUGH));
}

/* Starts the request at the front of the input; false when it is not all there yet. */
static bool take_head(struct peer *peer)
{
    if (peer->input_end - peer->input_start < sizeof peer->head)
        return false;
    memcpy(&peer->head, peer->input + peer->input_start, sizeof peer->head);
    peer->input_start += sizeof peer->head;
    peer->body_used = 0;
    if (peer->head.body == 0)
        return true;
    peer->body = peer->head.body <= WIRE_BODY_MAX ? malloc((size_t)peer->head.body + 1) : NULL;
    if (peer->body == NULL) {
        peer_close(peer);
        return false;
    }
    return true;
}

/* Hands over the request whose body is complete; false when bytes are missing. */
static bool take_body(struct peer *peer)
{
    size_t missing = peer->head.body - peer->body_used;
    size_t there = peer->input_end - peer->input_start;
    size_t count = missing < there ? missing : there;
    if (peer->body != NULL)
        memcpy(peer->body + peer->body_used, peer->input + peer->input_start, count);
    peer->body_used += count;
    peer->input_start += count;
    if (peer->body_used < peer->head.body)
        return false;
    char *body = peer->body;
    if (body != NULL)
        body[peer->body_used] = '\0';
    peer->body = NULL;
    peer->events->request(peer, &peer->head, body);
    return true;
}

static void parse(struct peer *peer)
{
    while (has_room_for_work(peer)) {
        if (peer->body == NULL && !take_head(peer))
            break;
        if (!take_body(peer))
            break;
    }
    if (peer->closed)
        return;
    memmove(peer->input, peer->input + peer->input_start, peer->input_end - peer->input_start);
    peer->input_end -= peer->input_start;
    peer->input_start = 0;
}

/* Receives into the body that is arriving, or else into the buffer. Returns recv()'s answer. */
static ssize_t receive(struct peer *peer)
{
    ssize_t got;
    if (peer->body != NULL && peer->input_end == 0) {
        got = recv(peer->watch.fd, peer->body + peer->body_used,
                   peer->head.body - peer->body_used, MSG_DONTWAIT);
        if (got > 0)
            peer->body_used += (size_t)got;
    } else {
        got = recv(peer->watch.fd, peer->input + peer->input_end,
                   sizeof peer->input - peer->input_end, MSG_DONTWAIT);
        if (got > 0)
            peer->input_end += (size_t)got;
    }
    return got;
}

static void drain(struct peer *peer)
{
    size_t taken = 0;
    while (taken < TURN_BYTES && has_room_for_work(peer)) {
        size_t room = peer->body != NULL && peer->input_end == 0
                          ? peer->head.body - peer->body_used
                          : sizeof peer->input - peer->input_end;
        ssize_t got = receive(peer);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0 && errno == EAGAIN)
            return;
        if (got <= 0) {
            peer_close(peer);
            return;
        }
        taken += (size_t)got;
        parse(peer);
        if ((size_t)got < room && !peer->hungup)
            return; /* the socket is empty: the next recv() would only say so */
    }
}

static void ready(struct watch *watch, uint32_t events)
{
    struct peer *peer = LIST_OF(watch, struct peer, watch);
    if (peer->closed)
        return;
    if ((events & (EPOLLHUP | EPOLLERR)) != 0)
        peer->hungup = true;
    if ((events & EPOLLOUT) != 0)
        flush(peer);
    if (peer->closed)
        return;
    if (peer->hungup && peer->closing)
        peer_close(peer);
    else if ((events & EPOLLIN) != 0 || peer->hungup)
        drain(peer);
}

void peer_busy(struct peer *peer, bool busy)
{
    if (peer->busy == busy || peer->closed)
        return;
    peer->busy = busy;
    if (!busy)
        loop_later(peer->loop, &peer->chore);
    want_events(peer);
}

/* ---- life ---- */

static void end_of_turn(struct chore *chore)
{
    struct peer *peer = LIST_OF(chore, struct peer, chore);
    if (peer->closed) {
        free(peer->output);
        peer->events->freed(peer);
        return;
    }
    flush(peer);
    if (!peer->closed && peer->input_end > 0 && has_room_for_work(peer)) {
        parse(peer); /* what had to wait inside while the peer was not read from */
        want_events(peer);
    }
}

bool peer_init(struct peer *peer, struct loop *loop, int socket, const struct peer_events *events)
{
    struct ucred who = {0};
    socklen_t size = sizeof who;
    peer->loop = loop;
    peer->events = events;
    peer->watch = (struct watch){.fd = socket, .ready = ready};
    list_init(&peer->descriptors);
    chore_init(&peer->chore, end_of_turn);
    getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &who, &size);
    peer->pid = who.pid;
    int flags = fcntl(socket, F_GETFL);
    if (flags >= 0 && fcntl(socket, F_SETFL, flags | O_NONBLOCK) == 0 &&
        loop_watch(loop, &peer->watch, EPOLLIN))
        return true;
    int error = errno;
    close(socket);
    errno = error;
    return false;
}

void peer_close(struct peer *peer)
{
    if (peer->closed)
        return;
    peer->closed = true;
    loop_forget(peer->loop, &peer->watch);
    close(peer->watch.fd);
    while (first_parcel(peer) != NULL)
        parcel_free(first_parcel(peer));
    free(peer->body);
    peer->body = NULL;
    peer->events->gone(peer);
    loop_later(peer->loop, &peer->chore);
}

void peer_close_after(struct peer *peer)
{
    peer->closing = true;
    loop_later(peer->loop, &peer->chore);
}
