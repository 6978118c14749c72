/* A busybox that may have any name. Debian's takes the name it is called by for the applet's, and in a store it has a
   hash in front; what this program has inside is called `busybox` whatever its own name is. It needs nothing but the
   kernel, since builders in an empty sandbox run it. Built with -DBUSYBOX="\"/path/of/busybox\"". */
#define _GNU_SOURCE
#include <stddef.h>
#include <sys/mman.h>
#include <unistd.h>

__asm__(".pushsection .rodata\n"
        "inside: .incbin " BUSYBOX "\n"
        "inside_end:\n"
        ".popsection\n");
extern const char inside[], inside_end[];
extern char **environ;

int main(int argc, char **argv) {
    (void)argc;
    int file = memfd_create("busybox", MFD_CLOEXEC);
    for (const char *next = inside; next < inside_end;) {
        ssize_t written = write(file, next, inside_end - next);
        if (written <= 0) return 126;
        next += written;
    }
    argv[0] = "busybox";
    fexecve(file, argv, environ);
    return 126;
}
