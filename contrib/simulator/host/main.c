/* vixsim-host: the vCenter and the ESXi hosts of one site. */
#include <errno.h>
#include <fcntl.h>
#include <malloc.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/file.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "../common/wire.h"
#include "attachments.h"
#include "devices.h"
#include "locks.h"
#include "site.h"

static const char usage[] =
    "usage: vixsim-host SITE [--pid-file FILE]\n"
    "\n"
    "Serves SITE, a folder that stands for a vCenter, its ESXi hosts and their datastores, to\n"
    "the simulated libvixDiskLib. It stays in the foreground, prints `ready` when clients can\n"
    "connect, and ends with SIGTERM or SIGINT.\n"
    "\n"
    "  SITE/registry.conf    virtual machines, snapshots, hosts, datastores\n"
    "  SITE/DATASTORE/...    the files of a datastore\n"
    "  SITE/sim.conf         how fast it is and how it misbehaves; read again when it changes\n"
    "  SITE/.sim/            sockets, events.log, attachments: what goes on and what is left\n"
    "\n"
    "  --pid-file FILE       the process id is written there, and the file removed at the end\n"
    "  --help                this text\n";

struct host {
    struct site site;
    struct watch vim, nfc, signals;
    int lock;
    const char *pid_file;
};

/* ---- what wakes the loop ---- */

static void accept_all(struct site *site, struct watch *watch,
                       void (*accepted)(struct site *site, int socket))
{
    for (;;) {
        int socket = accept4(watch->fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
        if (socket >= 0) {
            accepted(site, socket);
            continue;
        }
        if (errno == EINTR || errno == ECONNABORTED)
            continue;
        /* Without descriptors: those who wait are served when some were closed. The clock's ticks
         * bring the loop back here; until then it would only spin. */
        if (errno == EMFILE || errno == ENFILE)
            usleep(1000);
        return;
    }
}

static void vim_ready(struct watch *watch, uint32_t events)
{
    (void)events;
    accept_all(&LIST_OF(watch, struct host, vim)->site, watch, vim_accept);
}

static void nfc_ready(struct watch *watch, uint32_t events)
{
    (void)events;
    accept_all(&LIST_OF(watch, struct host, nfc)->site, watch, nfc_accept);
}

static void signal_ready(struct watch *watch, uint32_t events)
{
    (void)events;
    struct signalfd_siginfo info;
    if (read(watch->fd, &info, sizeof info) == (ssize_t)sizeof info)
        loop_stop(&LIST_OF(watch, struct host, signals)->site.loop);
}

/* ---- beginning ---- */

static bool complain(const char *what)
{
    fprintf(stderr, "vixsim-host: %s: %s\n", what, strerror(errno));
    return false;
}

/* One host process for a site: what it knows of locks and sessions is in its memory. */
static bool lock_site(struct host *host)
{
    char path[SITE_PATH_MAX + 16];
    snprintf(path, sizeof path, "%s/host.lock", host->site.state_folder);
    host->lock = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (host->lock < 0)
        return complain(path);
    if (flock(host->lock, LOCK_EX | LOCK_NB) == 0)
        return true;
    if (errno != EWOULDBLOCK)
        return complain(path);
    fprintf(stderr, "vixsim-host: %s is served by another host process\n", host->site.folder);
    return false;
}

static bool listen_at(struct host *host, struct watch *watch, const char *name,
                      void (*ready)(struct watch *watch, uint32_t events))
{
    *watch = (struct watch){.fd = wire_listen(host->site.state_folder, name), .ready = ready};
    if (watch->fd < 0)
        return complain(name);
    fcntl(watch->fd, F_SETFL, fcntl(watch->fd, F_GETFL) | O_NONBLOCK);
    return loop_watch(&host->site.loop, watch, EPOLLIN) || complain(name);
}

static bool catch_signals(struct host *host)
{
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGTERM);
    sigaddset(&signals, SIGINT);
    sigprocmask(SIG_BLOCK, &signals, NULL);
    signal(SIGPIPE, SIG_IGN);
    host->signals = (struct watch){.fd = signalfd(-1, &signals, SFD_CLOEXEC | SFD_NONBLOCK),
                                   .ready = signal_ready};
    return (host->signals.fd >= 0 && loop_watch(&host->site.loop, &host->signals, EPOLLIN)) ||
           complain("signals");
}

