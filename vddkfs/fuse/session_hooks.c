/*
 * What pyfuse3 does not reach: lseek, the INIT negotiation, a non-blocking /dev/fuse, direct writes in
 * parallel, and having the kernel forget a part of a file's pages.
 *
 * This module is loaded RTLD_GLOBAL before pyfuse3, so that the dynamic linker binds pyfuse3's calls
 * of fuse_session_new, fuse_session_receive_buf, fuse_reply_open and fuse_session_destroy to the
 * functions below. They complete the table of operations that pyfuse3 hands in, remember the session,
 * and go on to libfuse's own function of that name.
 *
 * libfuse 3.17 renamed the symbol behind fuse_session_new to fuse_session_new_versioned; which of the
 * two pyfuse3 asks for depends on the headers that it was built with, so both are here.
 */

#define _GNU_SOURCE
#ifndef FUSE_USE_VERSION
#define FUSE_USE_VERSION 34
#endif
#include <fuse_lowlevel.h>

#include <dlfcn.h>
#include <linux/fuse.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

#undef fuse_session_new

#define EXPORT __attribute__((visibility("default")))

struct libfuse_version;

/* Implemented in Python (cffi's extern "Python"); called on the thread that runs the session. */
static void vddkfs_on_lseek(uint64_t req, uint64_t ino, uint64_t fh, int64_t offset, int whence);

static unsigned wanted_background = 0;
static int keep_auto_inval = 1;
static void (*next_init)(void *userdata, struct fuse_conn_info *conn) = NULL;

/* What the kernel agreed to, for status: max_background, max_readahead, max_write, capable, want. */
static unsigned agreed[5];

static void init_hook(void *userdata, struct fuse_conn_info *conn)
{
    if (next_init != NULL)
        next_init(userdata, conn);
    if (wanted_background != 0) {
        conn->max_background = wanted_background;
        conn->congestion_threshold = wanted_background - wanted_background / 4;
    }
    if (!keep_auto_inval) {
#if defined(FUSE_VERSION) && FUSE_VERSION >= FUSE_MAKE_VERSION(3, 17)
        fuse_unset_feature_flag(conn, FUSE_CAP_AUTO_INVAL_DATA);
#else
        conn->want &= ~(unsigned)FUSE_CAP_AUTO_INVAL_DATA;
#endif
    }
    agreed[0] = conn->max_background;
    agreed[1] = conn->max_readahead;
    agreed[2] = conn->max_write;
    agreed[3] = (unsigned)conn->capable;
    agreed[4] = (unsigned)conn->want;
}

static void lseek_hook(fuse_req_t req, fuse_ino_t ino, off_t off, int whence,
                       struct fuse_file_info *fi)
{
    vddkfs_on_lseek((uint64_t)(uintptr_t)req, (uint64_t)ino, fi != NULL ? fi->fh : 0, (int64_t)off,
                    whence);
}

static void complete(struct fuse_lowlevel_ops *ops, const struct fuse_lowlevel_ops *given,
                     size_t given_size)
{
    memset(ops, 0, sizeof *ops);
    memcpy(ops, given, given_size < sizeof *ops ? given_size : sizeof *ops);
    next_init = ops->init;
    ops->init = init_hook;
    ops->lseek = lseek_hook;
}

/*
 * The session, for notifications. They are made by other threads than the one that ends it, and may
 * wait in the kernel for longer than anybody waits for them: the session must outlive them.
 */
static pthread_mutex_t session_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t session_left = PTHREAD_COND_INITIALIZER;
static struct fuse_session *session = NULL;
static unsigned notifying = 0;

/* How long the end of the session waits for notifications that are under way. */
#define LEAVE_SECONDS 2

static struct fuse_session *remember(struct fuse_session *made)
{
    pthread_mutex_lock(&session_lock);
    session = made;
    pthread_mutex_unlock(&session_lock);
    return made;
}

static int notify_inode(uint64_t ino, int64_t offset, int64_t length)
{
    struct fuse_session *se;
    int res;

    pthread_mutex_lock(&session_lock);
    se = session;
    if (se != NULL)
        notifying++;
    pthread_mutex_unlock(&session_lock);
    if (se == NULL)
        return -ENOTCONN;
    res = fuse_lowlevel_notify_inval_inode(se, (fuse_ino_t)ino, (off_t)offset, (off_t)length);
    pthread_mutex_lock(&session_lock);
    notifying--;
    pthread_cond_broadcast(&session_left);
    pthread_mutex_unlock(&session_lock);
    return res;
}

typedef void session_destroy_fn(struct fuse_session *);

