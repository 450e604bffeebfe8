/* The wire between the library and the host, and the log of events. `wire TEST FOLDER` runs one test
 * in a folder of its own. */
#include "wire.h"

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "events.h"

#define MANY_FDS 150
#define BIG (24u << 20)

static const char *folder;

static unsigned open_fds(void)
{
    unsigned count = 0;
    for (int fd = 0; fd < 1000; fd++)
        count += fcntl(fd, F_GETFD) >= 0;
    return count;
}

static void test_bodies(void)
{
    struct wire_body body = {0};
    wire_put_u64(&body, 1);
    wire_put_str(&body, "a string");
    wire_put_str(&body, NULL);
    wire_put_str(&body, "");
    for (unsigned i = 0; i < 1000; i++)
        wire_put_u64(&body, i);
    CHECK(!body.failed);
    struct wire_reader reader = {body.bytes, body.used, false};
    CHECK(wire_take_u64(&reader) == 1);
    CHECK_TEXT(wire_take_str(&reader), "a string");
    CHECK(wire_take_str(&reader) == NULL && !reader.failed);
    CHECK_TEXT(wire_take_str(&reader), "");
    for (unsigned i = 0; i < 1000; i++)
        CHECK(wire_take_u64(&reader) == i);
    CHECK(reader.left == 0 && !reader.failed);
    CHECK(wire_take_u64(&reader) == 0 && reader.failed && wire_take_str(&reader) == NULL);
    /* Cut anywhere, it never gives more than there is (AddressSanitizer watches). */
    for (size_t cut = 0; cut < 40; cut++) {
        char *copy = malloc(cut ? cut : 1);
        CHECK(copy);
        memcpy(copy, body.bytes, cut);
        reader = (struct wire_reader){copy, cut, false};
        wire_take_u64(&reader);
        for (int i = 0; i < 5; i++)
            wire_take_str(&reader);
        CHECK(reader.failed);
        free(copy);
    }
    body.bytes[14] = 0; /* a NUL inside the string */
    reader = (struct wire_reader){body.bytes, body.used, false};
    wire_take_u64(&reader);
    CHECK(wire_take_str(&reader) == NULL && reader.failed);
    wire_body_free(&body);
    CHECK(!body.bytes && !body.used);
}

static void test_fds(void)
{
    int ends[2], sent[MANY_FDS], got[MANY_FDS];
    struct stat one, other;
    unsigned before = open_fds(), count = 0;
    struct wire_reply head = {.op = 5, .fds = MANY_FDS, .body = 4}, answer;
    char body[4], plus;
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0);
    for (int i = 0; i < MANY_FDS; i++)
        CHECK((sent[i] = memfd_create("x", 0)) >= 0);
    CHECK(wire_send(ends[0], &head, sizeof head, "body", 4, sent, MANY_FDS) == 0);
    CHECK(wire_receive(ends[1], &answer, sizeof answer, got, &count, MANY_FDS) == 1);
    CHECK(answer.fds == MANY_FDS && count == WIRE_FDS_MAX);
    CHECK(wire_receive(ends[1], body, sizeof body, got, &count, MANY_FDS) == 1);
    CHECK(!memcmp(body, "body", 4) && count == WIRE_FDS_MAX);
    while (count < answer.fds)
        CHECK(wire_receive(ends[1], &plus, 1, got, &count, MANY_FDS) == 1 && plus == '+');
    for (int i = 0; i < MANY_FDS; i++) {
        CHECK(fstat(sent[i], &one) == 0 && fstat(got[i], &other) == 0);
        CHECK(one.st_ino == other.st_ino && (fcntl(got[i], F_GETFD) & FD_CLOEXEC));
        close(got[i]);
    }
    /* Without room they are closed, not leaked. */
    unsigned with = open_fds();
    CHECK(wire_send(ends[0], "x", 1, NULL, 0, sent, 3) == 0);
    count = 0;
    CHECK(wire_receive(ends[1], &plus, 1, got, &count, 1) == 1 && count == 1 && plus == 'x');
    close(got[0]);
    CHECK(wire_send(ends[0], "x", 1, NULL, 0, sent, 3) == 0);
    CHECK(wire_receive(ends[1], &plus, 1, NULL, NULL, 0) == 1 && open_fds() == with);
    CHECK(wire_send(ends[0], NULL, 0, NULL, 0, sent, 3) < 0 && errno == EINVAL);
    for (int i = 0; i < MANY_FDS; i++)
        close(sent[i]);
    close(ends[0]);
    close(ends[1]);
    CHECK_NUMBER(open_fds(), before);
}

