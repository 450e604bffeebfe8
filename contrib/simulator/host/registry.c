#include "registry.h"

#include <ctype.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "memory.h"

#define MIB (UINT64_C(1) << 20)
#define PLENTY (UINT64_C(1) << 60)

/* ---- reading the text ---- */

enum section { SECTION_NONE, SECTION_HOST, SECTION_DATASTORE, SECTION_VM, SECTION_SNAPSHOT };

struct parser {
    struct registry *registry;
    enum section section;
    unsigned line;
    char *why;
    unsigned why_size;
};

static bool complain(struct parser *parser, const char *what, const char *text)
{
    snprintf(parser->why, parser->why_size, "line %u: %s: %s", parser->line, what, text);
    return false;
}

static char *trimmed(char *text)
{
    while (isspace((unsigned char)*text))
        text++;
    size_t length = strlen(text);
    while (length > 0 && isspace((unsigned char)text[length - 1]))
        text[--length] = '\0';
    return text;
}

static bool copy(struct parser *parser, char *target, size_t size, const char *value)
{
    if (strlen(value) >= size)
        return complain(parser, "too long", value);
    memcpy(target, value, strlen(value) + 1);
    return true;
}

static void add_text(char ***texts, unsigned *count, const char *value)
{
    *texts = memory_resized(*texts, *count + 1, sizeof **texts);
    (*texts)[(*count)++] = memory_text(value);
}

static bool number(struct parser *parser, uint64_t *target, const char *value)
{
    char *end;
    errno = 0;
    *target = strtoull(value, &end, 10);
    if (!isdigit((unsigned char)*value) || *end != '\0' || errno != 0)
        return complain(parser, "not a number", value);
    return true;
}

static bool add_disk(struct parser *parser, char ***disks, unsigned *count, const char *value)
{
    char datastore[64], file[512];
    if (!registry_split_path(value, datastore, sizeof datastore, file, sizeof file))
        return complain(parser, "not of the form [DATASTORE] FOLDER/FILE", value);
    add_text(disks, count, value);
    return true;
}

/* Makes room for one more of the section's kind: `ITEMS` and `COUNT` are the registry's. */
#define ADD(items, count) \
    ((items) = memory_resized((items), (count) + 1, sizeof *(items)), \
     memset(&(items)[(count)], 0, sizeof *(items)), &(items)[(count)++])

static bool begin_section(struct parser *parser, char *text)
{
    struct registry *registry = parser->registry;
    char *kind = strtok(text, " \t"), *name = strtok(NULL, "");
    if (kind == NULL || name == NULL || *(name = trimmed(name)) == '\0')
        return complain(parser, "a section needs a kind and a name", text);
    if (strcmp(kind, "host") == 0) {
        parser->section = SECTION_HOST;
        return copy(parser, ADD(registry->hosts, registry->host_count)->name, 64, name);
    }
    if (strcmp(kind, "datastore") == 0) {
        struct registry_datastore *datastore = ADD(registry->datastores, registry->datastore_count);
        registry_datastore_by_name(NULL, name, datastore);
        parser->section = SECTION_DATASTORE;
        return copy(parser, datastore->name, sizeof datastore->name, name);
    }
    if (strcmp(kind, "vm") == 0) {
        parser->section = SECTION_VM;
        return copy(parser, ADD(registry->vms, registry->vm_count)->moref, 64, name);
    }
    if (strcmp(kind, "snapshot") == 0) {
        parser->section = SECTION_SNAPSHOT;
        return copy(parser, ADD(registry->snapshots, registry->snapshot_count)->moref, 64, name);
    }
    return complain(parser, "unknown section", kind);
}

static bool host_value(struct parser *parser, const char *key, char *value)
{
    struct registry_host *host = &parser->registry->hosts[parser->registry->host_count - 1];
    if (strcmp(key, "datastores") != 0)
        return complain(parser, "unknown key", key);
    for (char *name = strtok(value, ","); name != NULL; name = strtok(NULL, ","))
        add_text(&host->datastores, &host->datastore_count, trimmed(name));
    return true;
}

