/* Connect, ConnectEx, Disconnect. ConnectEx only logs in: hosts, thumbprints, VMs and snapshots are
 * looked at when a disk is opened, as with the real library. */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "library.h"

/* Every connection makes a folder of its own, and leaves it behind. */
static void make_tmp_directory(struct VixDiskLibConnectionStruct *connection)
{
    char lease[400];
    FILE *file;
    mkdir(library.config.tmp_directory, 0700);
    snprintf(connection->tmp_directory, sizeof connection->tmp_directory, "%s/vixsim-%d-%u",
             library.config.tmp_directory, (int)getpid(), ++library.connections);
    mkdir(connection->tmp_directory, 0700);
    snprintf(lease, sizeof lease, "%s/vm.lease", connection->tmp_directory);
    file = fopen(lease, "we");
    if (file) {
        fprintf(file, "%s\n", connection->params.vmxSpec ? connection->params.vmxSpec : "local");
        fclose(file);
    }
}

static bool names_mode(const char *modes, const char *mode)
{
    size_t length = strlen(mode);
    for (const char *at = modes; (at = strstr(at, mode)); at += length)
        if ((at == modes || at[-1] == ':') && (at[length] == 0 || at[length] == ':'))
            return true;
    return false;
}

/* Releases from 8.0 on die while they look for SAN LUNs on a machine without SCSI disks. */
static void probe_san(const struct settings *settings, const char *modes)
{
    if (VIX_RELEASE < 80 || !settings->san_probe_crash || !library.plugin)
        return;
    if (*modes && !names_mode(modes, "san"))
        return;
    if (access(settings->san_scsi_disk[0] ? settings->san_scsi_disk : "/sys/class/scsi_disk", F_OK)) {
        signal(SIGSEGV, SIG_DFL);
        raise(SIGSEGV);
    }
}

static void free_connection(struct VixDiskLibConnectionStruct *connection)
{
    if (connection->vim >= 0)
        close(connection->vim);
    if (!connection->local && connection->settings)
        settings_source_close(connection->settings);
    events_close(connection->events);
    params_clear(&connection->params);
    free(connection->snapshot);
    free(connection);
}

static VixError log_in(struct call *call, struct VixDiskLibConnectionStruct *connection)
{
    VixDiskLibConnectParams *params = &connection->params;
    bool by_cookie = params->credType == VIXDISKLIB_CRED_SESSIONID;
    char state[1300];
    struct call site_call;
    struct subject subject;
    VixError error = find_site(params->serverName, connection->site, sizeof connection->site);
    if (error)
        return error;
    snprintf(state, sizeof state, "%s/.sim", connection->site);
    connection->settings = settings_source_open(connection->site, state);
    connection->events = events_open(state);
    if (!connection->settings)
        return VIX_E_OUT_OF_MEMORY;
    subject = (struct subject){.source = connection->settings};
    error = call_begin(&site_call, call->name, &subject);
    if (!error) {
        chatter_secrets(site_call.settings,
                        by_cookie ? params->creds.sessionId.userName : params->creds.uid.userName,
                        by_cookie ? params->creds.sessionId.cookie : params->creds.uid.password);
        chatter_phone_home(site_call.settings);
        probe_san(site_call.settings, connection->modes);
        error = vim_login(params, connection->read_only, connection->snapshot,
                          library.config.tmp_directory, connection->site, &connection->vim,
                          &connection->session);
    }
    return call_end(&site_call, error);
}

static VixError connect_as_asked(struct call *call, const VixDiskLibConnectParams *params,
                                 bool read_only, const char *snapshot, const char *modes,
                                 struct VixDiskLibConnectionStruct **result)
{
    struct VixDiskLibConnectionStruct *connection = calloc(1, sizeof *connection);
    VixError error;
    if (!connection)
        return VIX_E_OUT_OF_MEMORY;
    connection->vim = -1;
    connection->read_only = read_only;
    connection->settings = library.settings;
    connection->local = true;
    snprintf(connection->modes, sizeof connection->modes, "%s", modes ? modes : "");
    error = params_copy(&connection->params, params);
    if (!error && snapshot && !(connection->snapshot = strdup(snapshot)))
        error = VIX_E_OUT_OF_MEMORY;
    if (!error && connection->params.serverName) {
        connection->local = false;
        connection->settings = NULL;
        error = log_in(call, connection);
    }
    if (error) {
        say(SAY_ERROR, "VixDiskLib_%s: failed with error %llu", call->name, (unsigned long long)error);
        free_connection(connection);
        return error;
    }
    make_tmp_directory(connection);
    *result = connection;
    return VIX_OK;
}

VIX_EXPORT VixError VixDiskLib_ConnectEx(const VixDiskLibConnectParams *params, Bool readOnly,
                                         const char *snapshotRef, const char *transportModes,
                                         VixDiskLibConnection *connection)
{
    struct call call;
    VixError error;
    /* A fault for a server's site is struck in log_in(): here only the kit's are looked at. */
    error = call_begin(&call, "ConnectEx", NULL);
    if (!error && !(error = session_thread_only(&call)) &&
        !(error = required(&call, params, "params")) &&
        !(error = required(&call, connection, "connection")))
        error = connect_as_asked(&call, params, readOnly != 0, snapshotRef, transportModes, connection);
    return call_end(&call, error);
}

VIX_EXPORT VixError VixDiskLib_Connect(const VixDiskLibConnectParams *params,
                                       VixDiskLibConnection *connection)
{
    struct call call;
    VixError error = call_begin(&call, "Connect", NULL);
    if (!error && !(error = session_thread_only(&call)) &&
        !(error = required(&call, params, "params")) &&
        !(error = required(&call, connection, "connection")))
        error = connect_as_asked(&call, params, false, NULL, NULL, connection);
    return call_end(&call, error);
}

VIX_EXPORT VixError VixDiskLib_Disconnect(VixDiskLibConnection connection)
{
    struct call call;
    struct wire_body body = {0};
    char *reply = NULL;
    size_t size;
    struct subject subject = {.source = connection ? connection->settings : NULL};
    VixError error = call_begin(&call, "Disconnect", &subject);
    if (!error && !(error = session_thread_only(&call)) &&
        !(error = required(&call, connection, "the connection"))) {
        unsigned forgotten = connection->handles - connection->failed_closes;
        if (forgotten)
            error = broken(call.settings->strict_close, "Disconnect", VIX_E_OBJECT_IS_BUSY,
                           "%u disks are still open", forgotten);
        if (error)
            return call_end(&call, error);
        if (connection->vim >= 0)
            vim_call(connection->vim, WIRE_LOGOUT, &body, &reply, &size);
        free(reply);
        call_end(&call, VIX_OK); /* before its settings go */
        if (!connection->handles) /* handles that are still open go on using it */
            free_connection(connection);
        return VIX_OK;
    }
    return call_end(&call, error);
}
