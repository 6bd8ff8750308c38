#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
extern __attribute__((visibility("default"))) uintptr_t vm_page_size;
extern __attribute__((visibility("default"))) uintptr_t vm_kernel_page_size;
#ifdef __cplusplus
}
#endif
