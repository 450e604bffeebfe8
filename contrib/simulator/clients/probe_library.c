/* Questions about the library alone: no server is needed. */
#include <dirent.h>
#include <pthread.h>
#include <pwd.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "probe.h"

static void ask_symbols(const char *unused)
{
    char absent[1024] = "";
    (void)unused;
    if (!load())
        return;
    answer_text("file", vix.file);
    answer_number("release", vix.release);
    for (unsigned i = 0; kit_function(i); i++)
        if (!kit_has(&vix, i))
            snprintf(absent + strlen(absent), sizeof absent - strlen(absent), "%s%s",
                     *absent ? " " : "", kit_function(i));
    answer_text("absent", absent);
}

static void ask_init_version(const char *version)
{
    unsigned major = 0, minor = 0;
    sscanf(version, "%u.%u", &major, &minor);
    if (load())
        answer_error("init", initialise_as(major, minor, NULL));
}

static void ask_init_deprecated(const char *unused)
{
    (void)unused;
    if (load() && vix.Init)
        answer_error("init", vix.Init(6, 5, probe_log, probe_warn, probe_panic, target.libdir));
}

static void ask_init_twice(const char *unused)
{
    (void)unused;
    if (initialise(NULL))
        answer_error("second", initialise_as(6, 5, NULL));
}

static void ask_init_after_exit(const char *unused)
{
    (void)unused;
    if (!initialise(NULL))
        return;
    vix.Exit();
    answer_bool("exited", true);
    answer_error("again", initialise_as(6, 5, NULL));
}

static void *init_in_thread(void *unused)
{
    (void)unused;
    answer_error("init", initialise_as(6, 5, NULL));
    return NULL;
}

static void ask_init_from_thread(const char *unused)
{
    pthread_t thread;
    (void)unused;
    if (load() && !pthread_create(&thread, NULL, init_in_thread, NULL))
        pthread_join(thread, NULL);
}

static void ask_config_missing(const char *unused)
{
    (void)unused;
    if (load())
        answer_error("init", initialise_as(6, 5, "/nonexistent/vixsim-probe.conf"));
}

/* `text` as a configuration file. */
static void init_with(const char *text)
{
    char path[] = "/tmp/vixsim-probe.XXXXXX";
    int fd = mkstemp(path);
    if (fd < 0)
        return;
    dprintf(fd, "%s\n", text);
    close(fd);
    if (load())
        answer_error("init", initialise_as(6, 5, path));
    unlink(path);
}

static void ask_config_text(const char *text)
{
    init_with(text);
    answer_number("log_lines", logged.lines[0]);
    answer_number("warn_lines", logged.lines[1]);
}

static void ask_libdir(const char *libdir)
{
    if (!load())
        return;
    answer_error("init", vix.InitEx(6, 5, probe_log, probe_warn, probe_panic, libdir, NULL));
    answer_text("transports", vix.ListTransportModes());
}

/* The default logger writes a file of this process; it is removed again. */
static void ask_no_callbacks(const char *unused)
{
    char path[512];
    const struct passwd *user = getpwuid(getuid());
    (void)unused;
    if (!load())
        return;
    answer_error("init", vix.InitEx(6, 5, NULL, NULL, NULL, target.libdir, NULL));
    snprintf(path, sizeof path, "/tmp/vmware-%s/vixDiskLib-%d.log", user ? user->pw_name : "",
             (int)getpid());
    answer_bool("log_file", access(path, F_OK) == 0);
    unlink(path);
}

static void ask_list_early(const char *unused)
{
    (void)unused;
    if (load())
        answer_text("transports", vix.ListTransportModes());
}

static void ask_list(const char *unused)
{
    (void)unused;
    if (!initialise(NULL))
        return;
    const char *first = vix.ListTransportModes();
    answer_text("transports", first);
    answer_bool("same_pointer", first == vix.ListTransportModes());
}

static unsigned thread_count(void)
{
    unsigned count = 0;
    DIR *tasks = opendir("/proc/self/task");
    for (const struct dirent *entry; tasks && (entry = readdir(tasks));)
        count += entry->d_name[0] != '.';
    if (tasks)
        closedir(tasks);
    return count;
}

static void ask_init_and_exit(const char *unused)
{
    (void)unused;
    double began = kit_seconds();
    if (!load())
        return;
    answer_real("load_seconds", kit_seconds() - began);
    answer_number("threads_before", thread_count());
    began = kit_seconds();
    answer_error("init", initialise_as(6, 5, NULL));
    answer_real("init_seconds", kit_seconds() - began);
    answer_number("threads_after_init", thread_count());
    answer_number("log_lines", logged.lines[0]);
    answer_number("warn_lines", logged.lines[1]);
    answer_number("panic_lines", logged.lines[2]);
    answer_number("phone_home_log_lines", logged.phone_home[0]);
    answer_number("phone_home_warn_lines", logged.phone_home[1]);
    began = kit_seconds();
    vix.Exit();
    answer_real("exit_seconds", kit_seconds() - began);
    answer_number("threads_after_exit", thread_count());
}

