#include "attachments.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "memory.h"

static void tag_of(const struct attachment *attachment, char tag[64])
{
    snprintf(tag, 64, "vixsim-hotadd-%llx", (unsigned long long)attachment->session);
}

/* ---- the file: one attachment a line, values apart by tabs; and VMs that lost their disks ---- */

/* A tab or line end inside a value would end it. */
static void put_value(FILE *file, const char *value)
{
    for (; *value != '\0'; value++) {
        if (*value == '\t' || *value == '\n' || *value == '%')
            fprintf(file, "%%%02x", (unsigned char)*value);
        else
            fputc(*value, file);
    }
    fputc('\t', file);
}

static void take_value(char *value)
{
    char *to = value;
    unsigned byte;
    for (; *value != '\0'; value++, to++) {
        *to = *value;
        if (*value == '%' && sscanf(value, "%%%2x", &byte) == 1) {
            *to = (char)byte;
            value += 2;
        }
    }
    *to = '\0';
}

static void put_attachment(FILE *file, const struct attachment *attachment)
{
    put_value(file, "disk");
    put_value(file, attachment->moref);
    put_value(file, attachment->path);
    put_value(file, attachment->tmp_directory);
    for (unsigned i = 0; i < attachment->device_count; i++)
        fprintf(file, "%s%s", i > 0 ? "," : "", attachment->devices[i]);
    fprintf(file, "\t%ld\t%llu\n", attachment->pid, (unsigned long long)attachment->session);
}

static void save(struct site *site)
{
    char path[SITE_PATH_MAX + 32], fresh[SITE_PATH_MAX + 40];
    snprintf(path, sizeof path, "%s/attachments", site->state_folder);
    snprintf(fresh, sizeof fresh, "%s.new", path);
    FILE *file = fopen(fresh, "we");
    if (file == NULL) {
        fprintf(stderr, "vixsim-host: %s: %s\n", fresh, strerror(errno));
        return;
    }
    LIST_EACH(link, after, &site->attachments)
        put_attachment(file, LIST_OF(link, struct attachment, place));
    for (unsigned i = 0; i < site->removed_count; i++) {
        put_value(file, "removed");
        put_value(file, site->removed[i]);
        fputc('\n', file);
    }
    bool written = fflush(file) == 0 && !ferror(file);
    if (fclose(file) != 0 || !written || rename(fresh, path) < 0)
        fprintf(stderr, "vixsim-host: %s: %s\n", path, strerror(errno));
}

static void add_device(struct attachment *attachment, const char *path)
{
    attachment->devices = memory_resized(attachment->devices, attachment->device_count + 1,
                                         sizeof *attachment->devices);
    snprintf(attachment->devices[attachment->device_count++], DEVICE_PATH_MAX, "%s", path);
}

static void add_removed(struct site *site, const char *moref)
{
    if (attachments_removed(site, moref))
        return;
    site->removed =
        memory_resized(site->removed, site->removed_count + 1, sizeof *site->removed);
    site->removed[site->removed_count++] = memory_text(moref);
}

static struct attachment *add(struct site *site, const struct attachment *like)
{
    struct attachment *attachment = memory_zeroed(1, sizeof *attachment);
    *attachment = (struct attachment){
        .moref = memory_text(like->moref),
        .path = memory_text(like->path),
        .tmp_directory = memory_text(like->tmp_directory != NULL ? like->tmp_directory : ""),
        .session = like->session,
        .pid = like->pid,
        .alive = like->alive,
    };
    list_append(&site->attachments, &attachment->place);
    return attachment;
}

static void load_line(struct site *site, char *line)
{
    char *values[7], *rest = line;
    unsigned count = 0;
    while (count < 7 && (values[count] = strsep(&rest, "\t")) != NULL)
        take_value(values[count++]);
    if (count >= 2 && strcmp(values[0], "removed") == 0)
        add_removed(site, values[1]);
    if (count < 7 || strcmp(values[0], "disk") != 0)
        return;
    struct attachment like = {.moref = values[1],
                              .path = values[2],
                              .tmp_directory = values[3],
                              .pid = strtol(values[5], NULL, 10),
                              .session = strtoull(values[6], NULL, 10)};
    struct attachment *attachment = add(site, &like);
    for (char *path = strtok(values[4], ","); path != NULL; path = strtok(NULL, ","))
        add_device(attachment, path);
}

void attachments_load(struct site *site)
{
    char path[SITE_PATH_MAX + 32], *line = NULL;
    size_t room = 0;
    ssize_t length;
    snprintf(path, sizeof path, "%s/attachments", site->state_folder);
    FILE *file = fopen(path, "re");
    if (file == NULL)
        return;
    while ((length = getline(&line, &room, file)) > 0) {
        line[length - 1] = '\0';
        load_line(site, line);
    }
    free(line);
    fclose(file);
}

