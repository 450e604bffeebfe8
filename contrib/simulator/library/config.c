/* The client's configuration file, given to InitEx: `name=value`, values perhaps in quotes. */
#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "library.h"

void user_folder(char *path, size_t size)
{
    const char *user = getenv("USER");
    snprintf(path, size, "/tmp/vmware-%s", user && *user ? user : geteuid() == 0 ? "root" : "user");
}

void config_defaults(struct client_config *config)
{
    memset(config, 0, sizeof *config);
    user_folder(config->tmp_directory, sizeof config->tmp_directory);
    config->transport_level = SAY_AUDIT;
    config->nfc_level = 1;
}

/* The text without blanks around it, and without quotes around that. */
static char *trimmed(char *text)
{
    char *end;
    while (isspace((unsigned char)*text))
        text++;
    end = text + strlen(text);
    while (end > text && isspace((unsigned char)end[-1]))
        *--end = 0;
    if (end - text >= 2 && *text == '"' && end[-1] == '"') {
        end[-1] = 0;
        text++;
    }
    return text;
}

static void apply(struct client_config *config, const char *key, const char *value)
{
    uint64_t number = strtoull(value, NULL, 10);
    if (!strcmp(key, "tmpDirectory"))
        snprintf(config->tmp_directory, sizeof config->tmp_directory, "%s", value);
    else if (!strcmp(key, "log.fileName"))
        snprintf(config->log_file, sizeof config->log_file, "%s", value);
    else if (!strcmp(key, "vixDiskLib.transport.LogLevel"))
        config->transport_level = (unsigned)number;
    else if (!strcmp(key, "vixDiskLib.nfc.LogLevel"))
        config->nfc_level = (unsigned)number;
    else if (!strcmp(key, "vixDiskLib.nfc.ReadTimeoutMs"))
        config->read_timeout_ms = number;
    else if (!strcmp(key, "vixDiskLib.nfc.WriteTimeoutMs"))
        config->write_timeout_ms = number;
    else if (!strcmp(key, "vixDiskLib.nfcAio.Session.BufSizeIn64KB"))
        config->buffer_bytes = number < 1u << 20 ? number * 65536 : UINT64_MAX;
    else if (!strcmp(key, "vixDiskLib.nfcAio.Session.BufCount"))
        config->buffers = number;
}

VixError config_read(const char *path, struct client_config *config)
{
    char line[1024];
    FILE *file = fopen(path, "re");
    if (!file)
        return VIX_E_FILE_NOT_FOUND;
    while (fgets(line, sizeof line, file)) {
        char *key = trimmed(line);
        char *equals = strchr(key, '=');
        if (*key == '#' || !equals)
            continue;
        *equals = 0;
        apply(config, trimmed(key), trimmed(equals + 1));
    }
    fclose(file);
    return VIX_OK;
}
