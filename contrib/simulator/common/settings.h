/*
 * What the simulator is told to do: the file `sim.conf`, read again whenever it changes.
 *
 * A *site* is a folder that stands for a vCenter, its ESXi hosts and their datastores. The library
 * finds the site of a server by its name, in KIT/sites/SERVERNAME (KIT is the folder above the
 * lib64/ that the library was loaded from). SITE/sim.conf holds for everything about that site, for
 * the library and for the host process. KIT/sim.conf holds for what has no site: InitEx, Exit,
 * ListTransportModes and the `file` transport. Both may be missing: then all is as by default.
 *
 * The file has lines `key = value`, `#` comments, and any number of `fault = ...` lines. Units are
 * part of the key (`_ms`, `_us`, `_bytes`, `_per_s`). Later lines win. An unknown key or a value
 * that cannot be read is an error: it is reported (and the whole file refused) rather than ignored.
 * Replace the file by renaming a new one over it: a reader then sees the old or the new.
 */
#ifndef SIMULATOR_SETTINGS_H
#define SIMULATOR_SETTINGS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* How fast things are. A named profile sets them all; single keys after it change it. */
struct profile {
    char name[32];
    /* the network to a host (nbd, nbdssl) */
    uint64_t net_latency_ns;     /* net.latency_us: until the first byte of an answer comes back */
    double net_jitter;           /* net.jitter: a latency varies by up to this part, either way */
    uint64_t net_buffers;        /* net.buffers: fragments in flight for one handle; 0 no limit */
    uint64_t net_buffer_bytes;   /* net.buffer_bytes: longer requests travel in fragments; 0 whole */
    bool net_tunable;            /* net.tunable: the client's vixDiskLib.nfcAio.Session.* count */
    uint64_t net_handle_rate;    /* net.handle_bytes_per_s; 0 no limit */
    uint64_t net_host_rate;      /* net.host_bytes_per_s, for all handles of a host; 0 no limit */
    uint64_t net_open_trips;     /* net.open_round_trips, of net.latency_us each */
    /* disks that this machine sees as devices (san, hotadd): synchronous */
    uint64_t device_read_ns;     /* device.read_us, one request */
    uint64_t device_write_ns;    /* device.write_us */
    uint64_t device_rate;        /* device.bytes_per_s of a handle; 0 no limit */
    /* QueryAllocatedBlocks */
    uint64_t query_call_ns;      /* query.call_us */
    uint64_t query_chunk_ns;     /* query.chunk_ns, each chunk asked for */
    uint64_t exit_ns;            /* exit_ms: how long VixDiskLib_Exit takes */
};

enum strictness { STRICT_OFF, STRICT_ERROR, STRICT_ABORT };

/* What a fault does. Several may be given in one rule where that makes sense. */
enum fault_action {
    FAULT_ERROR = 1 << 0,          /* error=CODE: the call returns it, nothing was done */
    FAULT_CALLBACK_ERROR = 1 << 1, /* callback_error=CODE: accepted, then completed with it */
    FAULT_HANG = 1 << 2,           /* hang: for ever */
    FAULT_DELAY = 1 << 3,          /* delay_ms=N before the call does its work */
    FAULT_SEGV = 1 << 4,           /* segv */
    FAULT_ABORT = 1 << 5,          /* abort */
    FAULT_SCRIBBLE = 1 << 6,       /* scribble: damages the client's heap */
    FAULT_LATE_STORE = 1 << 7,     /* late_store_ms=N: with an error; the buffer is written after it */
    FAULT_INLINE = 1 << 8,         /* inline: the callback runs inside ReadAsync/WriteAsync */
    FAULT_LATE_CALLBACK = 1 << 9,  /* late_ms=N: the callback comes so much later than the data */
    FAULT_DROP = 1 << 10,          /* drop: the callback never comes (Wait hangs) */
    FAULT_STOP_HOST = 1 << 11,     /* stop_host: SIGSTOP of the host process; with a call on a handle */
    FAULT_LOSE = 1 << 12,          /* lose: the connection of this handle breaks now */
};

/* One line `fault = FUNCTION [path=GLOB] [transport=NAME] [after=N] [count=N] [probability=P]
 * [trigger=FILE] [at=SECTOR] ACTION...`. FUNCTION is a name of the interface without its prefix, but
 * for those that only allocate, free or tell an error's text; or `*`. The counts are kept beside the
 * configuration (shared by all processes, and they survive any of them); a rule that changes starts
 * to count anew. trigger=FILE: only while FILE (relative to the configuration's folder) is there, and
 * it is removed by the call that it strikes. at=SECTOR: only requests that touch it. */
struct fault {
    char function[48];
    char path[256];      /* "" is any */
    char transport[16];  /* "" is any */
    char trigger[256];   /* "" is none */
    uint64_t after;      /* so many matching calls pass before */
    uint64_t count;      /* then so many are struck; UINT64_MAX without end */
    double probability;  /* each with this chance; 1 is always */
    uint64_t at;         /* sector, UINT64_MAX is any */
    unsigned actions;    /* enum fault_action */
    int error;
    int callback_error;
    uint64_t delay_ns, late_store_ns, late_ns;
    uint64_t id; /* hash of the line: names its counter */
};

