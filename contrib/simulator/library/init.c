/* InitEx, Exit, ListTransportModes: the library as a whole. */
#include <dlfcn.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "library.h"

/* The build number tells releases apart in the log, as with the real library. */
#define BUILD 20000000u + VIX_RELEASE

struct library library;

/* The kit is the folder above the lib64/ that this library was loaded from, as the path was given. */
static bool find_kit(char *kit, size_t size)
{
    Dl_info self;
    char path[PATH_MAX], *slash;
    if (!dladdr(&library, &self) || !self.dli_fname)
        return false;
    if (self.dli_fname[0] != '/') {
        if (!realpath(self.dli_fname, path))
            return false;
    } else {
        snprintf(path, sizeof path, "%s", self.dli_fname);
    }
    for (int levels = 0; levels < 2; levels++) {
        slash = strrchr(path, '/');
        if (!slash)
            return false;
        *slash = 0;
    }
    return (size_t)snprintf(kit, size, "%s", *path ? path : "/") < size;
}

/* The real library loads its siblings by bare name: it is not enough to load it by its path. */
static bool load_siblings(void)
{
    static const char name[] = "libgvmomi.so";
    if (dlopen(name, RTLD_NOW | RTLD_GLOBAL))
        return true;
    say(SAY_ERROR, "VixDiskLib: cannot load %s: %s (is lib64 in LD_LIBRARY_PATH?)", name, dlerror());
    return false;
}

static bool find_plugin(const char *lib_dir)
{
    char path[PATH_MAX];
    if (!lib_dir)
        return false;
    snprintf(path, sizeof path, "%s/lib64/libdiskLibPlugin.so", lib_dir);
    if (dlopen(path, RTLD_NOW))
        return true;
    say(SAY_WARNING, "VixDiskLib: no transport plugin in %s, advanced transports are not available",
        lib_dir);
    return false;
}

/* What is offered, less what needs the plugin when that is not there. */
static void decide_transports(const struct settings *settings)
{
    char offered[sizeof settings->transports], *rest = offered, *name;
    size_t used = 0;
    snprintf(offered, sizeof offered, "%s", settings->transports);
    library.transports[0] = 0;
    while ((name = strsep(&rest, ":"))) {
        if (!*name || (!library.plugin && (!strcmp(name, "san") || !strcmp(name, "hotadd"))))
            continue;
        used += (size_t)snprintf(library.transports + used, sizeof library.transports - used, "%s%s",
                                 used ? ":" : "", name);
    }
}

static VixError refuse_second_init(const struct settings *settings)
{
    if (library.state != LIBRARY_NEW)
        return broken(settings->strict_init, "InitEx", VIX_E_DISK_SUBSYSTEM_INIT_FAIL,
                      "called a second time in process %d", (int)getpid());
    if ((pid_t)syscall(SYS_gettid) != getpid())
        return broken(settings->strict_init, "InitEx", VIX_E_DISK_SUBSYSTEM_INIT_FAIL,
                      "not called from the main thread");
    return VIX_OK;
}

static VixError start(uint32_t major, uint32_t minor, const char *lib_dir, const char *config_file)
{
    struct call call;
    VixError error;
    if (major > VIX_RELEASE / 10 || (major == VIX_RELEASE / 10 && minor > VIX_RELEASE % 10) ||
        major < 5) {
        say(SAY_ERROR, "VixDiskLib: version %u.%u is not supported by release %d.%d", major, minor,
            VIX_RELEASE / 10, VIX_RELEASE % 10);
        return VIX_E_INVALID_ARG;
    }
    config_defaults(&library.config);
    if (config_file && (error = config_read(config_file, &library.config))) {
        say(SAY_ERROR, "VixDiskLib: cannot read the configuration file %s", config_file);
        return error;
    }
    say(SAY_AUDIT, "VMware VixDiskLib (%d.%d) Release build-%u", VIX_RELEASE / 10, VIX_RELEASE % 10,
        BUILD);
    say(SAY_INFO, "VixDiskLib: temporary files go to %s", library.config.tmp_directory);
    if (!load_siblings())
        return VIX_E_DISK_SUBSYSTEM_INIT_FAIL;
    library.plugin = find_plugin(lib_dir);
    library.state = LIBRARY_READY;
    error = call_begin(&call, "InitEx", NULL);
    if (!error) {
        decide_transports(call.settings);
        chatter_phone_home(call.settings);
    } else {
        library.state = LIBRARY_NEW;
    }
    return call_end(&call, error);
}

VIX_EXPORT VixError VixDiskLib_InitEx(uint32_t majorVersion, uint32_t minorVersion,
                                      VixDiskLibGenericLogFunc *log, VixDiskLibGenericLogFunc *warn,
                                      VixDiskLibGenericLogFunc *panic, const char *libDir,
                                      const char *configFile)
{
    const struct settings *settings;
    VixError error;
    if (!library.settings) {
        if (!find_kit(library.kit, sizeof library.kit))
            return VIX_E_DISK_SUBSYSTEM_INIT_FAIL;
        library.settings = settings_source_open(library.kit, NULL);
        if (!library.settings)
            return VIX_E_OUT_OF_MEMORY;
    }
    settings = settings_get(library.settings);
    error = refuse_second_init(settings);
    settings_release(settings);
    if (error)
        return error;
    library.pid = getpid();
    library.session_thread = (pid_t)syscall(SYS_gettid);
    library.log = log;
    library.warn = warn;
    library.panic = panic;
    return start(majorVersion, minorVersion, libDir, configFile);
}

VIX_EXPORT VixError VixDiskLib_Init(uint32_t majorVersion, uint32_t minorVersion,
                                    VixDiskLibGenericLogFunc *log, VixDiskLibGenericLogFunc *warn,
                                    VixDiskLibGenericLogFunc *panic, const char *libDir)
{
    return VixDiskLib_InitEx(majorVersion, minorVersion, log, warn, panic, libDir, NULL);
}

VIX_EXPORT void VixDiskLib_Exit(void)
{
    struct call call;
    if (!call_begin(&call, "Exit", NULL) && !session_thread_only(&call)) {
        sleep_ns(call.settings->profile.exit_ns);
        library.state = LIBRARY_EXITED;
    }
    call_end(&call, VIX_OK);
}

VIX_EXPORT const char *VixDiskLib_ListTransportModes(void)
{
    struct call call;
    VixError error = call_begin(&call, "ListTransportModes", NULL);
    call_end(&call, error);
    return error ? "file:nbdssl:nbd" : library.transports;
}