static bool write_pid(const struct host *host)
{
    if (host->pid_file == NULL)
        return true;
    FILE *file = fopen(host->pid_file, "we");
    if (file == NULL)
        return complain(host->pid_file);
    fprintf(file, "%ld\n", (long)getpid());
    return fclose(file) == 0 || complain(host->pid_file);
}

static void prepare_process(void)
{
    struct rlimit files;
    prctl(PR_SET_TIMERSLACK, 1);
    /* The bodies of writes come and go by the megabyte: they must not be mapped anew each time. */
    mallopt(M_MMAP_THRESHOLD, 32 << 20);
    mallopt(M_TRIM_THRESHOLD, 256 << 20);
    if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
        files.rlim_cur = files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files);
    }
}

static bool begin(struct host *host, const char *folder)
{
    char quoted[SITE_PATH_MAX];
    prepare_process();
    host->lock = host->vim.fd = host->nfc.fd = host->signals.fd = -1;
    if (!site_init(&host->site, folder))
        return false;
    if (!lock_site(host) || !catch_signals(host) ||
        !listen_at(host, &host->vim, "vim.sock", vim_ready) ||
        !listen_at(host, &host->nfc, "nfc.sock", nfc_ready) || !write_pid(host))
        return false;
    attachments_load(&host->site);
    events_note(host->site.events, "host-start", "site=%s attachments=%u",
                events_quote(host->site.folder, quoted, sizeof quoted),
                attachments_count(&host->site));
    return true;
}

/* ---- ending ---- */

static void close_watch(struct watch *watch)
{
    if (watch->fd >= 0)
        close(watch->fd);
}

static void unlink_socket(const struct host *host, const char *name)
{
    char path[SITE_PATH_MAX + 16];
    snprintf(path, sizeof path, "%s/%s", host->site.state_folder, name);
    unlink(path);
}

static void end(struct host *host)
{
    struct site *site = &host->site;
    unlink_socket(host, "vim.sock");
    unlink_socket(host, "nfc.sock");
    nfc_free(site);
    vim_free(site);
    loop_finish(&site->loop);
    locks_free(site);
    devices_free(site);
    events_note(site->events, "host-stop", "attachments=%u", attachments_count(site));
    attachments_free(site);
    if (host->pid_file != NULL)
        unlink(host->pid_file);
}

/* NULL when the arguments are not understood. */
static const char *take_arguments(struct host *host, int argc, char **argv)
{
    const char *folder = NULL;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--pid-file") == 0 && i + 1 < argc)
            host->pid_file = argv[++i];
        else if (argv[i][0] != '-' && folder == NULL)
            folder = argv[i];
        else
            return NULL;
    }
    return folder;
}

static int serve(struct host *host, const char *folder)
{
    bool began = begin(host, folder);
    if (began) {
        puts("ready");
        fflush(stdout);
        loop_run(&host->site.loop);
        end(host);
    }
    close_watch(&host->vim);
    close_watch(&host->nfc);
    close_watch(&host->signals);
    if (host->site.source != NULL)
        site_free(&host->site);
    if (host->lock >= 0)
        close(host->lock);
    return began ? EXIT_SUCCESS : EXIT_FAILURE;
}

int main(int argc, char **argv)
{
    static struct host host;
    if (argc == 2 && (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0)) {
        fputs(usage, stdout);
        return EXIT_SUCCESS;
    }
    const char *folder = take_arguments(&host, argc, argv);
    if (folder == NULL) {
        fputs(usage, stderr);
        return 2;
    }
    return serve(&host, folder);
}
