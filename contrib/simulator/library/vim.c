/* The VIM service: finding the server, logging in, and what is asked there. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "library.h"

VixError find_site(const char *server, char *site, size_t size)
{
    struct stat status;
    if (strchr(server, ':')) {
        say(SAY_ERROR, "VixDiskLibVim: %s: IPv6 is not supported", server);
        return VIX_E_HOST_SERVER_NOT_FOUND;
    }
    if (!*server || strchr(server, '/') || server[0] == '.')
        return VIX_E_HOST_SERVER_NOT_FOUND;
    snprintf(site, size, "%s/sites/%s", library.kit, server);
    if (stat(site, &status) < 0 || !S_ISDIR(status.st_mode)) {
        say(SAY_ERROR, "VixDiskLibVim: the server name %s cannot be resolved", server);
        return VIX_E_HOST_SERVER_NOT_FOUND;
    }
    return VIX_OK;
}

VixError vim_call(int socket, unsigned op, const struct wire_body *body, char **reply, size_t *size)
{
    struct wire_request head = {.op = op, .body = (uint32_t)body->used};
    struct wire_reply answer;
    *reply = NULL;
    *size = 0;
    if (body->failed)
        return VIX_E_OUT_OF_MEMORY;
    if (wire_send(socket, &head, sizeof head, body->bytes, body->used, NULL, 0) < 0 ||
        wire_receive(socket, &answer, sizeof answer, NULL, NULL, 0) != 1 ||
        answer.body > WIRE_BODY_MAX)
        return VIX_E_HOST_CONNECTION_LOST;
    *reply = malloc((size_t)answer.body + 1);
    if (!*reply)
        return VIX_E_OUT_OF_MEMORY;
    if (answer.body && wire_receive(socket, *reply, answer.body, NULL, NULL, 0) != 1) {
        free(*reply);
        *reply = NULL;
        return VIX_E_HOST_CONNECTION_LOST;
    }
    *size = answer.body;
    if (answer.error) {
        struct wire_reader reader = {*reply, *size, false};
        const char *why = wire_take_str(&reader);
        say(SAY_ERROR, "VixDiskLibVim: error %u: %s", answer.error, why ? why : "no reason was given");
    }
    return answer.error;
}

static void put_login(struct wire_body *body, const VixDiskLibConnectParams *params, bool read_only,
                      const char *snapshot, const char *tmp_directory)
{
    bool by_cookie = params->credType == VIXDISKLIB_CRED_SESSIONID;
    wire_put_u64(body, (uint64_t)getpid());
    wire_put_u64(body, VIX_RELEASE);
    wire_put_str(body, by_cookie ? params->creds.sessionId.userName : params->creds.uid.userName);
    wire_put_str(body, by_cookie ? params->creds.sessionId.key : params->creds.uid.password);
    wire_put_str(body, by_cookie ? params->creds.sessionId.cookie : NULL);
    wire_put_str(body, params->vmxSpec);
    wire_put_str(body, snapshot);
    wire_put_u64(body, read_only);
    wire_put_str(body, tmp_directory);
}

VixError vim_login(const VixDiskLibConnectParams *params, bool read_only, const char *snapshot,
                   const char *tmp_directory, const char *site, int *socket, uint64_t *session)
{
    struct wire_body body = {0};
    struct wire_reader reader;
    char state[1300], *reply;
    size_t size;
    VixError error;
    if (params->credType != VIXDISKLIB_CRED_UID && params->credType != VIXDISKLIB_CRED_SESSIONID)
        return VIX_E_NOT_SUPPORTED;
    snprintf(state, sizeof state, "%s/.sim", site);
    *socket = wire_connect(state, "vim.sock");
    if (*socket < 0) {
        say(SAY_ERROR, "VixDiskLibVim: cannot connect to %s port %u: %s", params->serverName,
            params->port ? params->port : 443, strerror(errno));
        return VIX_E_HOST_NETWORK_CONN_REFUSED;
    }
    put_login(&body, params, read_only, snapshot, tmp_directory);
    error = vim_call(*socket, WIRE_LOGIN, &body, &reply, &size);
    wire_body_free(&body);
    reader = (struct wire_reader){reply, size, false};
    *session = error ? 0 : wire_take_u64(&reader);
    free(reply);
    if (error) {
        close(*socket);
        *socket = -1;
    }
    return error;
}

/* ---- what is asked of the service without a connection of the client's ---- */

