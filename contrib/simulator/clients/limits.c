/* vixsim-limits: what a library gives for the standard workloads, with the least a client can do. */
#include <errno.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "limits_run.h"

#define DISKS_MAX 64
#define KIB 1024u
#define MIB 1048576u

static const struct workload workloads[] = {
    {"sequential read 1 MiB", false, false, 1 * MIB, 1},
    {"sequential read 1 MiB", false, false, 1 * MIB, 8},
    {"random read 4 KiB", false, true, 4 * KIB, 1},
    {"random read 4 KiB", false, true, 4 * KIB, 16},
    {"random read 4 KiB", false, true, 4 * KIB, 64},
    {"sequential write 1 MiB", true, false, 1 * MIB, 1},
    {"sequential write 1 MiB", true, false, 1 * MIB, 8},
    {"random write 4 KiB", true, true, 4 * KIB, 16},
};

static struct {
    struct login login;
    const char *libdir, *config, *snapshot, *transports, *only;
    double seconds;
    bool json, write, unbuffered, warm_up;
} options = {.seconds = 1};

static struct kit vix;
static struct disk disks[DISKS_MAX];
static unsigned disk_count;

static void usage(FILE *to)
{
    fputs("usage: vixsim-limits --libdir DIR --server NAME [OPTIONS] DISK...\n"
          "\n"
          "Runs the standard workloads on DISK (`[datastore] folder/disk.vmdk`) and prints what came\n"
          "out. Several disks are used at once, each through a handle of its own. Without --server\n"
          "DISK is a local VMDK. Run it with LD_LIBRARY_PATH=DIR/lib64.\n"
          "\n"
          "  --libdir DIR          the kit, told to the library\n"
          "  --config FILE         a configuration file of the library\n"
          "  --server NAME         --user NAME, --password-file FILE, --thumbprint T: the login\n"
          "  --moref VM            the virtual machine; --snapshot REF: of that snapshot\n"
          "  --transports LIST     such as san:nbdssl\n"
          "  --seconds S           for each workload (1)\n"
          "  --unbuffered          open with the library's unbuffered flag\n"
          "  --warm-up             read each disk once before: caches on this machine are filled\n"
          "  --write               write workloads too: THEY OVERWRITE THE DISK\n"
          "  --only TEXT           those workloads alone whose name has TEXT in it, such as write\n"
          "  --json                one JSON object in place of the table\n",
          to);
}

static void fail(const char *what, VixError error)
{
    char *text = vix.GetErrorText ? vix.GetErrorText(error, NULL) : NULL;
    fprintf(stderr, "vixsim-limits: %s: error %llu (%s)\n", what,
            (unsigned long long)VIX_ERROR_CODE(error), text ? text : "no text");
    if (text)
        vix.FreeErrorText(text);
    exit(1);
}

static void refuse(const char *what, const char *why)
{
    fprintf(stderr, "vixsim-limits: %s: %s\n", what, why);
    exit(2);
}

/* ---- the command line ---- */

static void parse_options(int argc, char **argv)
{
    static const struct option longs[] = {
        {"libdir", required_argument, NULL, 'l'},   {"config", required_argument, NULL, 'c'},
        {"server", required_argument, NULL, 's'},   {"user", required_argument, NULL, 'u'},
        {"password-file", required_argument, NULL, 'p'},
        {"thumbprint", required_argument, NULL, 't'}, {"moref", required_argument, NULL, 'm'},
        {"snapshot", required_argument, NULL, 'n'}, {"transports", required_argument, NULL, 'r'},
        {"seconds", required_argument, NULL, 'd'},  {"unbuffered", no_argument, NULL, 'b'},
        {"write", no_argument, NULL, 'w'},          {"json", no_argument, NULL, 'j'},
        {"warm-up", no_argument, NULL, 'W'},        {"only", required_argument, NULL, 'o'},
        {"help", no_argument, NULL, 'h'},
        {0},
    };
    for (int option; (option = getopt_long(argc, argv, "h", longs, NULL)) != -1;)
        switch (option) {
        case 'l': options.libdir = optarg; break;
        case 'c': options.config = optarg; break;
        case 's': options.login.server = optarg; break;
        case 'u': options.login.user = optarg; break;
        case 'p':
            options.login.password = kit_read_secret(optarg);
            if (!options.login.password)
                refuse(optarg, strerror(errno));
            break;
        case 't': options.login.thumbprint = optarg; break;
        case 'm': options.login.moref = optarg; break;
        case 'n': options.snapshot = optarg; break;
        case 'r': options.transports = optarg; break;
        case 'd': options.seconds = atof(optarg); break;
        case 'b': options.unbuffered = true; break;
        case 'w': options.write = true; break;
        case 'W': options.warm_up = true; break;
        case 'o': options.only = optarg; break;
        case 'j': options.json = true; break;
        case 'h': usage(stdout); exit(0);
        default: usage(stderr); exit(2);
        }
    for (; optind < argc && disk_count < DISKS_MAX; optind++)
        disks[disk_count++].path = argv[optind];
    if (!disk_count || optind < argc || options.seconds <= 0) {
        usage(stderr);
        exit(2);
    }
}

/* ---- the session: all of it by the main thread, handles closed after the last callback ---- */

