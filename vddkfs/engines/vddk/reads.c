/*
 * The ordinary read of a VDDK worker, from the daemon's packet to the answer, without Python.
 *
 * reads_next() is what the worker's main thread does while it has nothing else to do: it receives
 * packets, begins the reads that are ordinary with VixDiskLib_ReadAsync, and returns for everything
 * else. completed() is what the library calls when such a read has ended, on a thread of its own or
 * inside VixDiskLib_ReadAsync: it answers the daemon. A read that failed stays under way until
 * Python takes it with reads_take_ended().
 *
 * Threads: completed() comes on any; all other functions are for the main thread. `lock` guards
 * what both change: the state of the slots, what is under way of each image, the figures. It is
 * held neither in a call of the library nor while an answer is sent.
 *
 * Nothing made here is ever freed, because the library may call back at any time.
 *
 * x86-64 only, like VDDK: packets are little-endian, and addresses leave 16 bits of a pointer free.
 */

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum {
    SECTOR = 512,
    OP_READ = 1,
    FLAG_DIRECT = 1,
    VIX_ASYNC = 25000,
    /* Reads under way; the daemon has at most 32 at once. */
    SLOTS = 256,
    /* Chunks that can be known; those of other numbers modulo CHUNKS only. */
    CHUNKS = 1024,
    /* As Histogram counts: by powers of two of 8 us. */
    BUCKETS = 64,
    SHORTEST_NS = 8000,
    /* Packets after which Python has its turn (signals, what is due), whatever else there is. */
    BATCH = 64,
};

static const uint64_t VIX_CODE = 0xffff;
static const int64_t SECOND = 1000000000;
static const unsigned SERIAL_SHIFT = 48;

/* protocol.REQUEST and protocol.REPLY. */
struct request {
    uint8_t op, flags;
    uint16_t image;
    uint32_t count;
    uint64_t id, sector;
    uint32_t chunk, offset;
};
struct reply {
    uint8_t op, flags;
    uint16_t unused;
    int32_t status;
    uint64_t id;
};
_Static_assert(sizeof(struct request) == 32, "the layout of protocol.REQUEST");
_Static_assert(sizeof(struct reply) == 16, "the layout of protocol.REPLY");

typedef uint64_t read_async_fn(void *handle, uint64_t start, uint64_t count, uint8_t *buffer,
                               void (*done)(void *data, uint64_t result), void *data);

/*
 * FREE: in `spare`. UNDER_WAY: the library has it. ANSWERING: it has ended, and whoever saw that
 * answers. ENDED: Python is to take it.
 */
enum state { FREE, UNDER_WAY, ANSWERING, ENDED };

struct slot {
    struct reads *reads;
    struct request request;
    int64_t began;
    uint32_t code;
    /* Tells the requests of a slot apart: a second completion of one must not end the next. */
    uint16_t serial;
    uint8_t state;
} __attribute__((aligned(64)));

struct chunk {
    uint8_t *address; /* NULL: there is none */
    uint64_t size;
    uint32_t number;
};

struct image {
    /* What Python has offered. */
    void *handle;
    uint64_t room; /* bytes that may be under way here */
    uint64_t piece;
    int no_direct, aligned, watch;
    /* What is under way, and what has come since Python asked last. */
    uint64_t requests, bytes, came_back;
    int64_t moved;
};

struct reads {
    pthread_mutex_t lock;
    int sock, woken;
    read_async_fn *read_async;
    int64_t spin_ns;

    /* Of the wait for the next packet: since when (0: nobody waits), and whether to look busily. */
    int64_t waiting_since;
    int spin;

    struct chunk chunks[CHUNKS];
    struct slot slots[SLOTS];
    struct slot *spare[SLOTS]; /* a ring: what was given back last is used last */
    unsigned first_spare, spares;
    unsigned ended; /* slots that Python is to take */

    uint64_t strays, failures, moved_bytes, nanoseconds, buckets[BUCKETS];
    unsigned image_count;
    struct image images[];
};

/* For Python: of a packet that it has to see; `fd` came along (-1: none). */
struct received {
    uint64_t length;
    int fd, cut;
};

/* For Python: a read that ended otherwise than with an answer; `code` is the VixError. */
struct ended {
    uint64_t id, sector;
    uint32_t image, count, chunk, offset, code;
};

enum next { NEXT_TURN, NEXT_PACKET };

static int64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * SECOND + now.tv_nsec;
}

