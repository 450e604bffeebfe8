/* One NFC session: a client's open disk (session.c, open.c, requests.c). */
#ifndef SIMULATOR_HOST_SESSION_H
#define SIMULATOR_HOST_SESSION_H

#include <stdbool.h>
#include <stdint.h>

#include "../vmdk/vmdk.h"
#include "access.h"
#include "attachments.h"
#include "devices.h"
#include "locks.h"
#include "peer.h"
#include "site.h"

enum transport { TRANSPORT_NBD, TRANSPORT_NBDSSL, TRANSPORT_SAN, TRANSPORT_HOTADD, TRANSPORTS };

extern const char *const transport_names[TRANSPORTS];

/* How a session ended. A client that is lost may have been killed, or its network: the host cannot
 * know, and treats its lock and its writes with care. */
enum session_end {
    END_CLIENT_LOST,
    END_CLOSED,
    END_IDLE,
    END_REFUSED,
    END_HOST_LOST,
    END_STOPPED, /* this process ends */
};

struct session {
    struct peer peer;
    struct site *site;
    struct list place;
    uint64_t id;
    bool open;           /* a disk is */
    enum session_end end; /* once the connection is over */
    enum transport transport;
    char *path;
    struct site_host *host; /* counts this session while a disk is open */
    struct vmdk *disk;
    bool writable;
    struct lock *lock;
    struct attachment *attachment;
    struct device **devices;
    unsigned device_count;
    bool local; /* the datastore is the host's own */
    struct channel channel;
    uint64_t wanted_buffers, wanted_buffer_bytes; /* by the client's configuration */
    struct list requests;                         /* in flight */
    unsigned request_count;
    uint64_t request_bytes;   /* held for them */
    struct request *closing;  /* WIRE_CLOSE, which waits for the others */
    uint64_t active_ns;       /* when a request last came or was answered */
    uint64_t reads, read_bytes, writes, written_bytes;
};

struct request {
    struct list place;
    struct session *session;
    struct wire_request head;
    char *body;
    struct job job;
    bool has_job;
    struct timer timer;
    uint64_t memory_bytes; /* of the host's budget */
    void (*perform)(struct request *request);
    int error; /* of an open that failed: told when the answer would have arrived */
    char *why;
};

static inline bool transport_is_device(enum transport transport)
{
    return transport == TRANSPORT_SAN || transport == TRANSPORT_HOTADD;
}

static inline bool session_is_device(const struct session *session)
{
    return transport_is_device(session->transport);
}

/* ---- session.c: requests in general ---- */

/* Takes over `body`. */
struct request *request_new(struct session *session, const struct wire_request *head, char *body);
/* Calls `perform` after the time; at once, from inside, when that is 0. */
void request_delay(struct request *request, uint64_t delay_ns, void (*perform)(struct request *));
/* Calls `perform` when the bytes would be through. */
void request_transfer(struct request *request, uint64_t bytes, void (*perform)(struct request *));
void request_end(struct request *request); /* answered or given up; frees it */
void request_refuse(struct request *request, uint32_t error, const char *why); /* and ends it */
void request_done(struct request *request, const void *body, size_t size);     /* and ends it */

void session_break(struct session *session, enum session_end end);
void session_release(struct session *session, enum session_end end); /* gives back the disk */
void session_use_rates(struct session *session, const struct settings *settings);

/* ---- open.c ---- */

void open_disk(struct session *session, const struct wire_request *head, char *body);

/* ---- requests.c ---- */

void disk_request(struct session *session, const struct wire_request *head, char *body);
int map_disk(struct session *session, int *fd, uint64_t *segments); /* a memfd with the whole map */

#endif
