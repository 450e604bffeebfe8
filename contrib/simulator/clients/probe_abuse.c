/* Questions about what no client should do: a crash is an answer as good as an error. */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "probe.h"

#define MIB_SECTORS 2048u

static void ask_null(const char *what)
{
    struct session session;
    struct access access = usual_access();
    if (!initialise(NULL))
        return;
    if (!strcmp(what, "server")) {
        access.login.server = NULL;
        access.tell = true;
        connect_as(&access, &session);
        return;
    }
    if (!strcmp(what, "password")) {
        access.login.password = NULL;
        access.tell = true;
        connect_as(&access, &session);
        return;
    }
    if (!connect_as(&access, &session))
        return;
    if (!strcmp(what, "path")) {
        access.path = NULL;
        access.tell = true;
        open_as(&access, &session);
        return;
    }
    if (!open_as(&access, &session))
        return;
    if (!strcmp(what, "buffer"))
        answer_error("read", vix.Read(session.handle, 0, 1, NULL));
    else
        answer_error("read", vix.ReadAsync(session.handle, 0, 1,
                                           aligned_buffer(VIXDISKLIB_SECTOR_SIZE), NULL, NULL));
}

static void ask_close_outstanding(const char *unused)
{
    struct session session;
    struct read reads[8] = {0};
    (void)unused;
    if (!usual_session(&session))
        return;
    for (unsigned i = 0; i < 8; i++) {
        reads[i].buffer = aligned_buffer(MIB_SECTORS * VIXDISKLIB_SECTOR_SIZE);
        read_async(&session, &reads[i], 0, MIB_SECTORS);
    }
    answer_number("called_before", callbacks_seen());
    answer_error("close", vix.Close(session.handle));
    answer_number("called_after", callbacks_seen());
    wait_for_callbacks(8);
    answer_number("called_later", callbacks_seen());
}

static void ask_close_twice(const char *unused)
{
    struct session session;
    (void)unused;
    if (!usual_session(&session))
        return;
    answer_error("close", vix.Close(session.handle));
    answer_error("again", vix.Close(session.handle));
}

static void ask_exit_open(const char *unused)
{
    struct session session;
    (void)unused;
    if (!usual_session(&session))
        return;
    vix.Exit();
    answer_bool("exited", true);
}

static void *read_beside(void *data)
{
    const struct session *session = data;
    uint8_t *buffer = aligned_buffer(MIB_SECTORS * VIXDISKLIB_SECTOR_SIZE);
    VixError error = VIX_OK;
    for (unsigned i = 0; i < 16 && VIX_SUCCEEDED(error); i++)
        error = vix.Read(session->handle, 0, MIB_SECTORS, buffer);
    return (void *)(uintptr_t)VIX_ERROR_CODE(error);
}

static void ask_concurrent(const char *unused)
{
    struct session session;
    pthread_t threads[2];
    (void)unused;
    if (!usual_session(&session))
        return;
    for (unsigned i = 0; i < 2; i++)
        if (pthread_create(&threads[i], NULL, read_beside, &session))
            return;
    for (unsigned i = 0; i < 2; i++) {
        void *error;
        pthread_join(threads[i], &error);
        answer_error(i ? "second" : "first", (VixError)(uintptr_t)error);
    }
    close_session(&session, true);
}

static void ask_fork(const char *unused)
{
    struct session session;
    int status = 0;
    (void)unused;
    if (!usual_session(&session))
        return;
    pid_t child = fork();
    if (child == 0) {
        uint8_t *buffer = aligned_buffer(VIXDISKLIB_SECTOR_SIZE);
        alarm(5); /* it may well hang */
        _exit(VIX_FAILED(vix.Read(session.handle, 0, 1, buffer)));
    }
    waitpid(child, &status, 0);
    answer_number("child_exit", WIFEXITED(status) ? WEXITSTATUS(status) : -1);
    answer_number("child_signal", WIFSIGNALED(status) ? WTERMSIG(status) : 0);
    close_session(&session, true);
}

static void ask_connect_uninitialised(const char *unused)
{
    struct session session;
    struct access access = usual_access();
    (void)unused;
    access.tell = true;
    if (load())
        connect_as(&access, &session);
}

const struct question abuse_questions[] = {
    {"connect-uninitialised", NEEDS_SERVER, "Connect without InitEx?", ask_connect_uninitialised,
     NULL},
    {"null-server", NEEDS_DISK, "Connect without a server's name?", ask_null, "server"},
    {"null-password", NEEDS_DISK, "Connect without a password?", ask_null, "password"},
    {"null-path", NEEDS_DISK, "Open without a path?", ask_null, "path"},
    {"null-buffer", NEEDS_DISK, "Read without a buffer?", ask_null, "buffer"},
    {"null-callback", NEEDS_DISK, "ReadAsync without a callback?", ask_null, "callback"},
    {"close-outstanding", NEEDS_DISK, "Close while reads are outstanding?", ask_close_outstanding,
     NULL},
    {"close-twice", NEEDS_DISK, "Close of a closed handle?", ask_close_twice, NULL},
    {"exit-open", NEEDS_DISK, "Exit while a disk is open?", ask_exit_open, NULL},
    {"concurrent", NEEDS_DISK, "Two threads that read through one handle?", ask_concurrent, NULL},
    {"fork", NEEDS_DISK, "A read in a child after fork?", ask_fork, NULL},
    {0},
};