static struct reads *reads_new(int sock, int woken, uint64_t read_async, int64_t spin_ns,
                               unsigned image_count)
{
    size_t size = sizeof(struct reads) + image_count * sizeof(struct image);
    struct reads *reads = NULL;

    if (posix_memalign((void **)&reads, 64, size) != 0)
        return NULL;
    memset(reads, 0, size);
    pthread_mutex_init(&reads->lock, NULL);
    reads->sock = sock;
    reads->woken = woken;
    reads->read_async = (read_async_fn *)(uintptr_t)read_async;
    reads->spin_ns = spin_ns;
    reads->image_count = image_count;
    for (reads->spares = 0; reads->spares < SLOTS; reads->spares++) {
        reads->slots[reads->spares].reads = reads;
        reads->spare[reads->spares] = &reads->slots[reads->spares];
    }
    return reads;
}

/* No answer is sent after this, and nobody woken: the descriptors may be another's soon. */
static void reads_close(struct reads *reads)
{
    pthread_mutex_lock(&reads->lock);
    reads->sock = reads->woken = -1;
    pthread_mutex_unlock(&reads->lock);
}

/* Has the main thread return to Python. */
static void wake(struct reads *reads)
{
    if (reads->woken >= 0)
        (void)!eventfd_write(reads->woken, 1);
}

/* What Python lends and offers. */

/* Returns whether the chunk is known now; its reads are Python's otherwise. */
static int reads_lend(struct reads *reads, uint32_t number, uint64_t address, uint64_t size)
{
    struct chunk *chunk = &reads->chunks[number % CHUNKS];

    if (chunk->address != NULL)
        return chunk->number == number;
    chunk->number = number;
    chunk->size = size;
    chunk->address = (uint8_t *)(uintptr_t)address;
    return 1;
}

static void reads_take_back(struct reads *reads, uint32_t number)
{
    struct chunk *chunk = &reads->chunks[number % CHUNKS];

    if (chunk->number == number)
        chunk->address = NULL;
}

/* How image `index` may be read until this is called again; `room` 0: not at all. */
static void reads_offer(struct reads *reads, unsigned index, uint64_t handle, uint64_t room,
                        uint64_t piece, int no_direct, int aligned, int watch)
{
    struct image *image = &reads->images[index];

    pthread_mutex_lock(&reads->lock);
    image->handle = (void *)(uintptr_t)handle;
    image->room = handle != 0 ? room : 0;
    image->piece = piece;
    image->no_direct = no_direct;
    image->aligned = aligned;
    image->watch = watch;
    pthread_mutex_unlock(&reads->lock);
}

/*
 * How much of image `index` is under way. With `watch` every read that ends after this wakes the
 * main thread, until reads_offer() says otherwise.
 */
static void reads_under_way(struct reads *reads, unsigned index, int watch, uint64_t *requests,
                            uint64_t *bytes)
{
    struct image *image = &reads->images[index];

    pthread_mutex_lock(&reads->lock);
    image->watch |= watch;
    *requests = image->requests;
    *bytes = image->bytes;
    pthread_mutex_unlock(&reads->lock);
}

/*
 * When (CLOCK_MONOTONIC, ns; 0: never) image `index` was read last, and how many bytes have come
 * since the last call.
 */
static int64_t reads_news(struct reads *reads, unsigned index, uint64_t *came_back)
{
    struct image *image = &reads->images[index];
    int64_t moved;

    pthread_mutex_lock(&reads->lock);
    moved = image->moved;
    *came_back = image->came_back;
    image->came_back = 0;
    pthread_mutex_unlock(&reads->lock);
    return moved;
}

/* Failures, bytes, nanoseconds, and BUCKETS counts. */
static void reads_figures(struct reads *reads, uint64_t *figures)
{
    pthread_mutex_lock(&reads->lock);
    figures[0] = reads->failures;
    figures[1] = reads->moved_bytes;
    figures[2] = reads->nanoseconds;
    memcpy(figures + 3, reads->buckets, sizeof reads->buckets);
    pthread_mutex_unlock(&reads->lock);
}

/* How often a read ended that was not under way (any more), since the last call. */
static uint64_t reads_strays(struct reads *reads)
{
    return __atomic_exchange_n(&reads->strays, 0, __ATOMIC_RELAXED);
}

/* The end of a read. */

/* With `lock`. */
static void give_back(struct slot *slot, int64_t now)
{
    struct reads *reads = slot->reads;
    struct image *image = &reads->images[slot->request.image];
    uint64_t size = (uint64_t)slot->request.count * SECTOR;

    image->requests--;
    image->bytes -= size;
    image->moved = now;
    slot->state = FREE;
    slot->serial++;
    reads->spare[(reads->first_spare + reads->spares++) % SLOTS] = slot;
}

static void count(struct reads *reads, const struct slot *slot, uint32_t code, int64_t now)
{
    uint64_t took = now > slot->began ? (uint64_t)(now - slot->began) : 0;
    uint64_t steps = took / SHORTEST_NS;

    reads->buckets[steps != 0 ? 64 - __builtin_clzll(steps) : 0]++;
    reads->nanoseconds += took;
    if (code != 0)
        reads->failures++;
    else
        reads->moved_bytes += (uint64_t)slot->request.count * SECTOR;
}

