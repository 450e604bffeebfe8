/*
 * What the library says: through the client's callbacks, into its own file where the client gave none,
 * and, when told to, on stdout and stderr behind the client's back.
 */
#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "library.h"

#define LINE 1024

/* The file that the real library writes when it was given no callback. */
static void write_own_log(enum level level, const char *format, va_list arguments)
{
    static const char *const names[] = {"panic", "error", "warning", "audit", "info", "verbose",
                                        "trivia"};
    const struct settings *settings = settings_get(library.settings);
    char folder[300], path[600];
    FILE *file;
    if (settings->log_directory[0])
        snprintf(folder, sizeof folder, "%s", settings->log_directory);
    else
        user_folder(folder, sizeof folder);
    settings_release(settings);
    mkdir(folder, 0700);
    snprintf(path, sizeof path, "%s/vixDiskLib-%d.log", folder, (int)getpid());
    file = fopen(library.config.log_file[0] ? library.config.log_file : path, "ae");
    if (!file)
        return;
    fprintf(file, "%s -[%ld] [Originator@6876 sub=Default] ", names[level], syscall(SYS_gettid));
    vfprintf(file, format, arguments);
    fputc('\n', file);
    fclose(file);
}

static void pass_on(enum level level, const char *format, va_list arguments)
{
    VixDiskLibGenericLogFunc *target = level == SAY_PANIC     ? library.panic
                                       : level <= SAY_WARNING ? library.warn
                                                              : library.log;
    if (target)
        target(format, arguments);
    else
        write_own_log(level, format, arguments);
}

void say(enum level level, const char *format, ...)
{
    va_list arguments;
    if ((unsigned)level > library.config.transport_level)
        return;
    va_start(arguments, format);
    pass_on(level, format, arguments);
    va_end(arguments);
}

void say_nfc(unsigned level, const char *format, ...)
{
    va_list arguments;
    if (level > library.config.nfc_level)
        return;
    va_start(arguments, format);
    pass_on(level <= 1 ? SAY_ERROR : SAY_INFO, format, arguments);
    va_end(arguments);
}

/* ---- noise ---- */

static void print(const struct settings *settings, int fd, const char *line)
{
    size_t size = strlen(line), half = settings->chatter_split ? size / 2 : size;
    ssize_t unused = write(fd, line, half);
    if (half < size)
        unused = write(fd, line + half, size - half);
    (void)unused;
}

void chatter_call(const struct settings *settings, const char *name)
{
    uint64_t number = ++library.calls;
    char line[LINE];
    if (!settings->chatter_every || number % settings->chatter_every)
        return;
    snprintf(line, sizeof line, "VixDiskLib: %s is call %llu of process %d\n", name,
             (unsigned long long)number, (int)getpid());
    if (settings->chatter_stdout)
        print(settings, STDOUT_FILENO, line);
    if (settings->chatter_stderr)
        print(settings, STDERR_FILENO, line);
    for (enum level level = SAY_PANIC; settings->chatter_log && level <= SAY_TRIVIA; level++)
        say(level, "VixDiskLib: %s: call %llu, level %d, %5.1f%% done, pid %d", name,
            (unsigned long long)number, (int)level, 100.0, (int)getpid());
}

static bool needs_no_code(char c)
{
    return isalnum((unsigned char)c) || (c && strchr("-._~", c));
}

/* As in a URL: only what has to be, or every byte. */
static void percent_encoded(const char *text, bool all, char *out, size_t size)
{
    size_t used = 0;
    for (; *text && used + 4 < size; text++)
        used += (size_t)snprintf(out + used, size - used,
                                 !all && needs_no_code(*text) ? "%c" : "%%%02X",
                                 (unsigned char)*text);
    out[used] = 0;
}

static void base64(const char *text, char *out, size_t size)
{
    static const char letters[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    size_t length = strlen(text), used = 0;
    for (size_t i = 0; i < length && used + 5 < size; i += 3) {
        uint32_t bits = (uint32_t)(unsigned char)text[i] << 16;
        if (i + 1 < length)
            bits |= (uint32_t)(unsigned char)text[i + 1] << 8;
        if (i + 2 < length)
            bits |= (uint32_t)(unsigned char)text[i + 2];
        out[used++] = letters[bits >> 18];
        out[used++] = letters[bits >> 12 & 63];
        out[used++] = i + 1 < length ? letters[bits >> 6 & 63] : '=';
        out[used++] = i + 2 < length ? letters[bits & 63] : '=';
    }
    out[used] = 0;
}

void chatter_secrets(const struct settings *settings, const char *user, const char *password)
{
    char line[LINE], encoded[LINE / 2], packed[LINE / 2], pair[LINE / 4];
    if (!settings->chatter_secrets || !password)
        return;
    user = user ? user : "";
    percent_encoded(password, false, encoded, sizeof encoded);
    say(SAY_AUDIT, "VixDiskLibVim: POST https://%s:%s@vc/sdk", user, encoded);
    percent_encoded(password, true, encoded, sizeof encoded);
    base64(password, packed, sizeof packed);
    say(SAY_AUDIT, "VixDiskLibVim: login with user name %s, password %s", user, password);
    say(SAY_ERROR, "VixDiskLibVim: login failed once at https://%s:%s@vc/sdk, again", user, encoded);
    say(SAY_AUDIT, "VixDiskLibVim: <password>%s</password> encoded %s", password, packed);
    snprintf(pair, sizeof pair, "%s:%s", user, password);
    base64(pair, packed, sizeof packed);
    say(SAY_AUDIT, "SOAP: Authorization: Basic %s", packed);
    snprintf(line, sizeof line, "VixDiskLib: user %s password %s\n", user, password);
    if (settings->chatter_stdout)
        print(settings, STDOUT_FILENO, line);
    if (settings->chatter_stderr)
        print(settings, STDERR_FILENO, line);
}

void chatter_phone_home(const struct settings *settings)
{
    if (!settings->chatter_phone_home)
        return;
    say(SAY_WARNING, "VDDK_PhoneHome: Get CEIP status failed, the error is %d", 1);
    say(SAY_WARNING, "VDDK_PhoneHome: Send data to the %s collector failed", "CEIP");
}
