/* vixsim-probe: what a library really does where the simulator had to assume something. */
#include "probe.h"

#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

struct target target = {.seconds = 60};

static const struct question *const groups[] = {
    library_questions, connection_questions, reading_questions,
    abuse_questions,   block_questions,      metadata_questions,
};

static const char *only[64];
static unsigned only_count;
static bool list;

static void usage(FILE *to)
{
    fputs("usage: vixsim-probe --libdir DIR [OPTIONS]\n"
          "\n"
          "Asks a virtual disk library one question for each thing that the simulator assumes, and\n"
          "prints the answers as a JSON list. It never writes to a disk. Each question is asked in a\n"
          "process of its own: a crash or a hang is an answer too. Run it with\n"
          "LD_LIBRARY_PATH=DIR/lib64, or through contrib/simulator/probe, which sees to that.\n"
          "\n"
          "  --libdir DIR          the kit, told to the library\n"
          "  --server NAME         without it only the library itself is asked\n"
          "  --user NAME           the login\n"
          "  --password-file FILE  its password is the first line; - is standard input\n"
          "  --thumbprint T        of the server's certificate\n"
          "  --moref VM            a virtual machine, such as vm-16\n"
          "  --snapshot REF        one of its snapshots, such as snapshot-12\n"
          "  --disk PATH           a disk as that snapshot names it: `[datastore] vm/disk.vmdk`\n"
          "  --other-disk PATH     a disk of the machine that the snapshot does not hold\n"
          "  --transports LIST     to use for all but the questions about transports (nbdssl)\n"
          "  --allow-hotadd        ask also what may attach the disk to this machine for a while\n"
          "  --seconds S           time for a question (60)\n"
          "  --idle S              how long the question `idle` waits (not asked)\n"
          "  --only NAME           this question alone; may be repeated\n"
          "  --list                print the questions\n"
          "\n"
          "Two logins fail on purpose (wrong-password, null-password): mind a policy that locks\n"
          "accounts.\n",
          to);
}

/* ---- the command line ---- */

static void parse_options(int argc, char **argv)
{
    static const struct option longs[] = {
        {"libdir", required_argument, NULL, 'l'},     {"server", required_argument, NULL, 's'},
        {"user", required_argument, NULL, 'u'},       {"password-file", required_argument, NULL, 'p'},
        {"thumbprint", required_argument, NULL, 't'}, {"moref", required_argument, NULL, 'm'},
        {"snapshot", required_argument, NULL, 'n'},   {"disk", required_argument, NULL, 'd'},
        {"transports", required_argument, NULL, 'r'}, {"seconds", required_argument, NULL, 'S'},
        {"only", required_argument, NULL, 'o'},       {"list", no_argument, NULL, 'L'},
        {"other-disk", required_argument, NULL, 'O'}, {"idle", required_argument, NULL, 'i'},
        {"allow-hotadd", no_argument, NULL, 'a'},     {"help", no_argument, NULL, 'h'},
        {0},
    };
    target.transports = "nbdssl";
    for (int option; (option = getopt_long(argc, argv, "h", longs, NULL)) != -1;)
        switch (option) {
        case 'l': target.libdir = optarg; break;
        case 's': target.login.server = optarg; break;
        case 'u': target.login.user = optarg; break;
        case 'p':
            target.login.password = kit_read_secret(strcmp(optarg, "-") ? optarg : "/dev/stdin");
            if (!target.login.password) {
                fprintf(stderr, "vixsim-probe: %s: %s\n", optarg, strerror(errno));
                exit(2);
            }
            break;
        case 't': target.login.thumbprint = optarg; break;
        case 'm': target.login.moref = optarg; break;
        case 'n': target.snapshot = optarg; break;
        case 'd': target.disk = optarg; break;
        case 'r': target.transports = optarg; break;
        case 'O': target.other_disk = optarg; break;
        case 'i': target.idle_seconds = (unsigned)atoi(optarg); break;
        case 'a': target.allow_hotadd = true; break;
        case 'S': target.seconds = atof(optarg); break;
        case 'o':
            if (only_count < sizeof only / sizeof *only)
                only[only_count++] = optarg;
            break;
        case 'L': list = true; break;
        case 'h': usage(stdout); exit(0);
        default: usage(stderr); exit(2);
        }
    /* A question that crashes would leave its disk attached. */
    if (strstr(target.transports, "hotadd")) {
        fprintf(stderr, "vixsim-probe: hotadd is for --allow-hotadd, not for --transports\n");
        exit(2);
    }
    if (optind < argc || target.seconds <= 0) {
        usage(stderr);
        exit(2);
    }
}

static bool wanted(const struct question *question)
{
    for (unsigned i = 0; i < only_count; i++)
        if (!strcmp(only[i], question->name))
            return true;
    return !only_count;
}

/* Why it cannot be asked, or NULL. */
static const char *obstacle(const struct question *question)
{
    if (question->need >= NEEDS_SERVER && (!target.login.server || !target.login.user ||
                                           !target.login.password || !target.login.moref))
        return "needs --server, --user, --password-file and --moref";
    if (question->need >= NEEDS_DISK && !target.disk)
        return "needs --disk";
    return NULL;
}

/* ---- one question ---- */

enum stream { ANSWERS, OUTPUT, ERRORS, STREAMS };