/* Waits while the socket is full. A daemon that is gone needs no answer. */
static int answered(int sock, uint64_t id)
{
    struct reply reply = {.op = OP_READ, .id = id};
    ssize_t sent;

    do
        sent = send(sock, &reply, sizeof reply, MSG_NOSIGNAL);
    while (sent < 0 && errno == EINTR);
    return sent >= 0 || errno == EPIPE || errno == ECONNRESET;
}

/* Takes the end of the request that had `serial`; returns whether it still was to end. */
static int finish(struct slot *slot, uint16_t serial, uint32_t code)
{
    struct reads *reads = slot->reads;
    int64_t now = now_ns();
    struct image *image;
    int sock, expected, done;

    pthread_mutex_lock(&reads->lock);
    sock = reads->sock;
    expected = slot->state == UNDER_WAY && slot->serial == serial;
    if (expected) {
        slot->state = ANSWERING;
        count(reads, slot, code, now);
    } else {
        __atomic_add_fetch(&reads->strays, 1, __ATOMIC_RELAXED);
        wake(reads);
    }
    pthread_mutex_unlock(&reads->lock);
    if (!expected)
        return 0;

    done = code == 0 && (sock < 0 || answered(sock, slot->request.id));

    pthread_mutex_lock(&reads->lock);
    image = &reads->images[slot->request.image];
    if (done) {
        image->came_back += (uint64_t)slot->request.count * SECTOR;
        give_back(slot, now);
    } else {
        slot->code = code;
        slot->state = ENDED;
        __atomic_add_fetch(&reads->ended, 1, __ATOMIC_RELEASE);
    }
    if (!done || image->watch)
        wake(reads);
    pthread_mutex_unlock(&reads->lock);
    return 1;
}

/* The library's callback; its thread's errno is not ours to change. */
static void completed(void *data, uint64_t result)
{
    uint64_t key = (uint64_t)(uintptr_t)data;
    struct slot *slot = (struct slot *)(uintptr_t)(key & ((1ULL << SERIAL_SHIFT) - 1));
    int saved = errno;

    finish(slot, (uint16_t)(key >> SERIAL_SHIFT), (uint32_t)(result & VIX_CODE));
    errno = saved;
}

/* Hands one read to Python, which counts it from now on; returns whether there was one. */
static int reads_take_ended(struct reads *reads, struct ended *ended)
{
    const struct request *request;
    struct slot *slot = reads->slots;

    if (__atomic_load_n(&reads->ended, __ATOMIC_ACQUIRE) == 0)
        return 0;
    pthread_mutex_lock(&reads->lock);
    while (slot->state != ENDED)
        slot++;
    request = &slot->request;
    *ended = (struct ended){request->id,    request->sector, request->image, request->count,
                            request->chunk, request->offset, slot->code};
    give_back(slot, now_ns());
    __atomic_sub_fetch(&reads->ended, 1, __ATOMIC_RELEASE);
    pthread_mutex_unlock(&reads->lock);
    return 1;
}

/* The beginning. */

/* Returns where the read goes to, NULL if that is not a part of a chunk that is known. */
static uint8_t *place_of(const struct reads *reads, const struct request *request, uint64_t size)
{
    const struct chunk *chunk = &reads->chunks[request->chunk % CHUNKS];

    if (chunk->address == NULL || chunk->number != request->chunk)
        return NULL;
    if (request->offset > chunk->size || size > chunk->size - request->offset)
        return NULL;
    return chunk->address + request->offset;
}

/* Returns a slot for the read, which counts as under way then; NULL if there is no room. */
static struct slot *enter(struct reads *reads, const struct request *request, uint64_t size)
{
    struct image *image = &reads->images[request->image];
    struct slot *slot = NULL;

    pthread_mutex_lock(&reads->lock);
    if (reads->spares != 0 && size <= image->room && image->bytes <= image->room - size) {
        slot = reads->spare[reads->first_spare];
        reads->first_spare = (reads->first_spare + 1) % SLOTS;
        reads->spares--;
        image->requests++;
        image->bytes += size;
        image->moved = slot->began = now_ns();
        slot->request = *request;
        slot->state = UNDER_WAY;
    }
    pthread_mutex_unlock(&reads->lock);
    return slot;
}

/*
 * Begins a read if it is ordinary, and returns whether it was; nothing has happened otherwise.
 *
 * 25000 says that the library took the request. So does 0, whose meaning is not documented: it is
 * never taken for the end of the read. Any other code: the request was not taken, and ends with it,
 * unless the callback came all the same.
 */
