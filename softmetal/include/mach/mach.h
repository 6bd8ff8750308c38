// The few Mach calls that compute programs make.
#pragma once

#include <mach/mach_time.h>
#include <mach/vm_page_size.h>
#include <stdint.h>

typedef int kern_return_t;
typedef unsigned int mach_port_t;
typedef mach_port_t task_id_token_t;
typedef mach_port_t vm_map_t;
typedef uintptr_t vm_address_t;
typedef uintptr_t vm_size_t;
typedef uintptr_t mach_vm_address_t;
typedef uint64_t mach_vm_size_t;

#define KERN_SUCCESS 0
#define KERN_NO_SPACE 3
#define VM_FLAGS_ANYWHERE 1

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)
mach_port_t mach_task_self(void);
// Whole pages, zeroed.
kern_return_t vm_allocate(vm_map_t task, vm_address_t* address, vm_size_t size, int flags);
kern_return_t vm_deallocate(vm_map_t task, vm_address_t address, vm_size_t size);
#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