/* A process that may have no more descriptors is told so; it does not wait for those it lost. */
static void test_too_many_fds(void)
{
    int ends[2], got[8];
    unsigned count = 0;
    char byte;
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0);
    int sent[] = {ends[0], ends[0], ends[0], ends[0]};
    CHECK(wire_send(ends[0], "x", 1, NULL, 0, sent, 4) == 0);
    struct rlimit before, low;
    CHECK(getrlimit(RLIMIT_NOFILE, &before) == 0);
    low = before;
    low.rlim_cur = (rlim_t)ends[1] + 2;
    CHECK(setrlimit(RLIMIT_NOFILE, &low) == 0);
    CHECK(wire_receive(ends[1], &byte, 1, got, &count, 8) < 0 && errno == EMFILE);
    CHECK(setrlimit(RLIMIT_NOFILE, &before) == 0);
}

struct transfer {
    int socket;
    char *bytes;
};

static void *sender(void *data)
{
    struct transfer *transfer = data;
    uint64_t head = BIG;
    CHECK(wire_send(transfer->socket, &head, sizeof head, transfer->bytes, BIG, NULL, 0) == 0);
    return NULL;
}

static void nothing(int number)
{
    (void)number;
}

/* Much more than a socket holds, with signals that interrupt both ends. */
static void test_big(void)
{
    int ends[2];
    pthread_t thread;
    uint64_t head;
    struct sigaction action = {.sa_handler = nothing}; /* without SA_RESTART */
    struct itimerval often = {{0, 1000}, {0, 1000}}, never = {{0, 0}, {0, 0}};
    char *bytes = malloc(BIG), *copy = malloc(BIG);
    CHECK(bytes && copy && socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0);
    for (uint32_t i = 0; i < BIG / 4; i++)
        memcpy(bytes + i * 4, &i, 4);
    struct transfer transfer = {ends[0], bytes};
    CHECK(sigaction(SIGALRM, &action, NULL) == 0 && setitimer(ITIMER_REAL, &often, NULL) == 0);
    CHECK(pthread_create(&thread, NULL, sender, &transfer) == 0);
    usleep(20000); /* interrupted too */
    CHECK(wire_receive(ends[1], &head, sizeof head, NULL, NULL, 0) == 1 && head == BIG);
    CHECK(wire_receive(ends[1], copy, BIG, NULL, NULL, 0) == 1);
    CHECK(setitimer(ITIMER_REAL, &never, NULL) == 0 && pthread_join(thread, NULL) == 0);
    CHECK(!memcmp(bytes, copy, BIG));
    free(bytes);
    free(copy);
}

static void test_dead_peer(void)
{
    int ends[2];
    char buffer[8];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0);
    CHECK(wire_send(ends[0], "half", 4, NULL, 0, NULL, 0) == 0 && close(ends[0]) == 0);
    CHECK(wire_receive(ends[1], buffer, 8, NULL, NULL, 0) < 0 && errno == ECONNRESET);
    CHECK(wire_receive(ends[1], buffer, 8, NULL, NULL, 0) == 0);
    /* No SIGPIPE: this process is still there to see the error. */
    CHECK(wire_send(ends[1], "more", 4, NULL, 0, NULL, 0) < 0 && errno == EPIPE);
    close(ends[1]);
    /* A peer that is killed while it owes the rest. */
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0);
    pid_t child = fork();
    CHECK(child >= 0);
    if (!child) {
        close(ends[1]);
        CHECK(wire_send(ends[0], "12345", 5, NULL, 0, NULL, 0) == 0);
        raise(SIGKILL);
    }
    close(ends[0]);
    CHECK(wire_receive(ends[1], buffer, 8, NULL, NULL, 0) < 0 && errno == ECONNRESET);
    CHECK(waitpid(child, NULL, 0) == child);
}

static void test_addresses(void)
{
    char place[2000];
    size_t used = (size_t)snprintf(place, sizeof place, "%s/", folder);
    memset(place + used, 'x', 200); /* more than a socket's address holds */
    snprintf(place + used + 200, sizeof place - used - 200, "/.sim");
    CHECK(wire_connect(place, "nfc.sock") < 0 && errno == ENOENT);
    CHECK(wire_listen(place, "nfc.sock") < 0 && errno == ENOENT);
    place[used + 200] = 0;
    CHECK(mkdir(place, 0700) == 0);
    place[used + 200] = '/';
    CHECK(wire_connect(place, "nfc.sock") < 0 && errno == ENOENT);
    int listener = wire_listen(place, "nfc.sock"); /* makes the folder */
    CHECK(listener >= 0);
    CHECK(wire_connect(place, "vim.sock") < 0 && errno == ECONNREFUSED);
    int client = wire_connect(place, "nfc.sock");
    int server = accept(listener, NULL, NULL);
    char buffer[2];
    CHECK(client >= 0 && server >= 0 && wire_send(client, "hi", 2, NULL, 0, NULL, 0) == 0);
    CHECK(wire_receive(server, buffer, 2, NULL, NULL, 0) == 1 && !memcmp(buffer, "hi", 2));
    CHECK(wire_listen(place, "nfc.sock") < 0 && errno == EADDRINUSE);
    close(listener); /* the socket stays as a file that nobody serves */
    CHECK(wire_connect(place, "nfc.sock") < 0 && errno == ECONNREFUSED);
    CHECK((listener = wire_listen(place, "nfc.sock")) >= 0);
    CHECK((client = wire_connect(place, "nfc.sock")) >= 0);
}

