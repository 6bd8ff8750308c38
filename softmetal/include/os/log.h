// os_log, written to standard error.
#pragma once

#include <stdint.h>
#include <stdio.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct os_log_s* os_log_t;
typedef enum : uint8_t {
  OS_LOG_TYPE_DEFAULT = 0x00,
  OS_LOG_TYPE_INFO = 0x01,
  OS_LOG_TYPE_DEBUG = 0x02,
  OS_LOG_TYPE_ERROR = 0x10,
  OS_LOG_TYPE_FAULT = 0x11,
} os_log_type_t;

#define OS_LOG_DEFAULT ((os_log_t)0)

// The subsystem and category are not kept: all logs go to one place.
static inline os_log_t os_log_create(const char* subsystem, const char* category) {
  (void)subsystem;
  (void)category;
  return OS_LOG_DEFAULT;
}
static inline int os_log_type_enabled(os_log_t log, os_log_type_t type) {
  (void)log;
  return type != OS_LOG_TYPE_DEBUG;
}

#define os_log_with_type(log, type, format, ...)               \
  do {                                                         \
    if (os_log_type_enabled((log), (type)))                    \
      fprintf(stderr, format "\n" __VA_OPT__(, ) __VA_ARGS__); \
  } while (0)
#define os_log(log, ...) os_log_with_type(log, OS_LOG_TYPE_DEFAULT, __VA_ARGS__)
#define os_log_info(log, ...) os_log_with_type(log, OS_LOG_TYPE_INFO, __VA_ARGS__)
#define os_log_debug(log, ...) os_log_with_type(log, OS_LOG_TYPE_DEBUG, __VA_ARGS__)
#define os_log_error(log, ...) os_log_with_type(log, OS_LOG_TYPE_ERROR, __VA_ARGS__)
#define os_log_fault(log, ...) os_log_with_type(log, OS_LOG_TYPE_FAULT, __VA_ARGS__)

#ifdef __cplusplus
}
#endif
