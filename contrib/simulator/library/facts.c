/* What is known of an open disk: from the host's answer, or from the file itself. */
#include <stdlib.h>
#include <stdio.h>
#include <string.h>

#include "library.h"

static char *duplicate(const char *text)
{
    return text ? strdup(text) : NULL;
}

static VixError add_metadata(struct disk_facts *facts, const char *key, const char *value)
{
    struct metadata *more =
        reallocarray(facts->metadata, facts->metadata_count + 1u, sizeof *facts->metadata);
    if (!more)
        return VIX_E_OUT_OF_MEMORY;
    facts->metadata = more;
    more += facts->metadata_count;
    *more = (struct metadata){duplicate(key ? key : ""), duplicate(value ? value : "")};
    facts->metadata_count++;
    return more->key && more->value ? VIX_OK : VIX_E_OUT_OF_MEMORY;
}

VixError facts_take(struct disk_facts *facts, struct wire_reader *reader)
{
    const char *host;
    uint64_t entries;
    VixError error = VIX_OK;
    facts->capacity = wire_take_u64(reader);
    facts->adapter = (int)wire_take_u64(reader);
    facts->links = (unsigned)wire_take_u64(reader);
    facts->geometry.cylinders = (uint32_t)wire_take_u64(reader);
    facts->geometry.heads = (uint32_t)wire_take_u64(reader);
    facts->geometry.sectors = (uint32_t)wire_take_u64(reader);
    facts->uuid = duplicate(wire_take_str(reader));
    facts->parent_hint = duplicate(wire_take_str(reader));
    facts->logical_sector = (uint32_t)wire_take_u64(reader);
    facts->physical_sector = (uint32_t)wire_take_u64(reader);
    host = wire_take_str(reader);
    snprintf(facts->host, sizeof facts->host, "%s", host ? host : "");
    facts->local_store = wire_take_u64(reader) != 0;
    facts->redo = wire_take_u64(reader) != 0;
    entries = wire_take_u64(reader);
    for (uint64_t i = 0; i < entries && !reader->failed && !error; i++) {
        const char *key = wire_take_str(reader);
        error = add_metadata(facts, key, wire_take_str(reader));
    }
    return reader->failed ? VIX_E_HOST_TCP_SOCKET_ERROR : error;
}

VixError facts_of_file(struct disk_facts *facts, struct vmdk *disk)
{
    const char *key;
    VixError error = VIX_OK;
    facts->capacity = vmdk_capacity(disk);
    facts->adapter = vmdk_adapter(disk);
    facts->links = vmdk_links(disk);
    facts->geometry = vmdk_geometry(disk);
    facts->uuid = duplicate(vmdk_metadata(disk, "ddb.uuid"));
    facts->parent_hint = duplicate(vmdk_parent_hint(disk));
    facts->logical_sector = 512;
    facts->physical_sector = 512;
    facts->redo = facts->parent_hint != NULL;
    for (unsigned i = 0; !error && (key = vmdk_metadata_key(disk, i)); i++)
        error = add_metadata(facts, key, vmdk_metadata(disk, key));
    return error;
}

void facts_clear(struct disk_facts *facts)
{
    for (unsigned i = 0; i < facts->metadata_count; i++) {
        free(facts->metadata[i].key);
        free(facts->metadata[i].value);
    }
    free(facts->metadata);
    free(facts->uuid);
    free(facts->parent_hint);
    memset(facts, 0, sizeof *facts);
}
