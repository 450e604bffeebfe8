/* Bodies, and stream sockets that carry descriptors: see wire.h. */
#include "wire.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

#define NO_STRING UINT32_MAX /* the length that stands for NULL */
#define KERNEL_FDS_MAX 253   /* SCM_MAX_FD: what a peer could put into one message at most */

/* ---- bodies ---- */

void wire_body_free(struct wire_body *body)
{
    free(body->bytes);
    *body = (struct wire_body){0};
}

static bool make_room(struct wire_body *body, size_t count)
{
    if (body->failed || count > SIZE_MAX / 4 - body->used) {
        body->failed = true;
        return false;
    }
    size_t room = body->room ? body->room : 256;
    while (room < body->used + count)
        room *= 2;
    if (room == body->room)
        return true;
    char *bytes = realloc(body->bytes, room);
    if (!bytes) {
        body->failed = true;
        return false;
    }
    body->bytes = bytes;
    body->room = room;
    return true;
}

void wire_put_raw(struct wire_body *body, const void *bytes, size_t count)
{
    if (count && make_room(body, count)) {
        memcpy(body->bytes + body->used, bytes, count);
        body->used += count;
    }
}

void wire_put_u64(struct wire_body *body, uint64_t value)
{
    wire_put_raw(body, &value, sizeof value);
}

/* A length, then the characters with their NUL, so that a reader can point at them. */
void wire_put_str(struct wire_body *body, const char *text)
{
    size_t length = text ? strlen(text) : 0;
    if (length >= NO_STRING) {
        body->failed = true;
        return;
    }
    uint32_t announced = text ? (uint32_t)length : NO_STRING;
    wire_put_raw(body, &announced, sizeof announced);
    if (text)
        wire_put_raw(body, text, length + 1);
}

static const char *take(struct wire_reader *reader, size_t count)
{
    if (reader->failed || reader->left < count) {
        reader->failed = true;
        return NULL;
    }
    const char *bytes = reader->bytes;
    reader->bytes += count;
    reader->left -= count;
    return bytes;
}

uint64_t wire_take_u64(struct wire_reader *reader)
{
    uint64_t value = 0;
    const char *bytes = take(reader, sizeof value);
    if (bytes)
        memcpy(&value, bytes, sizeof value);
    return value;
}

const char *wire_take_str(struct wire_reader *reader)
{
    uint32_t length;
    const char *bytes = take(reader, sizeof length);
    if (!bytes)
        return NULL;
    memcpy(&length, bytes, sizeof length);
    if (length == NO_STRING)
        return NULL;
    const char *text = take(reader, (size_t)length + 1);
    if (text && memchr(text, 0, (size_t)length + 1) != text + length) {
        reader->failed = true; /* no NUL at its end, or one before */
        return NULL;
    }
    return text;
}

/* ---- sending ---- */

union fd_message { /* for its alignment */
    struct cmsghdr header;
    char room[CMSG_SPACE(sizeof(int) * KERNEL_FDS_MAX)];
};

static void attach(struct msghdr *message, union fd_message *control, const int *fds,
                   unsigned count)
{
    if (!count)
        return;
    message->msg_control = control;
    message->msg_controllen = CMSG_SPACE(sizeof(int) * count);
    struct cmsghdr *header = CMSG_FIRSTHDR(message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int) * count);
    memcpy(CMSG_DATA(header), fds, sizeof(int) * count);
}

static void drop_sent(struct msghdr *message, size_t sent)
{
    while (message->msg_iovlen && sent >= message->msg_iov->iov_len) {
        sent -= message->msg_iov->iov_len;
        message->msg_iov++;
        message->msg_iovlen--;
    }
    if (message->msg_iovlen) {
        message->msg_iov->iov_base = (char *)message->msg_iov->iov_base + sent;
        message->msg_iov->iov_len -= sent;
    }
}

/* The pieces straight from where they lie; the descriptors go with their first byte. */
static int send_pieces(int socket, struct iovec *pieces, size_t count, const int *fds,
                       unsigned fd_count)
{
    union fd_message control;
    memset(&control, 0, sizeof control);
    struct msghdr message = {.msg_iov = pieces, .msg_iovlen = count};
    attach(&message, &control, fds, fd_count);
    drop_sent(&message, 0); /* empty pieces */
    while (message.msg_iovlen) {
        ssize_t sent = sendmsg(socket, &message, MSG_NOSIGNAL);
        if (sent < 0) {
            if (errno == EINTR)
                continue;
            return -1;
        }
        drop_sent(&message, (size_t)sent);
        message.msg_control = NULL;
        message.msg_controllen = 0;
    }
    return 0;
}

int wire_send(int socket, const void *head, size_t head_size, const void *body, size_t body_size,
              const int *fds, unsigned fd_count)
{
    if (fd_count && !head_size && !body_size) {
        errno = EINVAL; /* no byte to travel with */
        return -1;
    }
    struct iovec pieces[] = {{(void *)head, head_size}, {(void *)body, body_size}};
    unsigned batch = fd_count < WIRE_FDS_MAX ? fd_count : WIRE_FDS_MAX;
    if (send_pieces(socket, pieces, 2, fds, batch) < 0)
        return -1;
    for (unsigned done = batch; done < fd_count; done += batch) {
        batch = fd_count - done < WIRE_FDS_MAX ? fd_count - done : WIRE_FDS_MAX;
        struct iovec more = {(void *)"+", 1};
        if (send_pieces(socket, &more, 1, fds + done, batch) < 0)
            return -1;
    }
    return 0;
}

