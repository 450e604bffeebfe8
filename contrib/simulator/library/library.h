/*
 * The library's insides. The way of one read: io.c (the call, strictness, faults) -> net.c or
 * device.c or file.c (the transport) -> complete() in io.c (callback, count of outstanding requests).
 *
 * Locks, in the order in which they may be taken: handle.call (one call of the interface on a handle
 * at a time), nfc.lock (requests on the wire), handle.lock (outstanding requests). No lock but
 * handle.call is held while a callback of the client runs.
 */
#ifndef SIMULATOR_LIBRARY_H
#define SIMULATOR_LIBRARY_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "../common/events.h"
#include "../common/settings.h"
#include "../common/wire.h"
#include "../vmdk/vmdk.h"
#include "vixDiskLib.h"

#define VIX_EXPORT __attribute__((visibility("default")))
#define SECTOR ((uint64_t)VIXDISKLIB_SECTOR_SIZE)

/* ---- the process (init.c, config.c) ---- */

/* What a client's configuration file says, as far as it is known here. */
struct client_config {
    char tmp_directory[256];
    char log_file[256];       /* log.fileName */
    unsigned transport_level; /* vixDiskLib.transport.LogLevel */
    unsigned nfc_level;       /* vixDiskLib.nfc.LogLevel */
    uint64_t read_timeout_ms, write_timeout_ms; /* vixDiskLib.nfc.*TimeoutMs; 0 is for ever */
    uint64_t buffer_bytes, buffers;             /* vixDiskLib.nfcAio.Session.*; 0 is the profile's */
};

enum library_state { LIBRARY_NEW, LIBRARY_READY, LIBRARY_EXITED };

/* The one object of the process: the interface has no other place for it. Set up by InitEx, and only
 * read after that, but for what is atomic. */
struct library {
    _Atomic int state;
    pid_t pid;
    pid_t session_thread; /* of InitEx */
    VixDiskLibGenericLogFunc *log, *warn, *panic;
    char kit[1024];   /* the folder above the lib64/ that this library was loaded from */
    bool plugin;      /* the advanced transports' part was found under libDir */
    char transports[128];
    struct client_config config;
    struct settings_source *settings; /* of the kit */
    _Atomic unsigned connections;     /* made so far: names their temporary folders */
    _Atomic uint64_t calls;
    _Atomic int strict_fork; /* enum strictness, as the last call found it */
};

extern struct library library;

void user_folder(char *path, size_t size); /* /tmp/vmware-USER */
void config_defaults(struct client_config *config);
VixError config_read(const char *path, struct client_config *config);

/* ---- what the library says (log.c) ---- */

enum level { SAY_PANIC, SAY_ERROR, SAY_WARNING, SAY_AUDIT, SAY_INFO, SAY_VERBOSE, SAY_TRIVIA };

