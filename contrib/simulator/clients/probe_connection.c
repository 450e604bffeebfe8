/* Questions about logins, and about opening a disk. */
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "probe.h"

/* Connect and open with one thing changed, telling each step. */
static void try_access(struct access access)
{
    struct session session;
    access.tell = true;
    if (!initialise(NULL))
        return;
    if (connect_as(&access, &session) && open_as(&access, &session))
        answer_error("read", vix.Read(session.handle, 0, 1, aligned_buffer(VIXDISKLIB_SECTOR_SIZE)));
    close_session(&session, true);
}

static void ask_usual(const char *unused)
{
    (void)unused;
    try_access(usual_access());
}

static void ask_wrong_login(const char *what)
{
    struct access access = usual_access();
    if (!strcmp(what, "password"))
        access.login.password = "vixsim-probe-wrong";
    if (!strcmp(what, "thumbprint"))
        access.login.thumbprint = "00:11:22:33:44:55:66:77:88:99:AA:BB:CC:DD:EE:FF:00:11:22:33";
    if (!strcmp(what, "no-thumbprint"))
        access.login.thumbprint = NULL;
    if (!strcmp(what, "moref"))
        access.login.moref = "vm-99999999";
    if (!strcmp(what, "no-moref"))
        access.login.moref = NULL;
    if (!strcmp(what, "server"))
        access.login.server = "vixsim-probe.invalid";
    if (!strcmp(what, "port"))
        access.login.port = 1;
    try_access(access);
}

static void ask_wrong_snapshot(const char *snapshot)
{
    struct access access = usual_access();
    access.snapshot = snapshot;
    try_access(access);
}

/* Paths made from the right one. */
static void ask_wrong_path(const char *what)
{
    char path[2048];
    struct access access = usual_access();
    const char *close = strchr(target.disk, ']');
    if (!strcmp(what, "file"))
        snprintf(path, sizeof path, "%s.absent.vmdk", target.disk);
    else if (!strcmp(what, "datastore"))
        snprintf(path, sizeof path, "[vixsim-probe]%s", close ? close + 1 : target.disk);
    else /* no datastore at all */
        snprintf(path, sizeof path, "%s", close ? close + 1 + (close[1] == ' ') : target.disk);
    access.path = path;
    try_access(access);
}

/* A disk that is there, but not in the snapshot. */
static void ask_other_disk(const char *unused)
{
    struct access access = usual_access();
    (void)unused;
    access.path = target.other_disk;
    if (target.other_disk)
        try_access(access);
    else
        answer_text("not_asked", "needs --other-disk");
}

static void ask_transports(const char *transports)
{
    struct access access = usual_access();
    access.transports = transports;
    try_access(access);
}

/* HotAdd attaches the disk to this machine, and the library's own choice may be HotAdd. */
static void ask_attaching(const char *transports)
{
    if (target.allow_hotadd)
        ask_transports(transports);
    else
        answer_text("not_asked", "may attach the disk: see --allow-hotadd");
}

/* How the block devices are open that this process holds. */
static void answer_devices(const char *prefix)
{
    unsigned devices = 0, direct = 0;
    for (int fd = 3; fd < 1024; fd++) {
        struct stat status;
        int flags = fcntl(fd, F_GETFL);
        if (flags < 0 || fstat(fd, &status) || !S_ISBLK(status.st_mode))
            continue;
        devices++;
        direct += (flags & O_DIRECT) != 0;
    }
    char key[64];
    snprintf(key, sizeof key, "%s_devices", prefix);
    answer_number(key, devices);
    snprintf(key, sizeof key, "%s_devices_direct", prefix);
    answer_number(key, direct);
}

static void ask_san_direct(const char *unused)
{
    struct session session, other;
    struct access access = usual_access();
    (void)unused;
    access.transports = "san";
    if (!initialise(NULL) || !connect_as(&access, &session) || !open_as(&access, &session))
        return;
    answer_text("transport", vix.GetTransportMode(session.handle));
    answer_devices("buffered");
    answer_error("close", vix.Close(session.handle));
    session.handle = NULL;
    other = session;
    access.flags |= VIXDISKLIB_FLAG_OPEN_UNBUFFERED;
    if (open_as(&access, &other))
        answer_devices("unbuffered");
    close_session(&other, true);
}