EXPORT void fuse_session_destroy(struct fuse_session *se)
{
    session_destroy_fn *next = (session_destroy_fn *)dlsym(RTLD_NEXT, "fuse_session_destroy");
    struct timespec until;
    unsigned left;
    int timed_out = 0;

    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += LEAVE_SECONDS;
    pthread_mutex_lock(&session_lock);
    if (session == se)
        session = NULL;
    while (notifying != 0 && !timed_out)
        timed_out = pthread_cond_timedwait(&session_left, &session_lock, &until) == ETIMEDOUT;
    left = notifying;
    pthread_mutex_unlock(&session_lock);
    /* What a notification still uses is left to the end of the process. */
    if (next != NULL && left == 0)
        next(se);
}

typedef struct fuse_session *session_new_fn(struct fuse_args *, const struct fuse_lowlevel_ops *,
                                            size_t, void *);
typedef struct fuse_session *session_new_versioned_fn(struct fuse_args *,
                                                      const struct fuse_lowlevel_ops *, size_t,
                                                      struct libfuse_version *, void *);
typedef int receive_fn(struct fuse_session *, struct fuse_buf *);

EXPORT struct fuse_session *fuse_session_new(struct fuse_args *args,
                                             const struct fuse_lowlevel_ops *op, size_t op_size,
                                             void *userdata)
{
    session_new_fn *next = (session_new_fn *)dlsym(RTLD_NEXT, "fuse_session_new");
    struct fuse_lowlevel_ops ops;

    if (next == NULL)
        return NULL;
    complete(&ops, op, op_size);
    return remember(next(args, &ops, sizeof ops, userdata));
}

EXPORT struct fuse_session *fuse_session_new_versioned(struct fuse_args *args,
                                                       const struct fuse_lowlevel_ops *op,
                                                       size_t op_size,
                                                       struct libfuse_version *version,
                                                       void *userdata)
{
    session_new_versioned_fn *next =
        (session_new_versioned_fn *)dlsym(RTLD_NEXT, "fuse_session_new_versioned");
    struct fuse_lowlevel_ops ops;

    if (next == NULL)
        return NULL;
    complete(&ops, op, op_size);
    return remember(next(args, &ops, sizeof ops, version, userdata));
}

/*
 * A request withdrawn between readiness and receipt would leave a blocking read of /dev/fuse, and
 * with it the whole daemon, asleep until the next request. On a non-blocking descriptor the read
 * says EAGAIN instead, which pyfuse3 takes for the end of the mount; EINTR makes it look again.
 */
EXPORT int fuse_session_receive_buf(struct fuse_session *se, struct fuse_buf *buf)
{
    static receive_fn *next = NULL;
    static int ready_fd = -1;
    int fd = fuse_session_fd(se);
    int res;

    if (next == NULL)
        next = (receive_fn *)dlsym(RTLD_NEXT, "fuse_session_receive_buf");
    if (next == NULL)
        return -ENOSYS;
    if (fd != ready_fd) {
        int flags = fcntl(fd, F_GETFL);

        if (flags >= 0)
            fcntl(fd, F_SETFL, flags | O_NONBLOCK);
        ready_fd = fd;
    }
    res = next(se, buf);
    return res == -EAGAIN ? -EINTR : res;
}

/*
 * Files that bypass the kernel's pages are written by several writers at once. libfuse has a field for
 * that flag from 3.15 on, and pyfuse3 none, so the reply is made here: what libfuse would send, with
 * the flag added. Who opens such a file only to read is not concerned.
 */
#ifndef FOPEN_PARALLEL_DIRECT_WRITES
#define FOPEN_PARALLEL_DIRECT_WRITES (1 << 6)
#endif

struct open_reply {
    uint64_t fh;
    uint32_t open_flags;
    uint32_t backing_id;
};

typedef int reply_open_fn(fuse_req_t, const struct fuse_file_info *);

EXPORT int fuse_reply_open(fuse_req_t req, const struct fuse_file_info *fi)
{
    reply_open_fn *next = (reply_open_fn *)dlsym(RTLD_NEXT, "fuse_reply_open");
    struct open_reply reply = {.fh = fi->fh};

    if (!fi->direct_io && next != NULL)
        return next(req, fi);
    reply.open_flags = fi->direct_io ? FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES : 0;
    if (fi->keep_cache)
        reply.open_flags |= FOPEN_KEEP_CACHE;
    if (fi->nonseekable)
        reply.open_flags |= FOPEN_NONSEEKABLE;
    return fuse_reply_buf(req, (const char *)&reply, sizeof reply);
}

static void set_wanted(unsigned background, int auto_inval)
{
    wanted_background = background;
    keep_auto_inval = auto_inval;
}

static unsigned agreed_value(int which)
{
    return which >= 0 && which < 5 ? agreed[which] : 0;
}

static int reply_lseek(uint64_t req, int64_t offset)
{
    return fuse_reply_lseek((fuse_req_t)(uintptr_t)req, (off_t)offset);
}

static int reply_error(uint64_t req, int error)
{
    return fuse_reply_err((fuse_req_t)(uintptr_t)req, error);
}

static const char *library_version(void)
{
    return fuse_pkgversion();
}