static int begin(struct reads *reads, const struct request *request)
{
    uint64_t size = (uint64_t)request->count * SECTOR;
    const struct image *image;
    struct slot *slot;
    uint16_t serial;
    uint8_t *into;
    uint64_t key;
    uint32_t code;

    if (request->op != OP_READ || (request->flags & ~FLAG_DIRECT) != 0)
        return 0;
    if (request->image >= reads->image_count || size == 0)
        return 0;
    image = &reads->images[request->image];
    if (size > image->piece || ((request->flags & FLAG_DIRECT) != 0 && image->no_direct))
        return 0;
    into = place_of(reads, request, size);
    if (into == NULL || (image->aligned && (uintptr_t)into % SECTOR != 0))
        return 0;
    slot = enter(reads, request, size);
    if (slot == NULL)
        return 0;

    /* The slot is another's as soon as the call is made, but its serial changes here only. */
    serial = slot->serial;
    key = (uint64_t)(uintptr_t)slot | (uint64_t)serial << SERIAL_SHIFT;
    code = (uint32_t)(reads->read_async(image->handle, request->sector, request->count, into,
                                        completed, (void *)(uintptr_t)key) &
                      VIX_CODE);
    if (code != VIX_ASYNC && code != 0)
        finish(slot, serial, code);
    return 1;
}

/* Receiving. */

/* Returns recvmsg()'s result, of the descriptors that came along the first. */
static ssize_t receive(int sock, uint8_t *packet, size_t size, struct received *received)
{
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(sizeof(int))];
    } control;
    struct iovec part = {.iov_base = packet, .iov_len = size};
    struct msghdr message = {.msg_iov = &part,
                             .msg_iovlen = 1,
                             .msg_control = &control,
                             .msg_controllen = sizeof control};
    ssize_t length = recvmsg(sock, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    struct cmsghdr *header;

    if (length < 0)
        return length;
    received->length = (uint64_t)length;
    received->fd = -1;
    received->cut = (message.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) != 0;
    for (header = CMSG_FIRSTHDR(&message); header != NULL; header = CMSG_NXTHDR(&message, header)) {
        size_t number, count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);

        if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS)
            continue;
        for (number = 0; number < count; number++) {
            int fd;

            memcpy(&fd, CMSG_DATA(header) + number * sizeof fd, sizeof fd);
            if (received->fd < 0)
                received->fd = fd;
            else
                close(fd);
        }
    }
    return length;
}

/*
 * Waits for a packet until `until`, never asleep if that is negative; returns whether to look.
 *
 * A signal has Python look: that is where its handlers run. One that came while reads were `served`
 * has interrupted nothing, so Python looks soon after those in any case.
 */
static int wait_for_packet(struct reads *reads, int64_t until, int served)
{
    struct pollfd polled[2] = {{.fd = reads->sock, .events = POLLIN},
                               {.fd = reads->woken, .events = POLLIN}};
    struct timespec timeout;
    int64_t now = now_ns();
    int64_t left = until > now ? until - now : 0;
    int for_ever = until == INT64_MAX && !served;

    if (reads->waiting_since == 0)
        reads->waiting_since = now;
    if (reads->spin && now - reads->waiting_since < reads->spin_ns) {
        sched_yield();
        return 1;
    }
    if (until < 0)
        return 0;
    if (served && left > SECOND)
        left = SECOND;
    timeout.tv_sec = left / SECOND;
    timeout.tv_nsec = left % SECOND;
    if (ppoll(polled, 2, for_ever ? NULL : &timeout, NULL) <= 0 || !polled[0].revents)
        return 0;
    reads->spin = now_ns() - reads->waiting_since < 2 * reads->spin_ns;
    return 1;
}

/*
 * Serves reads until there is something for Python: NEXT_PACKET, a packet that it has to see;
 * NEXT_TURN, it is its turn to see what is due. A negative errno: the socket failed.
 *
 * `until` (CLOCK_MONOTONIC, ns; INT64_MAX: never) is when something is due; negative where that is
 * not known, which has Python say it before this would sleep.
 */
static int reads_next(struct reads *reads, int64_t until, uint8_t *packet, uint64_t size,
                      struct received *received)
{
    int turns = 0;

    while (turns < BATCH && __atomic_load_n(&reads->ended, __ATOMIC_ACQUIRE) == 0) {
        struct request request;

        if (receive(reads->sock, packet, size, received) < 0) {
            if (errno != EAGAIN && errno != EINTR)
                return -errno;
            if (!wait_for_packet(reads, until, turns != 0))
                break;
            continue;
        }
        reads->waiting_since = 0;
        turns++;
        if (received->length != sizeof request || received->fd >= 0 || received->cut)
            return NEXT_PACKET;
        memcpy(&request, packet, sizeof request);
        if (!begin(reads, &request))
            return NEXT_PACKET;
    }
    return NEXT_TURN;
}
