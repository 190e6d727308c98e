// The start of a portable program. Since glibc 2.34 the C library runs a program's initializers itself, and the code at a
// program's entry asks for that version; before, the program ran them. This asks for the old version and runs them, which
// both kinds accept. Linked with --wrap=__libc_start_main.
using Main = int (*)(int, char**, char**);
using Initializer = void (*)(int, char**, char**);

extern "C" {

extern Initializer __preinit_array_start[] __attribute__((visibility("hidden")));  // these four are the linker's
extern Initializer __preinit_array_end[] __attribute__((visibility("hidden")));
extern Initializer __init_array_start[] __attribute__((visibility("hidden")));
extern Initializer __init_array_end[] __attribute__((visibility("hidden")));
void _init();

int moec_old_start(Main main, int argc, char** argv, Initializer run, void (*end)(), void (*loader_end)(), void* stack);
#if defined(__x86_64__)
__asm__(".symver moec_old_start,__libc_start_main@GLIBC_2.2.5");
#else
__asm__(".symver moec_old_start,__libc_start_main@GLIBC_2.17");
#endif

static void initialize(int argc, char** argv, char** environment) {
  for (Initializer* each = __preinit_array_start; each != __preinit_array_end; ++each) (*each)(argc, argv, environment);
  _init();
  for (Initializer* each = __init_array_start; each != __init_array_end; ++each) (*each)(argc, argv, environment);
}

__attribute__((visibility("hidden"))) int __wrap___libc_start_main(
    Main main, int argc, char** argv, Initializer, void (*end)(), void (*loader_end)(), void* stack) {
  return moec_old_start(main, argc, argv, initialize, end, loader_end, stack);
}

}  // extern "C"
