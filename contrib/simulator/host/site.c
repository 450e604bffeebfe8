#include "site.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "memory.h"
#include "random.h"

/* How soon a change of the settings shows where nobody asks for anything. */
#define TICK_NS UINT64_C(25000000)
#define REGISTRY_BYTES_MAX (16l << 20)

/* ---- settings ---- */

static void forget_settings(struct chore *chore)
{
    struct site *site = LIST_OF(chore, struct site, settings_chore);
    settings_release(site->settings);
    site->settings = NULL;
}

const struct settings *site_settings(struct site *site)
{
    if (site->settings != NULL)
        return site->settings;
    char why[256], quoted[300];
    site->settings = settings_get(site->source);
    loop_later(&site->loop, &site->settings_chore);
    if (settings_error(site->source, why, sizeof why)) {
        fprintf(stderr, "vixsim-host: sim.conf: %s\n", why);
        events_note(site->events, "settings-error", "why=%s",
                    events_quote(why, quoted, sizeof quoted));
    }
    if (site->settings->seed != site->seed) {
        site->seed = site->settings->seed;
        site->random = site->seed != 0 ? site->seed : (uint64_t)time(NULL) ^ loop_now_ns();
    }
    return site->settings;
}

/* ---- registry ---- */

static char *read_text(const char *path)
{
    FILE *file = fopen(path, "re");
    if (file == NULL)
        return NULL;
    char *text = NULL;
    size_t room = 0;
    /* Up to a byte that no text has: all of it. */
    if (getdelim(&text, &room, '\0', file) < 0 || ftell(file) > REGISTRY_BYTES_MAX) {
        free(text);
        text = feof(file) ? memory_text("") : NULL;
    }
    fclose(file);
    return text;
}

static bool same_file(const struct stat *a, const struct stat *b)
{
    return a->st_dev == b->st_dev && a->st_ino == b->st_ino && a->st_size == b->st_size &&
           a->st_mtim.tv_sec == b->st_mtim.tv_sec && a->st_mtim.tv_nsec == b->st_mtim.tv_nsec;
}

const struct registry *site_registry(struct site *site)
{
    char path[SITE_PATH_MAX + 16], why[256] = "", quoted[300];
    struct stat now;
    snprintf(path, sizeof path, "%s/registry.conf", site->folder);
    if (stat(path, &now) < 0 || same_file(&now, &site->registry_stat))
        return site->registry;
    char *text = read_text(path);
    struct registry *fresh =
        text != NULL ? registry_parse(text, why, sizeof why) : NULL;
    free(text);
    site->registry_stat = now;
    if (fresh == NULL) {
        fprintf(stderr, "vixsim-host: registry.conf: %s\n", why);
        events_note(site->events, "registry-error", "why=%s",
                    events_quote(why, quoted, sizeof quoted));
        return site->registry;
    }
    registry_free(site->registry);
    return site->registry = fresh;
}

bool site_file(const struct site *site, const char *path, char datastore[64],
               char file[SITE_PATH_MAX])
{
    char inside[1024];
    if (!registry_split_path(path, datastore, 64, inside, sizeof inside))
        return false;
    int length = snprintf(file, SITE_PATH_MAX, "%s/%s/%s", site->folder, datastore, inside);
    return length > 0 && length < SITE_PATH_MAX;
}

/* ---- hosts ---- */

int site_host_state(const struct settings *settings, const char *name)
{
    for (size_t i = 0; i < settings->host_count; i++)
        if (strcmp(settings->hosts[i].name, name) == 0)
            return (int)settings->hosts[i].state;
    return HOST_UP;
}

const char *site_host_state_name(int state)
{
    static const char *const names[] = {[HOST_UP] = "up",
                                        [HOST_SHUTDOWN] = "shutdown",
                                        [HOST_MAINTENANCE] = "maintenance",
                                        [HOST_LOST] = "lost",
                                        [HOST_DOWN] = "down"};
    return names[state];
}

struct site_host *site_host(struct site *site, const char *name)
{
    LIST_EACH(link, after, &site->hosts) {
        struct site_host *host = LIST_OF(link, struct site_host, place);
        if (strcmp(host->name, name) == 0)
            return host;
    }
    struct site_host *host = memory_zeroed(1, sizeof *host);
    snprintf(host->name, sizeof host->name, "%s", name);
    host->state = site_host_state(site_settings(site), host->name);
    trunk_init(&host->trunk, &site->loop.timers);
    list_append(&site->hosts, &host->place);
    return host;
}

static void tick(struct timer *timer, uint64_t at_ns)
{
    struct site *site = LIST_OF(timer, struct site, tick);
    const struct settings *settings = site_settings(site);
    LIST_EACH(link, after, &site->hosts) {
        struct site_host *host = LIST_OF(link, struct site_host, place);
        int state = site_host_state(settings, host->name);
        if (state == host->state)
            continue;
        events_note(site->events, "host-state", "host=%s before=%s now=%s", host->name,
                    site_host_state_name(host->state), site_host_state_name(state));
        host->state = state;
        nfc_host_changed(site, host);
    }
    nfc_tick(site, at_ns);
    timers_set(&site->loop.timers, &site->tick, loop_now_ns() + TICK_NS);
}

/* ---- life ---- */

uint64_t site_new_id(struct site *site)
{
    return site->next_id++;
}

bool site_init(struct site *site, const char *folder)
{
    *site = (struct site){.tick.fire = tick};
    if (realpath(folder, site->folder) == NULL) {
        fprintf(stderr, "vixsim-host: %s: %s\n", folder, strerror(errno));
        return false;
    }
    int length = snprintf(site->state_folder, sizeof site->state_folder, "%s/.sim", site->folder);
    if (length < 0 || (size_t)length >= sizeof site->state_folder ||
        (mkdir(site->state_folder, 0777) < 0 && errno != EEXIST) || !loop_init(&site->loop)) {
        fprintf(stderr, "vixsim-host: %s: %s\n", site->state_folder, strerror(errno));
        return false;
    }
    list_init(&site->hosts);
    list_init(&site->logins);
    list_init(&site->sessions);
    list_init(&site->accesses);
    list_init(&site->locks);
    list_init(&site->devices);
    list_init(&site->attachments);
    chore_init(&site->settings_chore, forget_settings);
    site->next_id = (uint64_t)time(NULL) << 20 | ((uint64_t)getpid() & 0xFF) << 12;
    site->seed = UINT64_MAX; /* so that the first look at the settings starts the choices */
    site->events = events_open(site->state_folder);
    site->source = settings_source_open(site->folder, site->state_folder);
    if (site->source == NULL) {
        fputs("vixsim-host: the settings cannot be read\n", stderr);
        loop_free(&site->loop);
        events_close(site->events);
        return false;
    }
    site_settings(site);
    site_registry(site);
    timers_set(&site->loop.timers, &site->tick, loop_now_ns() + TICK_NS);
    return true;
}

void site_free(struct site *site)
{
    if (site->settings != NULL)
        settings_release(site->settings);
    if (site->source != NULL)
        settings_source_close(site->source);
    LIST_EACH(link, after, &site->hosts) {
        struct site_host *host = LIST_OF(link, struct site_host, place);
        timers_clear(&site->loop.timers, &host->trunk.timer);
        list_remove(link);
        free(host);
    }
    timers_clear(&site->loop.timers, &site->tick);
    for (unsigned i = 0; i < site->removed_count; i++)
        free(site->removed[i]);
    free(site->removed);
    registry_free(site->registry);
    loop_free(&site->loop);
    events_close(site->events);
}