static void test_quote(void)
{
    char buffer[32], small[8];
    CHECK_TEXT(events_quote("plain", buffer, sizeof buffer), "plain");
    CHECK_TEXT(events_quote(NULL, buffer, sizeof buffer), "-");
    CHECK_TEXT(events_quote("-", buffer, sizeof buffer), "\"-\"");
    CHECK_TEXT(events_quote("", buffer, sizeof buffer), "\"\"");
    CHECK_TEXT(events_quote("a b", buffer, sizeof buffer), "\"a b\"");
    CHECK_TEXT(events_quote("a\"\\", buffer, sizeof buffer), "\"a\\\"\\\\\"");
    CHECK_TEXT(events_quote("a\nb", buffer, sizeof buffer), "\"a?b\"");
    CHECK_TEXT(events_quote("longer than that", small, sizeof small), "\"longe\"");
    CHECK_TEXT(events_quote("\"\"\"\"\"\"", small, sizeof small), "\"\\\"\\\"\"");
    CHECK_TEXT(events_quote("abcdefghij", small, sizeof small), "abcdefg");
    for (unsigned size = 1; size < 8; size++)
        CHECK(strlen(events_quote("a b\"c", small, size)) < size);
}

static void test_events(void)
{
    char place[2000], path[2100], line[8192], text[6000];
    snprintf(place, sizeof place, "%s/.sim", folder);
    snprintf(path, sizeof path, "%s/events.log", place);
    for (int i = 0; i < 4; i++) {
        pid_t child = fork();
        CHECK(child >= 0);
        if (child)
            continue;
        struct events *events = events_open(place); /* makes the folder, whoever is first */
        CHECK(events);
        errno = 77;
        for (int n = 0; n < 500; n++)
            events_note(events, "read", "n=%d path=%s", n, "x");
        CHECK(errno == 77);
        events_close(events);
        _exit(0);
    }
    for (int i = 0, status; i < 4; i++)
        CHECK(wait(&status) > 0 && status == 0);
    struct events *events = events_open(place);
    memset(text, 'x', sizeof text - 1);
    text[sizeof text - 1] = 0;
    events_note(events, "long", "text=%s", text); /* is cut, and still one line */
    events_note(events, "two", "text=%s", "a\nb");
    events_note(events, "bare", "%s", "");
    events_note(NULL, "nowhere", "n=%d", 1);
    events_close(events);
    events_close(NULL);
    CHECK(!events_open("/proc/nowhere"));
    FILE *file = fopen(path, "r");
    unsigned counts[3] = {0}, lines = 0;
    CHECK(file);
    for (; fgets(line, sizeof line, file); lines++) {
        long long seconds;
        int pid, n;
        char name[8], tail[8] = "";
        CHECK(line[strlen(line) - 1] == '\n');
        CHECK(sscanf(line, "%lld.%*6d %d %7s", &seconds, &pid, name) == 3 && pid > 0);
        if (sscanf(line, "%*s %*s read n=%d path=%7s", &n, tail) == 2 && !strcmp(tail, "x"))
            counts[0]++;
        counts[1] += !strcmp(name, "long") && strlen(line) < 4097;
        counts[2] += strstr(line, " two text=a b\n") != NULL;
    }
    CHECK(counts[0] == 2000 && counts[1] == 1 && counts[2] == 1 && lines == 2003);
    fclose(file);
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        void (*run)(void);
    } tests[] = {
        {"bodies", test_bodies},       {"fds", test_fds},
        {"too_many_fds", test_too_many_fds}, {"big", test_big},
        {"dead_peer", test_dead_peer}, {"addresses", test_addresses},
        {"quote", test_quote},         {"events", test_events},
    };
    CHECK(argc == 3);
    folder = argv[2];
    for (size_t i = 0; i < sizeof tests / sizeof *tests; i++)
        if (!strcmp(tests[i].name, argv[1])) {
            tests[i].run();
            return 0;
        }
    CHECK(!"a known test");
}
