/*
 * What the library and the host process say to one another.
 *
 * A stream socket stands for one TCP connection. The one to SITE/.sim/vim.sock is a login to the VIM
 * service (Connect); each to SITE/.sim/nfc.sock is an NFC session (one for each open disk). When
 * either end closes it, the session is over: that is how the host notices a client that was killed.
 *
 * The bytes of a read do not travel: the answer, sent when they would have arrived, says in which
 * files they lie, and the library copies them from there (the descriptors come with the answer to
 * WIRE_OPEN). That keeps the simulator cheap, so that a benchmark measures the client. The bytes of a
 * write do travel, so that the host can still be holding them when the client is dead.
 *
 * A request is a struct wire_request and `body` bytes, an answer a struct wire_reply and `body`
 * bytes; answers come in any order. Bodies are written with wire_put_* and read with wire_take_*.
 * A failed request's answer has one string as its body: the host's reason, for the log.
 */
#ifndef SIMULATOR_WIRE_H
#define SIMULATOR_WIRE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum wire_op {
    /* on vim.sock */
    WIRE_LOGIN = 1,  /* u64 pid, u64 release, str user, str password, str cookie, str vmx_spec,
                        str snapshot, u64 read_only, str tmp_directory  ->  u64 session.
                        Only the login is checked: what VM and snapshot are worth shows at Open. */
    WIRE_LOGOUT,     /* -> nothing */
    WIRE_PREPARE,    /* str vmx_spec, str identity -> nothing (after WIRE_LOGIN) */
    WIRE_END_ACCESS, /* str vmx_spec, str identity -> nothing (after WIRE_LOGIN) */
    WIRE_CLEANUP,    /* str vmx_spec, str tmp_directory -> u64 cleaned, u64 remaining (after LOGIN) */
    /* on nfc.sock */
    WIRE_OPEN,       /* u64 session, str path, u64 flags, str transport, str thumbprint, u64 port,
                        u64 buffer_bytes, u64 buffers  ->  see below */
    WIRE_READ,       /* start, count -> struct wire_segment[] that cover it in order */
    WIRE_WRITE,      /* start, count, the bytes -> nothing, when they have landed */
    WIRE_FLUSH,      /* -> nothing, when all that landed is on stable storage */
    WIRE_QUERY,      /* start, count, u64 chunk -> struct wire_segment[], in sectors */
    WIRE_MAP,        /* -> u64 segments, and a memfd with them: the disk as it is laid out now */
    WIRE_METADATA,   /* str key, str value: sets it -> nothing */
    WIRE_CLOSE,      /* -> nothing; the host then closes */
};

/* The answer to WIRE_OPEN: u64 capacity, u64 adapter, u64 links, u64 cylinders, u64 heads,
 * u64 sectors, str uuid, str parent_hint, u64 logical_sector, u64 physical_sector, str host,
 * u64 local (the datastore is local to the host), u64 redo (the disk has a parent),
 * u64 n and n times {str key, str value} (the disk database),
 * u64 files, and for each {str path-or-device, u64 flat}, u64 segments.
 * For nbd and nbdssl: one descriptor (read-only) for each file; segments is 0.
 * For san and hotadd: no descriptors of files (the library opens the devices itself), but one memfd
 * with `segments` struct wire_segment: the map of the whole disk as it was at this open. */

#define WIRE_HOLE UINT32_MAX
#define WIRE_BODY_MAX (64u << 20) /* an announced body beyond that ends the connection */
#define WIRE_FDS_MAX 64           /* in one message; an answer with more sends them in several, each
                                     with one byte '+' after the body */

struct wire_request {
    uint32_t op;
    uint32_t body; /* bytes that follow */
    uint64_t id;   /* chosen by the library, repeated in the answer */
    uint64_t start, count; /* sectors */
};

struct wire_reply {
    uint32_t op;
    uint32_t error; /* an error code of the interface; 0 is success */
    uint64_t id;
    uint32_t body;
    uint32_t fds; /* descriptors that come with it, in all */
};

struct wire_segment {
    uint32_t file; /* or WIRE_HOLE */
    uint32_t link;
    uint64_t offset; /* bytes in that file; of WIRE_QUERY: sectors of the disk */
    uint64_t length; /* bytes; of WIRE_QUERY: sectors */
};

/* ---- bodies ---- */

struct wire_body {
    char *bytes; /* to be freed by the owner: wire_body_free() */
    size_t used, room;
    bool failed; /* no memory: nothing more is put */
};

void wire_body_free(struct wire_body *body);
void wire_put_u64(struct wire_body *body, uint64_t value);
void wire_put_str(struct wire_body *body, const char *text); /* NULL is kept apart from "" */
void wire_put_raw(struct wire_body *body, const void *bytes, size_t count);

struct wire_reader {
    const char *bytes;
    size_t left;
    bool failed; /* the body ended too early or holds nonsense: what was taken is 0 or NULL */
};

uint64_t wire_take_u64(struct wire_reader *reader);
/* Points into the body (which holds it NUL-terminated); NULL for NULL. */
const char *wire_take_str(struct wire_reader *reader);

/* ---- sockets ---- */

/* All of it or failure: -1 with errno; 0 is success. The sockets are blocking ones. Never raises
 * SIGPIPE. `fds` (count may be 0) travel with the first byte. */
int wire_send(int socket, const void *head, size_t head_size, const void *body, size_t body_size,
              const int *fds, unsigned fd_count);
/* 1 for `size` bytes, 0 for an end before the first of them, -1 with errno (ECONNRESET for an end
 * inside). Descriptors that come along are appended to `fds` (close-on-exec), `*fd_count` of at most
 * `fd_room`; without room they are closed. */
int wire_receive(int socket, void *buffer, size_t size, int *fds, unsigned *fd_count, unsigned fd_room);

/* Connects to the socket `name` in `folder`, whatever the length of the folder's path. -1 with errno:
 * ENOENT when there is no such folder, ECONNREFUSED when nobody listens. */
int wire_connect(const char *folder, const char *name);
int wire_listen(const char *folder, const char *name); /* replaces a socket that nobody serves */

#endif