struct hearing {
    char answers[65536];
    size_t used;
    unsigned long long bytes[STREAMS];
    int status;
    bool timed_out;
    double seconds;
};

static void become_question(const struct question *question, int ends[STREAMS][2])
{
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    setpgid(0, 0); /* what the library may start ends with it */
    int nothing = open("/dev/null", O_RDONLY | O_CLOEXEC);
    dup2(nothing, STDIN_FILENO);
    dup2(ends[OUTPUT][1], STDOUT_FILENO);
    dup2(ends[ERRORS][1], STDERR_FILENO);
    answer_to(ends[ANSWERS][1]);
    question->ask(question->argument);
    static const char *const names[] = {"secrets_in_log", "secrets_in_warn", "secrets_in_panic"};
    for (int i = 0; i < 3; i++)
        if (logged.secrets[i])
            answer_number(names[i], logged.secrets[i]);
    answer_bool("answered", true);
    fflush(NULL);
    _exit(0); /* the library's own clean-up at exit is no part of the question */
}

/* Reads all three streams until they end or the time is over. */
static void listen_to(int fds[STREAMS], struct hearing *hearing, double end)
{
    struct pollfd polled[STREAMS];
    for (int i = 0; i < STREAMS; i++)
        polled[i] = (struct pollfd){.fd = fds[i], .events = POLLIN};
    for (unsigned open_streams = STREAMS; open_streams;) {
        double left = end - kit_seconds();
        hearing->timed_out = left <= 0;
        if (hearing->timed_out)
            return;
        if (poll(polled, STREAMS, (int)(left * 1000) + 1) < 0)
            continue;
        for (int i = 0; i < STREAMS; i++) {
            char buffer[4096];
            if (polled[i].fd < 0 || !polled[i].revents)
                continue;
            ssize_t got = read(polled[i].fd, buffer, sizeof buffer);
            if (got <= 0) {
                polled[i].fd = -1;
                open_streams--;
                continue;
            }
            hearing->bytes[i] += (unsigned long long)got;
            if (i == ANSWERS && hearing->used + (size_t)got < sizeof hearing->answers) {
                memcpy(hearing->answers + hearing->used, buffer, (size_t)got);
                hearing->used += (size_t)got;
            }
        }
    }
}

static bool hear(const struct question *question, struct hearing *hearing)
{
    int ends[STREAMS][2], fds[STREAMS];
    double began = kit_seconds();
    *hearing = (struct hearing){0};
    for (int i = 0; i < STREAMS; i++)
        if (pipe2(ends[i], O_CLOEXEC))
            return false;
    fflush(NULL);
    pid_t child = fork();
    if (child == 0)
        become_question(question, ends);
    for (int i = 0; i < STREAMS; i++) {
        close(ends[i][1]);
        fds[i] = ends[i][0];
    }
    if (child > 0) {
        listen_to(fds, hearing, began + target.seconds + target.idle_seconds);
        if (hearing->timed_out) {
            kill(-child, SIGKILL);
            kill(child, SIGKILL); /* should it not have come to making its group */
        }
        waitpid(child, &hearing->status, 0);
    }
    for (int i = 0; i < STREAMS; i++)
        close(fds[i]);
    hearing->seconds = kit_seconds() - began;
    return child > 0;
}

/* ---- printing ---- */

static void print_answers(struct hearing *hearing)
{
    const char *between = "";
    hearing->answers[hearing->used] = 0;
    printf("{");
    for (char *line = hearing->answers, *end; (end = strchr(line, '\n')); line = end + 1) {
        *end = 0;
        printf("%s%s", between, line);
        between = ", ";
    }
    printf("}");
}

static void print_ended(const struct hearing *hearing)
{
    if (hearing->timed_out)
        printf("\"time-out\"");
    else if (WIFSIGNALED(hearing->status))
        printf("\"signal %d\"", WTERMSIG(hearing->status));
    else
        printf("\"exit %d\"", WEXITSTATUS(hearing->status));
}

static void ask(const struct question *question, bool first)
{
    static struct hearing hearing;
    const char *why = obstacle(question);
    printf("%s\n  {\"question\": \"%s\", \"asks\": \"%s\", \"answer\": ", first ? "" : ",",
           question->name, question->asks);
    if (!why && !hear(question, &hearing))
        why = "no process could be started";
    if (why) {
        printf("null, \"why\": \"%s\"}", why);
        return;
    }
    print_answers(&hearing);
    printf(", \"ended\": ");
    print_ended(&hearing);
    printf(", \"seconds\": %.3f, \"stdout_bytes\": %llu, \"stderr_bytes\": %llu}", hearing.seconds,
           hearing.bytes[OUTPUT], hearing.bytes[ERRORS]);
    fflush(stdout);
}

int main(int argc, char **argv)
{
    unsigned asked = 0;
    parse_options(argc, argv);
    if (!list)
        printf("[");
    for (size_t i = 0; i < sizeof groups / sizeof *groups; i++)
        for (const struct question *question = groups[i]; question->name; question++) {
            if (!wanted(question))
                continue;
            if (list)
                printf("%-24s %s\n", question->name, question->asks);
            else
                ask(question, !asked);
            asked++;
        }
    if (!list)
        printf("\n]\n");
    if (!asked)
        fprintf(stderr, "vixsim-probe: no such question; see --list\n");
    return asked ? 0 : 2;
}