/* ---- receiving ---- */

static void collect(struct msghdr *message, int *fds, unsigned *fd_count, unsigned fd_room)
{
    for (struct cmsghdr *header = CMSG_FIRSTHDR(message); header;
         header = CMSG_NXTHDR(message, header)) {
        if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS)
            continue;
        size_t count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < count; i++) {
            int fd;
            memcpy(&fd, CMSG_DATA(header) + i * sizeof(int), sizeof fd);
            if (fds && fd_count && *fd_count < fd_room)
                fds[(*fd_count)++] = fd;
            else
                close(fd);
        }
    }
}

/* The kernel never joins two messages with descriptors into one answer, so one control buffer of
 * the greatest size is enough for each call. */
static ssize_t receive_some(int socket, void *buffer, size_t size, int *fds, unsigned *fd_count,
                            unsigned fd_room)
{
    union fd_message control;
    struct iovec piece = {buffer, size};
    struct msghdr message = {.msg_iov = &piece,
                             .msg_iovlen = 1,
                             .msg_control = &control,
                             .msg_controllen = sizeof control};
    ssize_t got;
    do
        got = recvmsg(socket, &message, MSG_CMSG_CLOEXEC);
    while (got < 0 && errno == EINTR);
    if (got < 0)
        return -1;
    collect(&message, fds, fd_count, fd_room);
    if (message.msg_flags & MSG_CTRUNC) {
        errno = EMFILE; /* this process may have no more: some are lost, and it must not wait for them */
        return -1;
    }
    return got;
}

int wire_receive(int socket, void *buffer, size_t size, int *fds, unsigned *fd_count,
                 unsigned fd_room)
{
    for (size_t done = 0; done < size;) {
        ssize_t got = receive_some(socket, (char *)buffer + done, size - done, fds, fd_count, fd_room);
        if (got < 0)
            return -1;
        if (got == 0) {
            if (done == 0)
                return 0;
            errno = ECONNRESET;
            return -1;
        }
        done += (size_t)got;
    }
    return 1;
}

/* ---- addresses ---- */

/* A socket's address has room for some 100 characters only. For a longer path the folder's descriptor
 * stands for it, through /proc: not always, because a process that must not be dumped may not look
 * there. False with errno. */
static bool address_in(const char *path, int folder, const char *name, struct sockaddr_un *address)
{
    *address = (struct sockaddr_un){.sun_family = AF_UNIX};
    char *to = address->sun_path;
    int length = snprintf(to, sizeof address->sun_path, "%s/%s", path, name);
    if (length < 0 || (size_t)length >= sizeof address->sun_path)
        length = snprintf(to, sizeof address->sun_path, "/proc/self/fd/%d/%s", folder, name);
    if (length < 0 || (size_t)length >= sizeof address->sun_path) {
        errno = ENAMETOOLONG;
        return false;
    }
    return true;
}

static int fail_with_closed(int fd, int other)
{
    int error = errno;
    if (fd >= 0)
        close(fd);
    if (other >= 0)
        close(other);
    errno = error;
    return -1;
}

static int connect_in(const char *path, int folder, const char *name)
{
    struct sockaddr_un address;
    if (!address_in(path, folder, name, &address))
        return -1;
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return -1;
    int failed;
    do
        failed = connect(fd, (struct sockaddr *)&address, sizeof address);
    while (failed && errno == EINTR);
    return failed ? fail_with_closed(fd, -1) : fd;
}

int wire_connect(const char *folder, const char *name)
{
    int place = open(folder, O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (place < 0)
        return -1;
    int fd = connect_in(folder, place, name);
    if (fd < 0) {
        if (errno == ENOENT)
            errno = ECONNREFUSED; /* the folder is there, but nobody has ever listened in it */
        return fail_with_closed(place, -1);
    }
    close(place);
    return fd;
}

/* Under a name of its own until it listens: whoever finds the socket `name` can connect to it. */
static int listen_in(const char *path, int folder, const char *name)
{
    char temporary[64];
    struct sockaddr_un address;
    snprintf(temporary, sizeof temporary, "%.40s.%d", name, (int)getpid());
    if (!address_in(path, folder, temporary, &address))
        return -1;
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return -1;
    unlinkat(folder, temporary, 0);
    if (bind(fd, (struct sockaddr *)&address, sizeof address) < 0)
        return fail_with_closed(fd, -1);
    if (listen(fd, SOMAXCONN) < 0 || renameat(folder, temporary, folder, name) < 0) {
        int error = errno;
        unlinkat(folder, temporary, 0);
        errno = error;
        return fail_with_closed(fd, -1);
    }
    return fd;
}

int wire_listen(const char *folder, const char *name)
{
    if (mkdir(folder, 0777) < 0 && errno != EEXIST)
        return -1;
    int place = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (place < 0)
        return -1;
    /* Two that start at once must not both find the place free; the lock goes with `place`. */
    while (flock(place, LOCK_EX) < 0)
        if (errno != EINTR)
            return fail_with_closed(place, -1);
    int served = connect_in(folder, place, name);
    if (served >= 0) {
        errno = EADDRINUSE;
        return fail_with_closed(place, served);
    }
    int fd = listen_in(folder, place, name);
    if (fd < 0)
        return fail_with_closed(place, -1);
    close(place);
    return fd;
}