void say(enum level level, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* NFC has its own levels: 0 quiet, 1 error, 2 and 3 info, 4 debug. */
void say_nfc(unsigned level, const char *format, ...) __attribute__((format(printf, 2, 3)));
void chatter_call(const struct settings *settings, const char *name);
void chatter_secrets(const struct settings *settings, const char *user, const char *password);
void chatter_phone_home(const struct settings *settings);

typedef struct VixDiskLibHandleStruct handle_t;

/* ---- calls (call.c): what happens around every function of the interface ---- */

struct call {
    const char *name; /* without VixDiskLib_ */
    struct settings_source *source;
    const struct settings *settings;
    const struct fault *fault; /* that strikes this call, or NULL */
    handle_t *entered;         /* whose handle.call this call holds */
};

/* What a call is about, for faults to match. */
struct subject {
    struct settings_source *source; /* NULL is the kit's */
    const char *path, *transport;
    uint64_t start, count;
};

/* Checks that the library may be used here and now, makes noise, and acts out what a fault does
 * before the work. An error other than VIX_OK is the call's result; call_end() is due in any case. */
VixError call_begin(struct call *call, const char *name, const struct subject *subject);
VixError call_end(struct call *call, VixError error); /* returns what the client is to get */
VixError decorated(bool upper_bits, VixError error); /* an error with something in its upper bits */

/* The same for a call on a handle, which at most one call may be using. `handle` may be NULL. */
VixError handle_begin(struct call *call, const char *name, handle_t *handle, uint64_t start,
                      uint64_t count);
VixError handle_end(struct call *call, VixError error);

/* A rule was broken: aborts with a message, or returns `error`, or VIX_OK when that rule is off. */
VixError broken(enum strictness strictness, const char *name, VixError error, const char *format, ...)
    __attribute__((format(printf, 4, 5)));
VixError session_thread_only(const struct call *call);
/* NULL where the real library would crash. With strict.null=off it does crash. */
VixError required(const struct call *call, const void *pointer, const char *what);

/* ---- memory that ends at a guard page (guarded.c) ---- */

void *guarded_alloc(size_t size, bool strings_are_ours); /* zeroed; NULL without memory */
bool guarded_owns_strings(const void *memory);
void guarded_free(void *memory);

/* ---- connections (connection.c, params.c) ---- */

struct VixDiskLibConnectionStruct {
    VixDiskLibConnectParams params; /* deep copies */
    bool read_only;
    char *snapshot; /* NULL without */
    char modes[256]; /* "" is no wish */
    bool local;
    unsigned handles; /* open ones */
    unsigned failed_closes; /* of them: a fault kept the client from closing them */
    char site[1200];
    char tmp_directory[320]; /* this connection's own, left behind */
    struct settings_source *settings; /* the site's; the kit's for local */
    struct events *events;
    int vim; /* the login's socket; -1 for local */
    uint64_t session;
};

VixError params_copy(VixDiskLibConnectParams *to, const VixDiskLibConnectParams *from);
void params_clear(VixDiskLibConnectParams *params);

/* Connects to the VIM service of params' server and logs in. */
VixError vim_login(const VixDiskLibConnectParams *params, bool read_only, const char *snapshot,
                   const char *tmp_directory, const char *site, int *socket, uint64_t *session);
/* One request and its answer on a VIM socket. `*reply` is to be freed with free(). */
VixError vim_call(int socket, unsigned op, const struct wire_body *body, char **reply, size_t *size);
VixError find_site(const char *server, char *site, size_t size);

/* ---- requests and handles ---- */

struct request;
typedef void (*request_done)(struct request *request, VixError error, char *body, size_t size,
                             int *fds, unsigned fd_count);

/* One thing asked for: by the client (read, write), or by the library of the host. */
struct request {
    struct VixDiskLibHandleStruct *handle;
    unsigned op; /* WIRE_* */
    uint64_t start, count;
    uint8_t *buffer; /* a write's is only read */
    VixDiskLibCompletionCB callback;
    void *cb_data;
    request_done done; /* called by the wire's thread */
    uint64_t sent_ns;
    struct request *next, *previous; /* on the wire */
    struct request *queued;          /* in a device's queue of writes */
    /* faults */
    VixError callback_error;
    uint64_t late_ns;
    bool dropped;
    bool upper_bits; /* of the result */
};

/* An NFC session: a socket and the thread that receives from it. */
struct nfc {
    int socket; /* -1 without a host */
    pthread_t thread;
    bool running;
    pthread_mutex_t lock; /* what follows */
    struct request *first;
    VixError lost; /* why the connection is no more */
    bool closing;
    pthread_mutex_t sending; /* one message at a time */
};

/* A device or file that a san or hotadd handle reads by itself. */
struct device {
    char path[512];
    int read_fd, write_fd; /* -1 where not open */
    bool direct;           /* read_fd is */
};

struct mapped {
    uint64_t start; /* bytes on the disk */
    struct wire_segment segment;
};

struct transport {
    const char *name;
    /* Starts the request; complete() is called when it is over, perhaps before this returns. */
    void (*submit)(struct request *request);
    VixError (*flush)(struct VixDiskLibHandleStruct *handle);
    VixError (*query)(struct VixDiskLibHandleStruct *handle, uint64_t start, uint64_t count,
                      uint64_t chunk, struct vmdk_range **ranges, size_t *used);
    VixError (*set_metadata)(struct VixDiskLibHandleStruct *handle, const char *key,
                             const char *value);
    void (*close)(struct VixDiskLibHandleStruct *handle);
};

struct metadata {
    char *key, *value;
};

struct disk_facts {
    uint64_t capacity;
    int adapter;
    unsigned links;
    VixDiskLibGeometry geometry;
    char *uuid, *parent_hint;
    uint32_t logical_sector, physical_sector;
    char host[128];
    bool local_store, redo;
    struct metadata *metadata;
    unsigned metadata_count;
};

struct VixDiskLibHandleStruct {
    struct VixDiskLibConnectionStruct *connection;
    const struct transport *transport;
    char *path;
    uint32_t flags;
    struct disk_facts facts;

    bool close_failed; /* counted in the connection's failed_closes */

    pthread_mutex_t call; /* held during any call of the interface on this handle */
    pthread_mutex_t lock; /* what follows */
    pthread_cond_t idle;
    unsigned outstanding, calling_back;
    uint64_t reads, writes, read_bytes, write_bytes, wire_bytes;

    struct nfc nfc;
    /* nbd, nbdssl */
    int *fds;
    unsigned fd_count;
    /* san, hotadd */
    struct device *devices;
    unsigned device_count;
    pthread_mutex_t map_lock; /* the map is renewed by the writer alone, and read by others */
    struct mapped *map;
    size_t map_count;
    uint64_t random;
    pthread_t writer;
    bool writer_running, writer_stop;
    struct request *write_first, *write_last;
    pthread_cond_t write_wanted;
    /* file */
    struct vmdk *disk;
    int disk_lock;
};

extern const struct transport transport_nbd, transport_nbdssl, transport_san, transport_hotadd,
    transport_file;

/* io.c */
void complete(struct request *request, VixError error); /* frees it */
void wait_until_idle(handle_t *handle);
/* One WIRE_READ or WIRE_WRITE from its start to its end; `fault` may be NULL. */
VixError transfer_and_wait(const struct fault *fault, handle_t *handle, unsigned op, uint64_t start,
                           uint64_t count, uint8_t *buffer);

/* nfc.c */
VixError nfc_open(handle_t *handle); /* connects and starts the thread */
void nfc_submit(struct request *request, const void *body, size_t size);
/* Asks and waits. `*reply` is to be freed; descriptors go to `fds` (room for WIRE_FDS_MAX at most). */
struct nfc_answer {
    char *body;
    size_t size;
    int *fds;
    unsigned fd_count;
};
VixError nfc_call(handle_t *handle, unsigned op, uint64_t start, uint64_t count,
                  const struct wire_body *body, struct nfc_answer *answer);
void nfc_answer_free(struct nfc_answer *answer); /* closes its descriptors */
void nfc_close(handle_t *handle);
void nfc_lose(handle_t *handle);      /* a fault: the connection breaks */
void nfc_stop_host(handle_t *handle); /* a fault: SIGSTOP */

/* net.c: what nbd, nbdssl, san and hotadd share */
VixError net_open(handle_t *handle, const struct transport *transport);
VixError net_query(handle_t *handle, uint64_t start, uint64_t count, uint64_t chunk,
                   struct vmdk_range **ranges, size_t *used);
VixError net_flush(handle_t *handle);
VixError net_set_metadata(handle_t *handle, const char *key, const char *value);

/* device.c */
VixError device_open(handle_t *handle, struct wire_reader *files, struct nfc_answer *answer);

/* file.c */
VixError file_open(handle_t *handle);

/* facts.c */
VixError facts_take(struct disk_facts *facts, struct wire_reader *reader);
VixError facts_of_file(struct disk_facts *facts, struct vmdk *disk);
void facts_clear(struct disk_facts *facts);

/* open.c */
VixError open_disk(struct VixDiskLibConnectionStruct *connection, const char *path, uint32_t flags,
                   handle_t **handle);
void close_disk(handle_t *handle);

/* clock.c */
uint64_t now_ns(void);
void sleep_ns(uint64_t duration_ns);
uint64_t random_next(uint64_t *state);
uint64_t jittered(uint64_t duration_ns, double jitter, uint64_t *state);
void start_thread_or_die(pthread_t *thread, const char *name, void *(*run)(void *), void *argument);

#endif
