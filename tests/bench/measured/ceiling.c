/*
 * What the kernel and the server leave possible: an NBD client of a few lines that makes no choices.
 *
 *     ceiling SOCKET read|write BYTES DEPTH SECONDS
 *
 * Reads or writes blocks of BYTES at offsets of chance, DEPTH in flight, over the unix socket at SOCKET. Requests are packed one
 * after the other into one buffer and sent in one call; replies are received into another and only counted, since each has the
 * same size: nothing is parsed, matched or kept. Simple replies; the server must not fail, and its disk have 64 MiB. Prints how much was done, in
 * how many seconds, and what it took of a processor, as JSON.
 */
#include <endian.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define AREA (64u << 20)
#define MOST 1024 /* requests in flight */

struct request {
    uint32_t magic;
    uint16_t flags, type;
    uint64_t cookie, offset;
    uint32_t length;
} __attribute__((packed));

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static void put(int fd, const void *from, size_t count) {
    for (const char *next = from; count > 0;) {
        ssize_t sent = send(fd, next, count, MSG_NOSIGNAL);
        if (sent <= 0) fail("send");
        next += sent, count -= (size_t)sent;
    }
}

static size_t get(int fd, void *into, size_t most) {
    ssize_t got = recv(fd, into, most, 0);
    if (got <= 0) fail("recv");
    return (size_t)got;
}

static void get_all(int fd, void *into, size_t count) {
    for (char *next = into; count > 0;) {
        size_t got = get(fd, next, count);
        next += got, count -= got;
    }
}

/* Fixed newstyle, NBD_OPT_EXPORT_NAME with the empty name: the shortest way into the transmission phase. */
static int connected(const char *path) {
    struct sockaddr_un name = {.sun_family = AF_UNIX};
    struct { uint32_t flags; uint64_t magic; uint32_t option, length; } __attribute__((packed)) choice = {
        htobe32(3), htobe64(0x49484156454F5054), htobe32(1), 0};
    char greeting[18], reply[10];
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);

    strncpy(name.sun_path, path, sizeof name.sun_path - 1);
    if (fd < 0 || connect(fd, (struct sockaddr *)&name, sizeof name)) fail(path);
    get_all(fd, greeting, sizeof greeting);
    put(fd, &choice, sizeof choice);
    get_all(fd, reply, sizeof reply);
    return fd;
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static double processor(void) {
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    return (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec) + (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
}

int main(int count, char **word) {
    if (count != 6) return fprintf(stderr, "usage: ceiling SOCKET read|write BYTES DEPTH SECONDS\n"), 2;
    int writing = !strcmp(word[2], "write"), fd = connected(word[1]);
    uint32_t bytes = (uint32_t)atoi(word[3]);
    size_t depth = (size_t)atoi(word[4]);
    if (bytes == 0 || bytes > AREA || depth == 0 || depth > MOST) return fprintf(stderr, "ceiling: not these numbers\n"), 2;

    size_t step = sizeof(struct request) + (writing ? bytes : 0), size = 16 + (writing ? 0 : bytes);
    size_t room = size > (256 << 10) ? size : 256 << 10;
    char *requests = calloc(depth, step), *replies = malloc(room);
    if (requests == NULL || replies == NULL) fail("memory");

    uint64_t done = 0, cookie = 0;
    uint32_t chance = 2463534242;
    size_t wanted = depth, part = 0;
    double began = now(), took, end = began + atof(word[5]), used = processor();
    while ((took = now()) < end) {
        for (size_t place = 0; place < wanted; place++) {
            chance ^= chance << 13, chance ^= chance >> 17, chance ^= chance << 5;
            struct request request = {htobe32(0x25609513), 0, htobe16((uint16_t)writing), htobe64(++cookie),
                htobe64((uint64_t)(chance % (AREA / bytes)) * bytes), htobe32(bytes)};
            memcpy(requests + place * step, &request, sizeof request);
        }
        put(fd, requests, wanted * step);
        for (wanted = 0; wanted == 0; wanted = part / size, part %= size) part += get(fd, replies, room);
        done += wanted;
    }
    used = processor() - used;
    /* Some servers do not survive a client that leaves before its replies have come. */
    for (size_t left = (depth - wanted) * size - part; left > 0;) left -= get(fd, replies, left < room ? left : room);
    struct request goodbye = {htobe32(0x25609513), 0, htobe16(2), 0, 0, 0};
    put(fd, &goodbye, sizeof goodbye);
    printf("{\"work\": %llu, \"seconds\": %f, \"cpu\": %f, \"memory\": 0}\n", (unsigned long long)done, took - began,
        used);
    return 0;
}
