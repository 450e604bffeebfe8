#include "vim.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../include/vixDiskLib.h"
#include "attachments.h"
#include "memory.h"

#define IDENTITY_MAX 50

/* A VM that somebody prepared for access. */
struct prepared {
    struct list place;
    char *moref, *identity;
};

/* ---- logging in ---- */

static bool accepted(const char *wanted, const char *given)
{
    return wanted[0] == '\0' || (given != NULL && strcmp(wanted, given) == 0);
}

static bool credentials_fit(const struct settings *settings, const char *user, const char *password,
                            const char *cookie)
{
    if (cookie != NULL && cookie[0] != '\0')
        return accepted(settings->cookie, cookie);
    return accepted(settings->user, user) && accepted(settings->password, password);
}

static void log_in(struct login *login, const struct wire_request *head, struct wire_reader *reader)
{
    struct site *site = login->site;
    char spec[600], snapshot[200], quoted[200];
    uint64_t client = wire_take_u64(reader), release = wire_take_u64(reader);
    const char *user = wire_take_str(reader), *password = wire_take_str(reader);
    const char *cookie = wire_take_str(reader), *vmx_spec = wire_take_str(reader);
    const char *reference = wire_take_str(reader);
    bool read_only = wire_take_u64(reader) != 0;
    const char *tmp_directory = wire_take_str(reader);
    if (reader->failed || login->id != 0) {
        peer_refuse(&login->peer, head, VIX_E_INVALID_ARG, "not a login, or a second one");
        return;
    }
    const struct settings *settings = site_settings(site);
    events_quote(user, quoted, sizeof quoted);
    if (!credentials_fit(settings, user, password, cookie)) {
        events_note(site->events, "login-refused", "client=%llu user=%s error=%d",
                    (unsigned long long)client, quoted, settings->login_error);
        peer_refuse(&login->peer, head, (uint32_t)settings->login_error,
                    "incorrect user name or password");
        return;
    }
    login->id = site_new_id(site);
    login->client = client;
    login->release = release;
    login->vmx_spec = memory_text(vmx_spec);
    login->snapshot = memory_text(reference);
    login->tmp_directory = memory_text(tmp_directory);
    login->read_only = read_only;
    events_note(site->events, "login",
                "login=%llu client=%llu release=%llu user=%s by=%s vm=%s snapshot=%s read_only=%d",
                (unsigned long long)login->id, (unsigned long long)client,
                (unsigned long long)release, quoted,
                cookie != NULL && cookie[0] != '\0' ? "cookie" : "password",
                events_quote(vmx_spec, spec, sizeof spec),
                events_quote(reference, snapshot, sizeof snapshot), read_only);
    peer_reply(&login->peer, head, VIX_OK, &login->id, sizeof login->id);
}

struct login *vim_login(struct site *site, uint64_t id)
{
    LIST_EACH(link, after, &site->logins) {
        struct login *login = LIST_OF(link, struct login, place);
        if (login->id == id && id != 0)
            return login;
    }
    return NULL;
}

static void log_out(struct login *login, const struct wire_request *head)
{
    login->orderly = true;
    peer_reply(&login->peer, head, VIX_OK, NULL, 0);
    peer_close_after(&login->peer);
}

/* ---- preparing for access ---- */

static struct prepared *find_prepared(struct site *site, const char *moref)
{
    LIST_EACH(link, after, &site->accesses) {
        struct prepared *prepared = LIST_OF(link, struct prepared, place);
        if (strcmp(prepared->moref, moref) == 0)
            return prepared;
    }
    return NULL;
}

static void free_prepared(struct prepared *prepared)
{
    list_remove(&prepared->place);
    free(prepared->moref);
    free(prepared->identity);
    free(prepared);
}

static void begin_access(struct site *site, const char *moref, const char *identity)
{
    struct prepared *prepared = memory_zeroed(1, sizeof *prepared);
    prepared->moref = memory_text(moref);
    prepared->identity = memory_text(identity);
    list_append(&site->accesses, &prepared->place);
}