static void quiet(const char *format, va_list values)
{
    (void)format;
    (void)values; /* errors are reported by their code */
}

static void loud(const char *format, va_list values)
{
    vfprintf(stderr, format, values);
}

static VixDiskLibConnection start(void)
{
    char why[512];
    VixDiskLibConnection connection;
    if (!kit_load(&vix, why, sizeof why))
        refuse("the library", why);
    VixError error = vix.InitEx(6, 5, quiet, quiet, loud, options.libdir, options.config);
    if (VIX_FAILED(error))
        fail("InitEx", error);
    error = kit_connect(&vix, &options.login, !options.write, options.snapshot, options.transports,
                        &connection);
    if (VIX_FAILED(error))
        fail("ConnectEx", error);
    return connection;
}

static void open_disk(VixDiskLibConnection connection, struct disk *disk)
{
    VixDiskLibInfo *info;
    uint32_t flags = (options.write ? 0 : VIXDISKLIB_FLAG_OPEN_READ_ONLY) |
                     (options.unbuffered ? VIXDISKLIB_FLAG_OPEN_UNBUFFERED : 0);
    VixError error = vix.Open(connection, disk->path, flags, &disk->handle);
    if (VIX_FAILED(error))
        fail(disk->path, error);
    error = vix.GetInfo(disk->handle, &info);
    if (VIX_FAILED(error))
        fail(disk->path, error);
    disk->sectors = info->capacity;
    vix.FreeInfo(info);
    snprintf(disk->transport, sizeof disk->transport, "%s", vix.GetTransportMode(disk->handle));
    if (disk->sectors < MIB / VIXDISKLIB_SECTOR_SIZE)
        refuse(disk->path, "smaller than 1 MiB");
}

static void warm_up(const struct disk *disk)
{
    const uint64_t most = MIB / VIXDISKLIB_SECTOR_SIZE;
    void *buffer;
    VixError error = posix_memalign(&buffer, 4 * KIB, MIB) ? VIX_E_OUT_OF_MEMORY : VIX_OK;
    for (uint64_t at = 0; at < disk->sectors && VIX_SUCCEEDED(error); at += most) {
        uint64_t left = disk->sectors - at;
        error = vix.Read(disk->handle, at, left < most ? left : most, buffer);
    }
    if (VIX_FAILED(error))
        fail(disk->path, error);
    free(buffer);
}

static void stop(VixDiskLibConnection connection)
{
    for (unsigned i = 0; i < disk_count; i++) {
        VixError error = vix.Wait ? vix.Wait(disks[i].handle) : VIX_OK;
        if (VIX_FAILED(error))
            fail("Wait", error);
        vix.Close(disks[i].handle);
    }
    vix.Disconnect(connection);
    vix.Exit();
}

static bool wanted(const struct workload *workload)
{
    return (options.write || !workload->write) &&
           (!options.only || strstr(workload->name, options.only));
}

/* ---- what came out ---- */

static void print_outcome(const struct workload *workload, const struct outcome *outcome, bool first)
{
    if (options.json)
        printf("%s{\"name\": \"%s\", \"depth\": %u, \"bytes_per_s\": %.0f, \"requests_per_s\": %.1f,"
               " \"mean_ms\": %.3f, \"median_ms\": %.3f, \"p99_ms\": %.3f}",
               first ? "" : ", ", workload->name, workload->depth, outcome->bytes_per_s,
               outcome->requests_per_s, outcome->mean_ms, outcome->median_ms, outcome->p99_ms);
    else
        printf("%-24s %5u %10.1f %10.0f %10.3f %10.3f %10.3f\n", workload->name, workload->depth,
               outcome->bytes_per_s / 1e6, outcome->requests_per_s, outcome->mean_ms,
               outcome->median_ms, outcome->p99_ms);
    fflush(stdout);
}

int main(int argc, char **argv)
{
    parse_options(argc, argv);
    VixDiskLibConnection connection = start();
    for (unsigned i = 0; i < disk_count; i++)
        open_disk(connection, &disks[i]);
    for (unsigned i = 0; i < disk_count && options.warm_up; i++)
        warm_up(&disks[i]);
    if (options.json)
        printf("{\"library\": \"%s\", \"transport\": \"%s\", \"disks\": %u, \"workloads\": [",
               vix.file, disks[0].transport, disk_count);
    else
        printf("%s, transport %s, %u disk(s)\n%-24s %5s %10s %10s %10s %10s %10s\n", vix.file,
               disks[0].transport, disk_count, "", "depth", "MB/s", "requests/s", "mean ms",
               "median ms", "99 % ms");
    bool first = true;
    for (size_t i = 0; i < sizeof workloads / sizeof *workloads; i++) {
        struct outcome outcome;
        if (!wanted(&workloads[i]))
            continue;
        long long failed =
            limits_run(&vix, disks, disk_count, &workloads[i], options.seconds, &outcome);
        if (failed)
            fail(workloads[i].name, failed < 0 ? VIX_E_OUT_OF_MEMORY : (VixError)failed);
        print_outcome(&workloads[i], &outcome, first);
        first = false;
    }
    if (options.json)
        puts("]}");
    stop(connection);
    return 0;
}
