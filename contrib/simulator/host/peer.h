/*
 * One client's socket: requests come in, answers go out, nothing ever blocks.
 *
 * What a peer sends is not trusted: a body beyond WIRE_BODY_MAX ends the connection, memory for a
 * body is touched only as its bytes arrive, and who does not take its answers or sends more than is
 * being worked on is not read from until that has changed.
 */
#ifndef SIMULATOR_HOST_PEER_H
#define SIMULATOR_HOST_PEER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "../common/wire.h"
#include "list.h"
#include "loop.h"

#define PEER_INPUT_BYTES (32u << 10)

struct peer;

struct peer_events {
    /* `body` (NUL after its end; NULL when it is empty) belongs to who is called: free(). */
    void (*request)(struct peer *peer, const struct wire_request *request, char *body);
    /* The connection is over, whoever ended it; nothing can be sent any more. The peer's memory is
     * given back in `freed`, later. */
    void (*gone)(struct peer *peer);
    void (*freed)(struct peer *peer);
};

struct peer {
    struct loop *loop;
    struct watch watch;
    const struct peer_events *events;
    struct chore chore;
    long pid; /* of the client, as the kernel tells */
    /* input */
    char input[PEER_INPUT_BYTES];
    size_t input_start, input_end;
    struct wire_request head; /* of the body that is arriving */
    char *body;
    size_t body_used;
    bool busy;   /* the owner has enough to do: peer_busy() */
    bool hungup; /* what has arrived is all that there will be */
    /* output */
    char *output;
    size_t output_start, output_end, output_room;
    struct list descriptors;
    bool closing; /* when all is sent */
    bool closed;
};

/* Takes over the socket, which becomes non-blocking; false (and the socket closed) with errno. */
bool peer_init(struct peer *peer, struct loop *loop, int socket, const struct peer_events *events);
void peer_close(struct peer *peer);        /* now; calls `gone` */
void peer_close_after(struct peer *peer);  /* when the answers are sent */
void peer_busy(struct peer *peer, bool busy); /* no further requests until it is not */

/* Answers are sent together at the end of the turn. */
void peer_reply(struct peer *peer, const struct wire_request *to, uint32_t error, const void *body,
                size_t size);
void peer_refuse(struct peer *peer, const struct wire_request *to, uint32_t error, const char *why);
/* With descriptors, which are taken over (closed when they are sent). */
void peer_reply_with(struct peer *peer, const struct wire_request *to, const struct wire_body *body,
                     const int *fds, unsigned fd_count);

#endif