static void ask_flags(const char *flags)
{
    struct access access = usual_access();
    access.flags |= (uint32_t)strtoul(flags, NULL, 0);
    try_access(access);
}

/* Nothing is written: whether the flag alone is enough, or the connection's word counts. */
static void ask_read_only_connection(const char *unused)
{
    struct access access = usual_access();
    (void)unused;
    access.flags = 0;
    try_access(access);
}

static void ask_get_params(const char *unused)
{
    struct access access = usual_access();
    struct session session;
    VixDiskLibConnectParams *params = NULL;
    (void)unused;
    if (!initialise(NULL) || !vix.GetConnectParams || !connect_as(&access, &session))
        return;
    VixError error = vix.GetConnectParams(session.connection, &params);
    answer_error("get", error);
    if (VIX_SUCCEEDED(error) && params) {
        answer_bool("server_is_same", params->serverName &&
                                          !strcmp(params->serverName, access.login.server));
        answer_text("vmx_spec", params->vmxSpec);
        answer_number("cred_type", params->credType);
        answer_bool("password_is_there", params->credType == VIXDISKLIB_CRED_UID &&
                                             params->creds.uid.password &&
                                             holds_secret(params->creds.uid.password));
        answer_number("port", params->port);
        answer_number("nfc_port", params->nfcHostPort);
        vix.FreeConnectParams(params);
    }
    close_session(&session, true);
}

static void *open_in_thread(void *data)
{
    struct access access = usual_access();
    access.tell = true;
    open_as(&access, data);
    return NULL;
}

static void *connect_in_thread(void *data)
{
    struct access access = usual_access();
    access.tell = true;
    connect_as(&access, data);
    return NULL;
}

static void ask_threads(const char *which)
{
    struct session session = {0};
    struct access access = usual_access();
    pthread_t thread;
    access.tell = true;
    if (!initialise(NULL))
        return;
    if (!strcmp(which, "connect")) {
        if (pthread_create(&thread, NULL, connect_in_thread, &session))
            return;
        pthread_join(thread, NULL);
        if (session.connection)
            open_as(&access, &session);
    } else {
        if (!connect_as(&access, &session) ||
            pthread_create(&thread, NULL, open_in_thread, &session))
            return;
        pthread_join(thread, NULL);
    }
    close_session(&session, true);
}

static void ask_open_twice(const char *unused)
{
    struct session session, other;
    struct access access = usual_access();
    (void)unused;
    if (!usual_session(&session))
        return;
    other = session;
    access.tell = true;
    open_as(&access, &other);
    if (other.handle)
        answer_error("close_second", vix.Close(other.handle));
    close_session(&session, true);
}

static void ask_connect_twice(const char *unused)
{
    struct session session, other;
    struct access access = usual_access();
    (void)unused;
    if (!usual_session(&session))
        return;
    access.tell = true;
    if (connect_as(&access, &other))
        open_as(&access, &other);
    close_session(&other, true);
    close_session(&session, false);
}

static void ask_disconnect_first(const char *unused)
{
    struct session session;
    (void)unused;
    if (!usual_session(&session))
        return;
    answer_error("disconnect", vix.Disconnect(session.connection));
    answer_error("close", vix.Close(session.handle));
}

/* The password in what the library logs, at its loudest. A true answer is a number; the lines
 * themselves are never shown. */
static void ask_log_secrets(const char *unused)
{
    char path[] = "/tmp/vixsim-probe.XXXXXX";
    struct session session;
    struct access access = usual_access();
    int fd = mkstemp(path);
    (void)unused;
    if (fd < 0)
        return;
    dprintf(fd, "vixDiskLib.transport.LogLevel=6\nvixDiskLib.nfc.LogLevel=4\n");
    close(fd);
    bool ready = initialise(path);
    unlink(path);
    if (!ready)
        return;
    if (connect_as(&access, &session))
        open_as(&access, &session);
    close_session(&session, false);
    answer_bool("in_log", logged.secrets[0]);
    answer_bool("in_warn", logged.secrets[1]);
    answer_bool("in_panic", logged.secrets[2]);
    answer_number("log_lines", logged.lines[0]);
    answer_number("warn_lines", logged.lines[1]);
    answer_number("phone_home_warn_lines", logged.phone_home[1]);
}