static bool datastore_value(struct parser *parser, const char *key, const char *value)
{
    static const char *const kinds[] = {"vmfs", "nfs", "vsan", "local"};
    struct registry_datastore *datastore =
        &parser->registry->datastores[parser->registry->datastore_count - 1];
    if (strcmp(key, "block_size") == 0)
        return number(parser, &datastore->block_size, value);
    if (strcmp(key, "free") == 0)
        return number(parser, &datastore->free, value);
    if (strcmp(key, "kind") != 0)
        return complain(parser, "unknown key", key);
    for (unsigned i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        if (strcmp(value, kinds[i]) == 0) {
            datastore->kind = i;
            return true;
        }
    }
    return complain(parser, "unknown kind of datastore", value);
}

static bool vm_value(struct parser *parser, const char *key, const char *value)
{
    struct registry_vm *vm = &parser->registry->vms[parser->registry->vm_count - 1];
    if (strcmp(key, "name") == 0)
        return copy(parser, vm->name, sizeof vm->name, value);
    if (strcmp(key, "host") == 0)
        return copy(parser, vm->host, sizeof vm->host, value);
    if (strcmp(key, "vmx") == 0)
        return copy(parser, vm->vmx, sizeof vm->vmx, value);
    if (strcmp(key, "disk") == 0)
        return add_disk(parser, &vm->disks, &vm->disk_count, value);
    if (strcmp(key, "independent") == 0)
        return add_disk(parser, &vm->independent, &vm->independent_count, value);
    if (strcmp(key, "ide") == 0)
        return add_disk(parser, &vm->ide, &vm->ide_count, value);
    if (strcmp(key, "power") != 0)
        return complain(parser, "unknown key", key);
    vm->powered_on = strcmp(value, "on") == 0;
    return vm->powered_on || strcmp(value, "off") == 0 ||
           complain(parser, "power is on or off, not", value);
}

static bool snapshot_value(struct parser *parser, const char *key, const char *value)
{
    struct registry_snapshot *snapshot =
        &parser->registry->snapshots[parser->registry->snapshot_count - 1];
    if (strcmp(key, "vm") == 0)
        return copy(parser, snapshot->vm, sizeof snapshot->vm, value);
    if (strcmp(key, "disk") == 0)
        return add_disk(parser, &snapshot->disks, &snapshot->disk_count, value);
    return complain(parser, "unknown key", key);
}

static bool parse_line(struct parser *parser, char *line)
{
    line = trimmed(line);
    size_t length = strlen(line);
    char *equals = strchr(line, '=');
    if (length == 0 || *line == '#')
        return true;
    /* A value may begin with a bracket (a path), a line only if it opens a section. */
    if (*line == '[') {
        if (line[length - 1] != ']')
            return complain(parser, "a section ends with ]", line);
        line[length - 1] = '\0';
        return begin_section(parser, line + 1);
    }
    if (equals == NULL)
        return complain(parser, "neither a section nor KEY = VALUE", line);
    *equals = '\0';
    char *key = trimmed(line), *value = trimmed(equals + 1);
    switch (parser->section) {
    case SECTION_HOST:
        return host_value(parser, key, value);
    case SECTION_DATASTORE:
        return datastore_value(parser, key, value);
    case SECTION_VM:
        return vm_value(parser, key, value);
    case SECTION_SNAPSHOT:
        return snapshot_value(parser, key, value);
    default:
        return complain(parser, "before the first section", key);
    }
}

struct registry *registry_parse(const char *text, char *why, unsigned size)
{
    struct parser parser = {.why = why, .why_size = size};
    char *lines = memory_text(text), *rest = lines, *line;
    parser.registry = memory_zeroed(1, sizeof *parser.registry);
    while ((line = strsep(&rest, "\n")) != NULL) {
        parser.line++;
        if (!parse_line(&parser, line)) {
            registry_free(parser.registry);
            parser.registry = NULL;
            break;
        }
    }
    free(lines);
    return parser.registry;
}

static void free_texts(char **texts, unsigned count)
{
    for (unsigned i = 0; i < count; i++)
        free(texts[i]);
    free(texts);
}