struct host_state {
    char name[64];
    enum { HOST_UP, HOST_SHUTDOWN, HOST_MAINTENANCE, HOST_LOST, HOST_DOWN } state;
};

struct settings {
    struct profile profile;
    uint64_t seed; /* seed: of every random choice; 0 takes one from the clock */

    /* transports */
    char transports[128]; /* transports: what ListTransportModes answers, in order */
    bool license;         /* license: yes, or the advanced transports are refused */
    bool fallback;        /* unavailable = fallback|fail: what an Open does when none of the advanced
                             transports asked for is to be had */
    bool san_available;   /* san.available */
    bool san_loop;        /* san.device = loop|file: through a loop device, or the file itself */
    enum { SAN_FLAG, SAN_BUFFERED, SAN_DIRECT } san_cache; /* san.cache = flag|buffered|direct */
    bool san_keep_open;   /* san.keep_open: something else on the proxy holds the LUN open, so that
                             its cached pages outlive the library's handles */
    bool san_probe_crash; /* san.probe_crash: SIGSEGV while probing without san.scsi_disk */
    char san_scsi_disk[256];
    bool hotadd_available;     /* hotadd.available */
    uint64_t hotadd_slots;     /* hotadd.slots of the proxy VM */
    char hotadd_proxy[64];     /* hotadd.proxy: moref of the VM that this machine is; "" is none */
    bool hotadd_spoils_ctk;    /* hotadd.spoils_tracking: Cleanup damages change-tracking files */
    bool hotadd_fails;         /* hotadd.refusal = error|fallback: a refused attachment fails Open */

    /* what a client must not do */
    enum strictness strict_concurrency, strict_close, strict_threads, strict_fork, strict_alignment,
        strict_null, strict_init, strict_mixed; /* strict.NAME = abort|error|off */

    /* the hosts */
    char user[128], password[128], cookie[256]; /* login that is accepted; "" accepts any */
    char thumbprint[128];     /* "" accepts any */
    int login_error;          /* login_error: what a refused Connect returns */
    uint64_t session_limit;   /* sessions.limit: NFC sessions of one host */
    uint64_t memory_limit;    /* sessions.memory_bytes: NFC memory of one host */
    uint64_t idle_ns;         /* sessions.idle_ms: an NFC session idle so long is closed; 0 never */
    uint64_t lock_linger_ns;  /* lock_linger_ms: a dead client's lock is held so much longer */
    uint64_t late_write_ns;   /* late_write_ms: a dead client's accepted writes land within that */
    struct host_state hosts[32]; /* host.NAME = up|shutdown|maintenance|lost|down */
    size_t host_count;

    /* chatter */
    bool chatter_stdout, chatter_stderr, chatter_split, chatter_secrets, chatter_phone_home;
    bool chatter_log;       /* chatter.log: lines of all levels through the callbacks */
    uint64_t chatter_every; /* chatter.every: at each so-manieth call of the interface */
    bool upper_bits;        /* errors.upper_bits: something stands above an error's 16 bits of code */
    char log_directory[256]; /* log_directory: for the log file when the client gave no callback;
                                "" is /tmp/vmware-USER as with the real library */

    struct fault faults[64];
    size_t fault_count;
};

/* A place that settings come from; safe to use from several threads. */
struct settings_source;

/* `folder` holds sim.conf, `state` (made if missing; may be NULL: counts then live in this process
 * only) the counters of its faults. Returns NULL without memory. */
struct settings_source *settings_source_open(const char *folder, const char *state);
void settings_source_close(struct settings_source *source); /* after all references are returned */

/* The settings as they are now: one stat(2) when nothing changed. Never NULL; the reference is
 * given back with settings_release(). A file that is in error leaves the settings as they were and
 * is told once through settings_error(). */
const struct settings *settings_get(struct settings_source *source);
void settings_release(const struct settings *settings);

/* Takes the newest complaint about the file ("line 3: unknown key ..."), at most once; false when
 * there is none. */
bool settings_error(struct settings_source *source, char *text, size_t size);

/* The first fault that strikes this call, its count taken; NULL when none does. `start` and
 * `count` are the request's sectors (0, 0 for calls that have none). The rule belongs to
 * `settings` and lives as long as that reference. */
const struct fault *settings_strike(struct settings_source *source, const struct settings *settings,
                                    const char *function, const char *path, const char *transport,
                                    uint64_t start, uint64_t count);

/* Pure: parses `text` over the defaults. False leaves the reason in `why`. */
bool settings_parse(const char *text, struct settings *settings, char *why, size_t size);
void settings_defaults(struct settings *settings);
const struct profile *profile_named(const char *name); /* NULL when there is none */
const char *profile_name(unsigned index);              /* for listing; NULL past the last */

#endif