#define WRONG(NAME, WHAT, TEXT) {NAME, NEEDS_DISK, TEXT, ask_wrong_login, WHAT}

const struct question connection_questions[] = {
    {"usual", NEEDS_DISK, "How long do Connect, Open, Close and Disconnect take?", ask_usual, NULL},
    WRONG("wrong-password", "password", "The error of a wrong password, and of which call?"),
    WRONG("wrong-thumbprint", "thumbprint", "The error of a wrong thumbprint, and of which call?"),
    WRONG("no-thumbprint", "no-thumbprint", "Without a thumbprint?"),
    WRONG("unknown-vm", "moref", "A virtual machine that is not there?"),
    WRONG("no-vm", "no-moref", "Without a virtual machine?"),
    WRONG("unknown-server", "server", "A server whose name is not known?"),
    WRONG("closed-port", "port", "A server's port that nobody listens on?"),
    {"unknown-snapshot", NEEDS_DISK, "A snapshot that is not there?", ask_wrong_snapshot,
     "snapshot-99999999"},
    {"path-without-snapshot", NEEDS_DISK, "The snapshot's disk without naming the snapshot?",
     ask_wrong_snapshot, NULL},
    {"absent-file", NEEDS_DISK, "A file that is not there?", ask_wrong_path, "file"},
    {"path-not-in-snapshot", NEEDS_DISK, "A disk that the snapshot does not hold?", ask_other_disk,
     NULL},
    {"absent-datastore", NEEDS_DISK, "A datastore that is not there?", ask_wrong_path, "datastore"},
    {"path-without-datastore", NEEDS_DISK, "A path without its datastore?", ask_wrong_path, "none"},
    {"transport-none", NEEDS_DISK, "Without transports: which one is it?", ask_attaching, NULL},
    {"transport-unknown", NEEDS_DISK, "A transport that nobody knows?", ask_transports,
     "vixsim-probe"},
    {"transport-san", NEEDS_DISK, "Only san: what does Open return, which transport is it?",
     ask_transports, "san"},
    {"transport-hotadd", NEEDS_DISK, "Only hotadd: what does Open return, which transport is it?",
     ask_attaching, "hotadd"},
    {"san-direct", NEEDS_DISK, "Over san: are the devices open with O_DIRECT?", ask_san_direct, NULL},
    {"transport-nbd", NEEDS_DISK, "Only nbd: which transport is it?", ask_transports, "nbd"},
    {"transport-file", NEEDS_DISK, "Only file: which transport is it?", ask_transports, "file"},
    {"flag-unbuffered", NEEDS_DISK, "Opening with UNBUFFERED?", ask_flags, "1"},
    {"flag-single-link", NEEDS_DISK, "Opening with SINGLE_LINK?", ask_flags, "2"},
    {"flag-zlib", NEEDS_DISK, "Opening with compression (zlib)?", ask_flags, "16"},
    {"flag-fastlz", NEEDS_DISK, "Opening with compression (fastlz)?", ask_flags, "32"},
    {"flag-skipz", NEEDS_DISK, "Opening with compression (skipz)?", ask_flags, "64"},
    {"flag-unknown", NEEDS_DISK, "Opening with a flag that nobody knows?", ask_flags, "0x40000000"},
    {"read-only-connection", NEEDS_DISK, "A read-only connection, a disk opened without READ_ONLY?",
     ask_read_only_connection, NULL},
    {"get-params", NEEDS_SERVER, "What does GetConnectParams give back?", ask_get_params, NULL},
    {"connect-thread", NEEDS_DISK, "Connect on another thread than InitEx and Open?", ask_threads,
     "connect"},
    {"open-thread", NEEDS_DISK, "Open on another thread than Connect and Close?", ask_threads,
     "open"},
    {"open-twice", NEEDS_DISK, "A second handle on the same disk?", ask_open_twice, NULL},
    {"connect-twice", NEEDS_DISK, "A second connection that opens the same disk?",
     ask_connect_twice, NULL},
    {"disconnect-first", NEEDS_DISK, "Disconnect before Close?", ask_disconnect_first, NULL},
    {"log-secrets", NEEDS_DISK, "Does a line of the log hold the password?", ask_log_secrets, NULL},
    {0},
};
