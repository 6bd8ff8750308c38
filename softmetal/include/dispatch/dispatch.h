// Grand Central Dispatch as far as compute programs use it: queues, groups, semaphores, once, data.
#pragma once

#include <Block.h>
#include <objc/objc.h>
#include <stdint.h>
#include <sys/types.h>
#include <unistd.h>

#if defined(__OBJC__)
#include <objc/NSObject.h>
#define SOFTMETAL_DISPATCH_TYPE(name) \
  @protocol OS_dispatch_              \
  ##name<NSObject> @end               \
  typedef NSObject<OS_dispatch_##name>* dispatch_##name##_t;
#else
#define SOFTMETAL_DISPATCH_TYPE(name) typedef struct dispatch_##name##_s* dispatch_##name##_t;
#endif
SOFTMETAL_DISPATCH_TYPE(queue)
SOFTMETAL_DISPATCH_TYPE(group)
SOFTMETAL_DISPATCH_TYPE(semaphore)
SOFTMETAL_DISPATCH_TYPE(data)
#undef SOFTMETAL_DISPATCH_TYPE

#if defined(__OBJC__)
typedef dispatch_queue_t dispatch_queue_attr_t;
typedef id dispatch_object_t;
#else
typedef struct dispatch_queue_attr_s* dispatch_queue_attr_t;
typedef void* dispatch_object_t;
#endif
typedef dispatch_queue_t dispatch_queue_global_t;
typedef dispatch_queue_t dispatch_queue_main_t;
typedef dispatch_queue_t dispatch_queue_serial_t;

typedef uint64_t dispatch_time_t;
typedef intptr_t dispatch_once_t;
typedef unsigned int dispatch_qos_class_t;
typedef void (*dispatch_function_t)(void* context);
#ifdef __BLOCKS__
typedef void (^dispatch_block_t)(void);
#endif

#define NSEC_PER_SEC 1000000000ull
#define NSEC_PER_MSEC 1000000ull
#define USEC_PER_SEC 1000000ull
#define NSEC_PER_USEC 1000ull
#define DISPATCH_TIME_NOW (0ull)
#define DISPATCH_TIME_FOREVER (~0ull)
#define DISPATCH_QUEUE_PRIORITY_HIGH 2
#define DISPATCH_QUEUE_PRIORITY_DEFAULT 0
#define DISPATCH_QUEUE_PRIORITY_LOW (-2)
#define DISPATCH_QUEUE_PRIORITY_BACKGROUND (-32768)
#define DISPATCH_APPLY_AUTO ((dispatch_queue_t)0)
#define DISPATCH_QUEUE_SERIAL ((dispatch_queue_attr_t)0)
#define DISPATCH_TARGET_QUEUE_DEFAULT ((dispatch_queue_t)0)
#define QOS_CLASS_USER_INTERACTIVE 0x21
#define QOS_CLASS_USER_INITIATED 0x19
#define QOS_CLASS_DEFAULT 0x15
#define QOS_CLASS_UTILITY 0x11
#define QOS_CLASS_BACKGROUND 0x09

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

#if defined(__OBJC__)
// As on macOS, dispatch objects are Objective-C objects; these functions return them retained.
#define SOFTMETAL_DISPATCH_CREATES __attribute__((ns_returns_retained))
#else
#define SOFTMETAL_DISPATCH_CREATES
#endif

#if !defined(__OBJC__) || !__has_feature(objc_arc)
void dispatch_retain(dispatch_object_t object);
void dispatch_release(dispatch_object_t object);
#endif

extern struct objc_object _dispatch_queue_attr_concurrent;
#if defined(__OBJC__) && __has_feature(objc_arc)
#define DISPATCH_QUEUE_CONCURRENT \
  ((__bridge dispatch_queue_attr_t)(void*)&_dispatch_queue_attr_concurrent)
#else
#define DISPATCH_QUEUE_CONCURRENT ((dispatch_queue_attr_t)(void*)&_dispatch_queue_attr_concurrent)
#endif

SOFTMETAL_DISPATCH_CREATES dispatch_queue_t dispatch_queue_create(const char* label,
                                                                  dispatch_queue_attr_t attributes);
dispatch_queue_attr_t dispatch_queue_attr_make_with_qos_class(dispatch_queue_attr_t attributes,
                                                              dispatch_qos_class_t quality,
                                                              int relative_priority);
dispatch_queue_t dispatch_get_main_queue(void);
dispatch_queue_t dispatch_get_global_queue(intptr_t identifier, uintptr_t flags);
const char* dispatch_queue_get_label(dispatch_queue_t queue);
void dispatch_async_f(dispatch_queue_t queue, void* context, dispatch_function_t work);
void dispatch_sync_f(dispatch_queue_t queue, void* context, dispatch_function_t work);
void dispatch_main(void);

SOFTMETAL_DISPATCH_CREATES dispatch_semaphore_t dispatch_semaphore_create(intptr_t value);
intptr_t dispatch_semaphore_wait(dispatch_semaphore_t semaphore, dispatch_time_t timeout);
intptr_t dispatch_semaphore_signal(dispatch_semaphore_t semaphore);

SOFTMETAL_DISPATCH_CREATES dispatch_group_t dispatch_group_create(void);
void dispatch_group_enter(dispatch_group_t group);
void dispatch_group_leave(dispatch_group_t group);
intptr_t dispatch_group_wait(dispatch_group_t group, dispatch_time_t timeout);

dispatch_time_t dispatch_time(dispatch_time_t when, int64_t nanoseconds);
dispatch_time_t dispatch_walltime(const struct timespec* when, int64_t nanoseconds);
void dispatch_once_f(dispatch_once_t* predicate, void* context, dispatch_function_t work);

size_t dispatch_data_get_size(dispatch_data_t data);

#ifdef __BLOCKS__
void dispatch_async(dispatch_queue_t queue, dispatch_block_t block);
void dispatch_sync(dispatch_queue_t queue, dispatch_block_t block);
void dispatch_barrier_async(dispatch_queue_t queue, dispatch_block_t block);
void dispatch_barrier_sync(dispatch_queue_t queue, dispatch_block_t block);
void dispatch_after(dispatch_time_t when, dispatch_queue_t queue, dispatch_block_t block);
void dispatch_apply(size_t iterations, dispatch_queue_t queue, void (^block)(size_t iteration));
void dispatch_group_async(dispatch_group_t group, dispatch_queue_t queue, dispatch_block_t block);
void dispatch_group_notify(dispatch_group_t group, dispatch_queue_t queue, dispatch_block_t block);
void dispatch_once(dispatch_once_t* predicate, dispatch_block_t block);

// A null destructor copies the bytes; DISPATCH_DATA_DESTRUCTOR_FREE frees them with the data.
extern const dispatch_block_t _dispatch_data_destructor_free;
extern const dispatch_block_t _dispatch_data_destructor_none;
#define DISPATCH_DATA_DESTRUCTOR_DEFAULT ((dispatch_block_t)0)
#define DISPATCH_DATA_DESTRUCTOR_FREE (_dispatch_data_destructor_free)
#define DISPATCH_DATA_DESTRUCTOR_NONE (_dispatch_data_destructor_none)
SOFTMETAL_DISPATCH_CREATES dispatch_data_t dispatch_data_create(const void* bytes, size_t size,
                                                                dispatch_queue_t queue,
                                                                dispatch_block_t destructor);
SOFTMETAL_DISPATCH_CREATES dispatch_data_t dispatch_data_create_map(dispatch_data_t data,
                                                                    const void** bytes,
                                                                    size_t* size);
#endif

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