/* ---- attaching and detaching ---- */

static void attachment_free(struct attachment *attachment)
{
    list_remove(&attachment->place);
    free(attachment->moref);
    free(attachment->path);
    free(attachment->tmp_directory);
    free(attachment->devices);
    free(attachment);
}

void attachments_free(struct site *site)
{
    LIST_EACH(link, after, &site->attachments)
        attachment_free(LIST_OF(link, struct attachment, place));
}

unsigned attachments_count(const struct site *site)
{
    unsigned count = 0;
    for (const struct list *link = site->attachments.next; link != &site->attachments;
         link = link->next)
        count++;
    return count;
}

static void note(struct site *site, const char *name, const struct attachment *attachment)
{
    char path[1024], tmp[1024];
    events_note(site->events, name, "session=%llu vm=%s path=%s tmp=%s devices=%u first=%s",
                (unsigned long long)attachment->session, attachment->moref,
                events_quote(attachment->path, path, sizeof path),
                events_quote(attachment->tmp_directory, tmp, sizeof tmp), attachment->device_count,
                attachment->device_count > 0 ? attachment->devices[0] : "-");
}

static void detach_devices(struct attachment *attachment)
{
    char tag[64];
    tag_of(attachment, tag);
    for (unsigned i = 0; i < attachment->device_count; i++)
        loop_detach(attachment->devices[i], tag);
}

struct attachment *attachment_make(struct site *site, const struct attachment *like,
                                   const char *const *files, unsigned file_count)
{
    char tag[64], path[DEVICE_PATH_MAX];
    bool loops = site_settings(site)->san_loop;
    struct attachment *attachment = add(site, like);
    tag_of(attachment, tag);
    for (unsigned i = 0; loops && i < file_count; i++) {
        int fd = loop_attach(files[i], tag, 0, path);
        if (fd < 0) {
            int error = errno;
            detach_devices(attachment);
            attachment_free(attachment);
            errno = error;
            return NULL;
        }
        close(fd);
        add_device(attachment, path);
    }
    save(site);
    note(site, "attach", attachment);
    return attachment;
}

static void damage_own_vm(struct site *site, const struct attachment *attachment)
{
    if (strcmp(attachment->moref, site_settings(site)->hotadd_proxy) != 0)
        return;
    note(site, "proxy-disk-removed", attachment);
    add_removed(site, attachment->moref);
}

void attachment_detach(struct site *site, struct attachment *attachment)
{
    detach_devices(attachment);
    note(site, "detach", attachment);
    damage_own_vm(site, attachment);
    attachment_free(attachment);
    save(site);
}

void attachment_refresh(const struct attachment *attachment)
{
    for (unsigned i = 0; i < attachment->device_count; i++)
        loop_refresh(attachment->devices[i]);
}

void attachment_orphan(struct site *site, struct attachment *attachment)
{
    attachment->alive = false;
    note(site, "attachment-left", attachment);
}

bool attachments_removed(const struct site *site, const char *moref)
{
    for (unsigned i = 0; i < site->removed_count; i++)
        if (strcmp(site->removed[i], moref) == 0)
            return true;
    return false;
}

/* ---- cleaning up ---- */

static void spoil_tracking(struct site *site, const struct attachment *attachment)
{
    static const char suffix[] = ".vmdk";
    char datastore[64], file[SITE_PATH_MAX], path[SITE_PATH_MAX + 16], quoted[SITE_PATH_MAX];
    if (!site_settings(site)->hotadd_spoils_ctk ||
        !site_file(site, attachment->path, datastore, file))
        return;
    size_t length = strlen(file);
    if (length > strlen(suffix) && strcmp(file + length - strlen(suffix), suffix) == 0)
        length -= strlen(suffix);
    snprintf(path, sizeof path, "%.*s-ctk.vmdk", (int)length, file);
    if (truncate(path, 0) == 0)
        events_note(site->events, "tracking-spoiled", "file=%s",
                    events_quote(path, quoted, sizeof quoted));
}

void attachments_cleanup(struct site *site, const char *moref, const char *tmp_directory,
                         unsigned *cleaned, unsigned *remaining)
{
    *cleaned = *remaining = 0;
    LIST_EACH(link, after, &site->attachments) {
        struct attachment *attachment = LIST_OF(link, struct attachment, place);
        if (attachment->alive || (moref != NULL && strcmp(attachment->moref, moref) != 0))
            continue;
        if (strcmp(attachment->tmp_directory, tmp_directory != NULL ? tmp_directory : "") != 0) {
            ++*remaining;
            continue;
        }
        ++*cleaned;
        spoil_tracking(site, attachment);
        attachment_detach(site, attachment);
    }
}
