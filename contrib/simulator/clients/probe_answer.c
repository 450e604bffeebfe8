/* Answers as lines of JSON: `"key": value`. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "probe.h"

static int answers = -1;

void answer_to(int fd)
{
    answers = fd;
}

static void send_line(const char *key, const char *value)
{
    char line[4096];
    int length = snprintf(line, sizeof line, "\"%s\": %s\n", key, value);
    if (length > 0 && (size_t)length < sizeof line)
        while (write(answers, line, (size_t)length) < 0 && errno == EINTR)
            continue;
}

void answer_number(const char *key, long long value)
{
    char text[32];
    snprintf(text, sizeof text, "%lld", value);
    send_line(key, text);
}

void answer_real(const char *key, double value)
{
    char text[64];
    snprintf(text, sizeof text, "%.6f", value);
    send_line(key, text);
}

void answer_bool(const char *key, bool value)
{
    send_line(key, value ? "true" : "false");
}

void answer_text(const char *key, const char *text)
{
    char quoted[3072] = "\"";
    size_t used = 1;
    if (!text) {
        send_line(key, "null");
        return;
    }
    if (holds_secret(text))
        text = "(struck out: it holds the password)";
    for (; *text && used < sizeof quoted - 8; text++) {
        unsigned char c = (unsigned char)*text;
        if (c == '"' || c == '\\')
            used += (size_t)sprintf(quoted + used, "\\%c", c);
        else if (c < ' ' || c > '~')
            used += (size_t)sprintf(quoted + used, "\\u%04x", c);
        else
            quoted[used++] = (char)c;
    }
    strcpy(quoted + used, "\"");
    send_line(key, quoted);
}

void answer_error(const char *key, VixError error)
{
    char longer[64], value[32];
    answer_number(key, (long long)VIX_ERROR_CODE(error));
    if (VIX_ERROR_CODE(error) == error)
        return;
    snprintf(longer, sizeof longer, "%s_whole", key);
    snprintf(value, sizeof value, "0x%llx", (unsigned long long)error);
    answer_text(longer, value);
}

/* ---- the password's forms ---- */

static void url_encode(const char *text, char *to, size_t size)
{
    size_t used = 0;
    for (; *text && used + 4 < size; text++)
        if (strchr("-._~", *text) || (*text >= '0' && *text <= '9') ||
            (*text >= 'a' && *text <= 'z') || (*text >= 'A' && *text <= 'Z'))
            to[used++] = *text;
        else
            used += (size_t)sprintf(to + used, "%%%02X", (unsigned char)*text);
    to[used] = 0;
}

static void base64_encode(const char *text, char *to, size_t size)
{
    static const char digits[] =
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    size_t length = strlen(text), used = 0;
    for (size_t i = 0; i < length && used + 5 < size; i += 3) {
        unsigned bits = 0;
        for (size_t k = 0; k < 3; k++)
            bits = bits << 8 | (i + k < length ? (unsigned char)text[i + k] : 0);
        for (size_t k = 0; k < 4; k++)
            to[used++] = i + k > length ? '=' : digits[bits >> (18 - 6 * k) & 63];
    }
    to[used] = 0;
}

bool holds_secret(const char *text)
{
    char form[1024];
    const char *password = target.login.password;
    if (!password || !*password)
        return false;
    if (strstr(text, password))
        return true;
    url_encode(password, form, sizeof form);
    if (strcasestr(text, form))
        return true;
    base64_encode(password, form, sizeof form);
    return strstr(text, form) != NULL;
}
