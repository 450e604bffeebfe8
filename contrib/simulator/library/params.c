/* Connection parameters: allocated, copied, given out and freed. */
#include <stdlib.h>
#include <string.h>

#include "library.h"

static VixError copy_string(char **to, const char *from)
{
    *to = from ? strdup(from) : NULL;
    return from && !*to ? VIX_E_OUT_OF_MEMORY : VIX_OK;
}

static VixError copy_credentials(VixDiskLibConnectParams *to, const VixDiskLibConnectParams *from)
{
    VixError error = VIX_OK;
    if (from->credType == VIXDISKLIB_CRED_UID) {
        error = copy_string(&to->creds.uid.userName, from->creds.uid.userName);
        error = error ? error : copy_string(&to->creds.uid.password, from->creds.uid.password);
    } else if (from->credType == VIXDISKLIB_CRED_SESSIONID) {
        error = copy_string(&to->creds.sessionId.cookie, from->creds.sessionId.cookie);
        error = error ? error
                      : copy_string(&to->creds.sessionId.userName, from->creds.sessionId.userName);
        error = error ? error : copy_string(&to->creds.sessionId.key, from->creds.sessionId.key);
    }
    return error;
}

VixError params_copy(VixDiskLibConnectParams *to, const VixDiskLibConnectParams *from)
{
    VixError error;
    memset(to, 0, sizeof *to);
    to->credType = from->credType;
    to->port = from->port;
    to->nfcHostPort = from->nfcHostPort;
#if VIX_RELEASE >= 67
    to->specType = from->specType;
#endif
    error = copy_string(&to->vmxSpec, from->vmxSpec);
    error = error ? error : copy_string(&to->serverName, from->serverName);
    error = error ? error : copy_string(&to->thumbPrint, from->thumbPrint);
    error = error ? error : copy_string(&to->vimApiVer, from->vimApiVer);
    error = error ? error : copy_credentials(to, from);
    if (error)
        params_clear(to);
    return error;
}

static void wipe(char *secret)
{
    if (secret)
        explicit_bzero(secret, strlen(secret));
    free(secret);
}

void params_clear(VixDiskLibConnectParams *params)
{
    free(params->vmxSpec);
    free(params->serverName);
    free(params->thumbPrint);
    free(params->vimApiVer);
    if (params->credType == VIXDISKLIB_CRED_UID) {
        free(params->creds.uid.userName);
        wipe(params->creds.uid.password);
    } else if (params->credType == VIXDISKLIB_CRED_SESSIONID) {
        wipe(params->creds.sessionId.cookie);
        free(params->creds.sessionId.userName);
        wipe(params->creds.sessionId.key);
    }
    memset(params, 0, sizeof *params);
}

#if VIX_RELEASE >= 67
VIX_EXPORT VixDiskLibConnectParams *VixDiskLib_AllocateConnectParams(void)
{
    return guarded_alloc(sizeof(VixDiskLibConnectParams), false);
}
#endif

VIX_EXPORT VixError VixDiskLib_GetConnectParams(const VixDiskLibConnection connection,
                                                VixDiskLibConnectParams **params)
{
    struct call call;
    struct subject subject = {.source = connection ? connection->settings : NULL};
    VixError error = call_begin(&call, "GetConnectParams", &subject);
    if (!error && !(error = required(&call, connection, "the connection")) &&
        !(error = required(&call, params, "params"))) {
        *params = guarded_alloc(sizeof **params, true);
        error = *params ? params_copy(*params, &connection->params) : VIX_E_OUT_OF_MEMORY;
        if (error && *params) {
            guarded_free(*params);
            *params = NULL;
        }
    }
    return call_end(&call, error);
}

/* What AllocateConnectParams gave was filled in by the client, who keeps the strings. */
VIX_EXPORT void VixDiskLib_FreeConnectParams(VixDiskLibConnectParams *params)
{
    if (!params)
        return;
    if (guarded_owns_strings(params))
        params_clear(params);
    guarded_free(params);
}