static void error_text(const char *key, VixError error)
{
    char *text = vix.GetErrorText(error, NULL);
    answer_text(key, text);
    if (text)
        vix.FreeErrorText(text);
}

static void ask_error_text(const char *unused)
{
    (void)unused;
    if (!initialise(NULL) || !vix.GetErrorText)
        return;
    error_text("ok", VIX_OK);
    error_text("fail", VIX_E_FAIL);
    error_text("async", VIX_ASYNC);
    error_text("mixed_mode", VIX_E_ASYNC_MIXEDMODE_UNSUPPORTED);
    error_text("server_shutdown", VIX_E_HOST_SERVER_SHUTDOWN);
    error_text("unknown_code", 12345);
    error_text("upper_bits", 0x500000000ull | VIX_E_FILE_NOT_FOUND);
}

static void ask_error_text_early(const char *unused)
{
    (void)unused;
    if (load() && vix.GetErrorText)
        error_text("fail", VIX_E_FAIL);
}

static void ask_allocate_early(const char *unused)
{
    (void)unused;
    if (!load() || !vix.AllocateConnectParams)
        return;
    VixDiskLibConnectParams *params = vix.AllocateConnectParams();
    answer_bool("allocated", params != NULL);
    if (!params)
        return;
    static const VixDiskLibConnectParams zeros;
    answer_bool("zeroed", !memcmp(params, &zeros, sizeof zeros));
    vix.FreeConnectParams(params);
}

#define INIT_VERSION(V)                                                                            \
    {"init-version-" V, NEEDS_LIBRARY, "Does InitEx accept version " V "?", ask_init_version, V}

const struct question library_questions[] = {
    {"symbols", NEEDS_LIBRARY, "Which functions are absent?", ask_symbols, NULL},
    INIT_VERSION("9.0"),
    INIT_VERSION("8.0"),
    INIT_VERSION("7.0"),
    INIT_VERSION("6.7"),
    INIT_VERSION("6.5"),
    INIT_VERSION("6.0"),
    INIT_VERSION("5.5"),
    INIT_VERSION("1.0"),
    {"init-deprecated", NEEDS_LIBRARY, "Does Init still work?", ask_init_deprecated, NULL},
    {"init-twice", NEEDS_LIBRARY, "What does a second InitEx return?", ask_init_twice, NULL},
    {"init-after-exit", NEEDS_LIBRARY, "May InitEx follow Exit?", ask_init_after_exit, NULL},
    {"init-from-thread", NEEDS_LIBRARY, "May InitEx come from another thread than the main one?",
     ask_init_from_thread, NULL},
    {"config-missing", NEEDS_LIBRARY, "A configuration file that is not there?", ask_config_missing,
     NULL},
    {"config-unknown-key", NEEDS_LIBRARY, "A configuration file with an unknown key?",
     ask_config_text, "no.such.key=1"},
    {"config-nonsense", NEEDS_LIBRARY, "A configuration file with a line without =?",
     ask_config_text, "this is no setting"},
    {"config-loud", NEEDS_LIBRARY, "How many lines are logged at the highest levels?",
     ask_config_text, "vixDiskLib.transport.LogLevel=6\nvixDiskLib.nfc.LogLevel=4"},
    {"libdir-null", NEEDS_LIBRARY, "Without libDir: which transports?", ask_libdir, NULL},
    {"libdir-wrong", NEEDS_LIBRARY, "With a libDir that is not there: which transports?",
     ask_libdir, "/nonexistent"},
    {"own-log", NEEDS_LIBRARY, "Without log callbacks: is a log file written in /tmp?",
     ask_no_callbacks, NULL},
    {"transports-early", NEEDS_LIBRARY, "ListTransportModes before InitEx?", ask_list_early, NULL},
    {"transports", NEEDS_LIBRARY, "ListTransportModes after InitEx, and is it one static string?",
     ask_list, NULL},
    {"exit-time", NEEDS_LIBRARY, "How long do InitEx and Exit take, which threads stay?",
     ask_init_and_exit, NULL},
    {"error-text", NEEDS_LIBRARY, "The texts of errors, of unknown and of upper bits?",
     ask_error_text, NULL},
    {"error-text-early", NEEDS_LIBRARY, "GetErrorText before InitEx?", ask_error_text_early, NULL},
    {"allocate-early", NEEDS_LIBRARY, "AllocateConnectParams before InitEx: zeroed?",
     ask_allocate_early, NULL},
    {0},
};
