/*
 * vixsim-probe's insides. A question is a function that runs in a process of its own, asks the
 * library, and gives its answer as keys with values; each is sent to the parent at once, so that a
 * question that crashes or hangs has still told what it knew.
 */
#ifndef SIMULATOR_PROBE_H
#define SIMULATOR_PROBE_H

#include "kit.h"

/* What the probe may use: the command line. NULL where not given. */
struct target {
    struct login login;
    const char *libdir, *snapshot, *disk, *other_disk, *transports;
    double seconds;        /* for a question */
    unsigned idle_seconds; /* how long the question `idle` waits; 0: it is not asked */
    bool allow_hotadd;     /* the disk may be attached to this machine */
};
extern struct target target;

enum need { NEEDS_LIBRARY, NEEDS_SERVER, NEEDS_DISK };

struct question {
    const char *name;
    enum need need;
    const char *asks; /* the question, for a reader */
    void (*ask)(const char *argument);
    const char *argument;
};

/* Each ends with an entry without a name. */
extern const struct question library_questions[], connection_questions[], reading_questions[],
    abuse_questions[], block_questions[], metadata_questions[];

/* ---- answers (probe_answer.c) ---- */

void answer_to(int fd); /* where the parent listens */
void answer_number(const char *key, long long value);
void answer_real(const char *key, double value); /* seconds */
void answer_bool(const char *key, bool value);
void answer_text(const char *key, const char *text); /* NULL is null; a secret in it is struck out */
void answer_error(const char *key, VixError error);  /* the code; all of the value where that is more */

/* How many of the forms (plain, URL-encoded, base64) of the password are in `text`. */
bool holds_secret(const char *text);

/* ---- sessions (probe_session.c) ---- */

extern struct kit vix;

/* What the library logged in this process. */
struct log_counts {
    unsigned lines[3], secrets[3], phone_home[3]; /* by callback: log, warn, panic */
};
extern struct log_counts logged;

void probe_log(const char *format, va_list values);
void probe_warn(const char *format, va_list values);
void probe_panic(const char *format, va_list values);

bool load(void); /* false: the answer says why */
VixError initialise_as(unsigned major, unsigned minor, const char *config);
bool initialise(const char *config); /* load(), then as the newest version that is accepted */

/* How a disk is opened: as the command line says, but for what a question changes. */
struct access {
    struct login login;
    const char *snapshot, *transports, *path;
    bool read_only; /* of ConnectEx */
    uint32_t flags;
    bool tell; /* answer with the codes and the times of each step */
};

struct session {
    VixDiskLibConnection connection;
    VixDiskLibHandle handle;
    uint64_t sectors;
};

struct access usual_access(void);
bool connect_as(const struct access *access, struct session *session);
bool open_as(const struct access *access, struct session *session); /* after connect_as() */
void close_session(struct session *session, bool tell);
/* initialise(), connect_as() and open_as() as usual; false: the answer says where it ended. */
bool usual_session(struct session *session);

/* ---- asynchronous reads (probe_session.c) ---- */

struct read {
    uint8_t *buffer;
    VixError returned, completed;
    bool called;        /* the callback came */
    bool inside;        /* before ReadAsync had returned */
    int thread;         /* on which it came */
    unsigned order;     /* 1 for the first to complete */
    double started, ended;
};

/* Starts a read whose callback fills the record in. */
void read_async(const struct session *session, struct read *read, uint64_t start, uint64_t count);
/* Waits until `count` callbacks came in this process, or a few seconds. */
bool wait_for_callbacks(unsigned count);
unsigned callbacks_seen(void);
uint8_t *aligned_buffer(size_t bytes); /* never NULL: without memory the question ends */
int this_thread(void);

#endif