struct errand {
    struct call call;
    char site[1200];
    struct settings_source *settings;
    int socket;
};

/* The rules of the kit were looked at; now those of the server's site. */
static VixError errand_log_in(struct errand *errand, const char *name,
                              const VixDiskLibConnectParams *params)
{
    char state[1300];
    struct call call;
    struct subject subject;
    uint64_t session;
    VixError error;
    snprintf(state, sizeof state, "%s/.sim", errand->site);
    errand->settings = settings_source_open(errand->site, state);
    if (!errand->settings)
        return VIX_E_OUT_OF_MEMORY;
    subject = (struct subject){.source = errand->settings};
    error = call_begin(&call, name, &subject);
    if (!error)
        error = vim_login(params, true, NULL, library.config.tmp_directory, errand->site,
                          &errand->socket, &session);
    return call_end(&call, error);
}

static VixError errand_begin(struct errand *errand, const char *name,
                             const VixDiskLibConnectParams *params)
{
    VixError error = call_begin(&errand->call, name, NULL);
    errand->socket = -1;
    errand->settings = NULL;
    if (error || (error = session_thread_only(&errand->call)) ||
        (error = required(&errand->call, params, "params")))
        return error;
    if (!params->serverName)
        return VIX_E_NOT_SUPPORTED;
    if ((error = find_site(params->serverName, errand->site, sizeof errand->site)))
        return error;
    return errand_log_in(errand, name, params);
}

static VixError errand_end(struct errand *errand, VixError error)
{
    if (errand->socket >= 0)
        close(errand->socket);
    if (errand->settings)
        settings_source_close(errand->settings);
    return call_end(&errand->call, error);
}

static VixError access_call(const char *name, unsigned op, const VixDiskLibConnectParams *params,
                            const char *identity)
{
    struct errand errand;
    struct wire_body body = {0};
    char *reply = NULL;
    size_t size;
    VixError error = errand_begin(&errand, name, params);
    if (!error && !(error = required(&errand.call, identity, "identity"))) {
        wire_put_str(&body, params->vmxSpec);
        wire_put_str(&body, identity);
        error = vim_call(errand.socket, op, &body, &reply, &size);
    }
    free(reply);
    wire_body_free(&body);
    return errand_end(&errand, error);
}

VIX_EXPORT VixError VixDiskLib_PrepareForAccess(const VixDiskLibConnectParams *params,
                                                const char *identity)
{
    return access_call("PrepareForAccess", WIRE_PREPARE, params, identity);
}

VIX_EXPORT VixError VixDiskLib_EndAccess(const VixDiskLibConnectParams *params, const char *identity)
{
    return access_call("EndAccess", WIRE_END_ACCESS, params, identity);
}

VIX_EXPORT VixError VixDiskLib_Cleanup(const VixDiskLibConnectParams *params, uint32_t *numCleanedUp,
                                       uint32_t *numRemaining)
{
    struct errand errand;
    struct wire_body body = {0};
    struct wire_reader reader = {0};
    char *reply = NULL;
    size_t size = 0;
    VixError error = errand_begin(&errand, "Cleanup", params);
    if (!error) {
        wire_put_str(&body, params->vmxSpec);
        wire_put_str(&body, library.config.tmp_directory);
        error = vim_call(errand.socket, WIRE_CLEANUP, &body, &reply, &size);
    }
    if (!error) {
        uint32_t cleaned, remaining;
        reader = (struct wire_reader){reply, size, false};
        cleaned = (uint32_t)wire_take_u64(&reader);
        remaining = (uint32_t)wire_take_u64(&reader);
        if (numCleanedUp)
            *numCleanedUp = cleaned;
        if (numRemaining)
            *numRemaining = remaining;
        say(SAY_AUDIT, "VixDiskLib: Cleanup: %u cleaned up, %u remain", cleaned, remaining);
    }
    free(reply);
    wire_body_free(&body);
    return errand_end(&errand, error);
}