void registry_free(struct registry *registry)
{
    if (registry == NULL)
        return;
    for (unsigned i = 0; i < registry->host_count; i++)
        free_texts(registry->hosts[i].datastores, registry->hosts[i].datastore_count);
    for (unsigned i = 0; i < registry->vm_count; i++) {
        struct registry_vm *vm = &registry->vms[i];
        free_texts(vm->disks, vm->disk_count);
        free_texts(vm->independent, vm->independent_count);
        free_texts(vm->ide, vm->ide_count);
    }
    for (unsigned i = 0; i < registry->snapshot_count; i++)
        free_texts(registry->snapshots[i].disks, registry->snapshots[i].disk_count);
    free(registry->hosts);
    free(registry->datastores);
    free(registry->vms);
    free(registry->snapshots);
    free(registry);
}

/* ---- looking things up ---- */

static const char *value_in_query(const char *query, const char *name, size_t *length)
{
    size_t name_length = strlen(name);
    while (query != NULL) {
        query++; /* the ? or & */
        if (strncmp(query, name, name_length) == 0 && query[name_length] == '=') {
            query += name_length + 1;
            *length = strcspn(query, "&");
            return query;
        }
        query = strchr(query, '&');
    }
    return NULL;
}

const struct registry_vm *registry_vm_by_spec(const struct registry *registry, const char *vmx_spec)
{
    static const char moref[] = "moref=";
    char vmx[512] = "";
    if (registry == NULL || vmx_spec == NULL)
        return NULL;
    const char *wanted = NULL;
    if (strncmp(vmx_spec, moref, strlen(moref)) == 0) {
        wanted = vmx_spec + strlen(moref);
    } else {
        const char *query = strchr(vmx_spec, '?');
        size_t length = 0;
        const char *datastore = value_in_query(query, "dsName", &length);
        if (datastore == NULL)
            return NULL;
        snprintf(vmx, sizeof vmx, "[%.*s] %.*s", (int)length, datastore, (int)(query - vmx_spec),
                 vmx_spec);
    }
    for (unsigned i = 0; i < registry->vm_count; i++) {
        const struct registry_vm *vm = &registry->vms[i];
        if (wanted != NULL ? strcmp(vm->moref, wanted) == 0 : strcmp(vm->vmx, vmx) == 0)
            return vm;
    }
    return NULL;
}

const struct registry_snapshot *registry_snapshot_by_moref(const struct registry *registry,
                                                           const char *moref)
{
    for (unsigned i = 0; registry != NULL && i < registry->snapshot_count; i++)
        if (strcmp(registry->snapshots[i].moref, moref) == 0)
            return &registry->snapshots[i];
    return NULL;
}

const struct registry_host *registry_host_by_name(const struct registry *registry, const char *name)
{
    for (unsigned i = 0; registry != NULL && i < registry->host_count; i++)
        if (strcmp(registry->hosts[i].name, name) == 0)
            return &registry->hosts[i];
    return NULL;
}

const struct registry_datastore *registry_datastore_by_name(const struct registry *registry,
                                                            const char *name,
                                                            struct registry_datastore *defaults)
{
    for (unsigned i = 0; registry != NULL && i < registry->datastore_count; i++)
        if (strcmp(registry->datastores[i].name, name) == 0)
            return &registry->datastores[i];
    *defaults =
        (struct registry_datastore){.kind = STORE_VMFS, .block_size = MIB, .free = PLENTY};
    snprintf(defaults->name, sizeof defaults->name, "%s", name);
    return defaults;
}

static bool leads_out(const char *file)
{
    for (const char *part = file; part != NULL; part = strchr(part, '/')) {
        part += *part == '/';
        size_t length = strcspn(part, "/");
        if (length == 0 || (length == 1 && part[0] == '.') || strncmp(part, "../", 3) == 0 ||
            strcmp(part, "..") == 0)
            return true;
    }
    return false;
}

bool registry_split_path(const char *path, char *datastore, unsigned datastore_size, char *file,
                         unsigned file_size)
{
    const char *end = path != NULL && *path == '[' ? strchr(path, ']') : NULL;
    if (end == NULL || end == path + 1 || end[1] != ' ')
        return false;
    size_t length = (size_t)(end - path - 1);
    const char *rest = end + 2;
    if (length >= datastore_size || strlen(rest) >= file_size || leads_out(rest))
        return false;
    memcpy(datastore, path + 1, length);
    datastore[length] = '\0';
    memcpy(file, rest, strlen(rest) + 1);
    return strchr(datastore, '/') == NULL && datastore[0] != '.';
}