static void change_access(struct login *login, const struct wire_request *head,
                          struct wire_reader *reader)
{
    struct site *site = login->site;
    bool begins = head->op == WIRE_PREPARE;
    char quoted[200];
    const char *spec = wire_take_str(reader), *identity = wire_take_str(reader);
    if (reader->failed || identity == NULL || strlen(identity) > IDENTITY_MAX) {
        peer_refuse(&login->peer, head, VIX_E_INVALID_ARG, "an identity has at most 50 characters");
        return;
    }
    const struct registry_vm *vm = registry_vm_by_spec(site_registry(site), spec);
    if (vm == NULL) {
        peer_refuse(&login->peer, head, VIX_E_VM_NOT_FOUND, "there is no such virtual machine");
        return;
    }
    struct prepared *prepared = find_prepared(site, vm->moref);
    if (prepared != NULL && strcmp(prepared->identity, identity) != 0) {
        peer_refuse(&login->peer, head, VIX_E_OBJECT_IS_BUSY,
                    "the virtual machine is prepared for another identity");
        return;
    }
    if (begins && prepared == NULL)
        begin_access(site, vm->moref, identity);
    else if (!begins && prepared != NULL)
        free_prepared(prepared);
    events_note(site->events, begins ? "prepare" : "end-access", "vm=%s identity=%s", vm->moref,
                events_quote(identity, quoted, sizeof quoted));
    peer_reply(&login->peer, head, VIX_OK, NULL, 0);
}

/* ---- cleaning up ---- */

static void clean_up(struct login *login, const struct wire_request *head,
                     struct wire_reader *reader)
{
    struct site *site = login->site;
    const char *spec = wire_take_str(reader), *tmp_directory = wire_take_str(reader);
    char quoted[1024];
    unsigned cleaned, remaining;
    const struct registry_vm *vm = registry_vm_by_spec(site_registry(site), spec);
    if (reader->failed || (spec != NULL && vm == NULL)) {
        peer_refuse(&login->peer, head, reader->failed ? VIX_E_INVALID_ARG : VIX_E_VM_NOT_FOUND,
                    "there is no such virtual machine");
        return;
    }
    const char *moref = vm != NULL ? vm->moref : NULL;
    attachments_cleanup(site, moref, tmp_directory, &cleaned, &remaining);
    events_note(site->events, "cleanup", "vm=%s tmp=%s cleaned=%u remaining=%u",
                moref != NULL ? moref : "-", events_quote(tmp_directory, quoted, sizeof quoted),
                cleaned, remaining);
    const uint64_t answer[] = {cleaned, remaining};
    peer_reply(&login->peer, head, VIX_OK, answer, sizeof answer);
}

/* ---- the service ---- */

static void request(struct peer *peer, const struct wire_request *head, char *body)
{
    struct login *login = LIST_OF(peer, struct login, peer);
    struct wire_reader reader = {.bytes = body, .left = head->body};
    if (head->op != WIRE_LOGIN && login->id == 0)
        peer_refuse(peer, head, VIX_E_INVALID_AUTHENTICATION_SESSION, "not logged in");
    else if (head->op == WIRE_LOGIN)
        log_in(login, head, &reader);
    else if (head->op == WIRE_LOGOUT)
        log_out(login, head);
    else if (head->op == WIRE_PREPARE || head->op == WIRE_END_ACCESS)
        change_access(login, head, &reader);
    else if (head->op == WIRE_CLEANUP)
        clean_up(login, head, &reader);
    else
        peer_refuse(peer, head, VIX_E_NOT_SUPPORTED, "the VIM service has no such operation");
    free(body);
}

static void gone(struct peer *peer)
{
    struct login *login = LIST_OF(peer, struct login, peer);
    if (login->id != 0)
        events_note(login->site->events, "logout", "login=%llu client=%llu asked=%s",
                    (unsigned long long)login->id, (unsigned long long)login->client,
                    login->orderly ? "yes" : "no");
    list_remove(&login->place);
}

static void freed(struct peer *peer)
{
    struct login *login = LIST_OF(peer, struct login, peer);
    free(login->vmx_spec);
    free(login->snapshot);
    free(login->tmp_directory);
    free(login);
}

void vim_accept(struct site *site, int socket)
{
    static const struct peer_events events = {request, gone, freed};
    struct login *login = memory_zeroed(1, sizeof *login);
    login->site = site;
    if (!peer_init(&login->peer, &site->loop, socket, &events)) {
        fprintf(stderr, "vixsim-host: a login: %s\n", strerror(errno));
        free(login);
        return;
    }
    list_append(&site->logins, &login->place);
}

void vim_free(struct site *site)
{
    LIST_EACH(link, after, &site->logins)
        peer_close(&LIST_OF(link, struct login, place)->peer);
    LIST_EACH(link, after, &site->accesses)
        free_prepared(LIST_OF(link, struct prepared, place));
}
