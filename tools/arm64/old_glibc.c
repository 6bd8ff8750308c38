// What GCC's headers and its static C++ library ask of later releases of glibc, for earlier ones.
#include <pthread.h>

#define HIDDEN __attribute__((visibility("hidden")))

// Of glibc 2.32; 0 where it is not known that there is one thread.
HIDDEN char __libc_single_threaded = 0;

// That of the first glibc for arm64; the linker would take the one of 2.34.
__asm__(".symver first_pthread_once, pthread_once@GLIBC_2.17");
int first_pthread_once(pthread_once_t* once, void (*run)(void));

// So of others.
__asm__(".symver first_pthread_create, pthread_create@GLIBC_2.17");
int first_pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*run)(void*),
                         void* argument);
__asm__(".symver first_pthread_detach, pthread_detach@GLIBC_2.17");
int first_pthread_detach(pthread_t thread);

HIDDEN int __wrap_pthread_create(pthread_t* thread, const pthread_attr_t* attributes,
                                 void* (*run)(void*), void* argument) {
  return first_pthread_create(thread, attributes, run, argument);
}

HIDDEN int __wrap_pthread_detach(pthread_t thread) { return first_pthread_detach(thread); }

HIDDEN int __wrap_pthread_once(pthread_once_t* once, void (*run)(void)) {
  return first_pthread_once(once, run);
}
