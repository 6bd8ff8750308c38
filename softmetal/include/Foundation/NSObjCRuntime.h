#pragma once

#include <Availability.h>
#include <TargetConditionals.h>
#include <objc/objc.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#define NS_ASSUME_NONNULL_BEGIN _Pragma("clang assume_nonnull begin")
#define NS_ASSUME_NONNULL_END _Pragma("clang assume_nonnull end")

#define NS_ENUM(type, name) \
  enum name : type name;    \
  enum name : type
#define NS_CLOSED_ENUM(type, name) NS_ENUM(type, name)
#define NS_ERROR_ENUM(domain, name) NS_ENUM(NSInteger, name)
#ifdef __cplusplus
// Combinations of options are numbers, as Metal programs write them.
#define NS_OPTIONS(type, name) \
  type name;                   \
  enum : type
#else
#define NS_OPTIONS(type, name) \
  enum name : type name;       \
  enum name : type
#endif
#define NS_STRING_ENUM
#define NS_TYPED_ENUM
#define NS_TYPED_EXTENSIBLE_ENUM
#define NS_SWIFT_NAME(...)
#define NS_REFINED_FOR_SWIFT
#define NS_SWIFT_SENDABLE
#define NS_SWIFT_UNAVAILABLE(...)
#define NS_AVAILABLE(...)
#define NS_AVAILABLE_MAC(...)
#define NS_DEPRECATED(...)
#define NS_ENUM_AVAILABLE(...)
#define NS_DESIGNATED_INITIALIZER
#define NS_UNAVAILABLE __attribute__((unavailable))
#define NS_RETURNS_RETAINED __attribute__((ns_returns_retained))
#define NS_RETURNS_NOT_RETAINED __attribute__((ns_returns_not_retained))
#define NS_RETURNS_INNER_POINTER __attribute__((objc_returns_inner_pointer))
#define NS_REQUIRES_NIL_TERMINATION __attribute__((sentinel(0, 1)))
#define NS_FORMAT_FUNCTION(position, first) \
  __attribute__((__format__(__NSString__, position, first)))
#define NS_FORMAT_ARGUMENT(argument) __attribute__((format_arg(argument)))
#define NS_NOESCAPE __attribute__((noescape))
#define NS_INLINE static __inline__ __attribute__((always_inline))
#define NS_REQUIRES_SUPER __attribute__((objc_requires_super))
#define NS_ROOT_CLASS __attribute__((objc_root_class))

#ifdef __cplusplus
#define FOUNDATION_EXTERN extern "C" __attribute__((visibility("default")))
#else
#define FOUNDATION_EXTERN extern __attribute__((visibility("default")))
#endif
#define FOUNDATION_EXPORT FOUNDATION_EXTERN

typedef long NSInteger;
typedef unsigned long NSUInteger;
#define NSIntegerMax INTPTR_MAX
#define NSIntegerMin INTPTR_MIN
#define NSUIntegerMax UINTPTR_MAX
enum { NSNotFound = INTPTR_MAX };

typedef NS_ENUM(NSInteger, NSComparisonResult) {
  NSOrderedAscending = -1L,
  NSOrderedSame,
  NSOrderedDescending
};
typedef NSComparisonResult (^NSComparator)(id first, id second);

#ifndef MIN
#define MIN(a, b)                  \
  ({                               \
    __typeof__(a) min_a = (a);     \
    __typeof__(b) min_b = (b);     \
    min_a < min_b ? min_a : min_b; \
  })
#define MAX(a, b)                  \
  ({                               \
    __typeof__(a) max_a = (a);     \
    __typeof__(b) max_b = (b);     \
    max_a < max_b ? max_b : max_a; \
  })
#define ABS(a)                  \
  ({                            \
    __typeof__(a) abs_a = (a);  \
    abs_a < 0 ? -abs_a : abs_a; \
  })
#endif

#ifdef __OBJC__
@class NSString;
FOUNDATION_EXPORT void NSLog(NSString* format, ...) NS_FORMAT_FUNCTION(1, 2);
FOUNDATION_EXPORT void NSLogv(NSString* format, va_list arguments);
FOUNDATION_EXPORT NSString* NSStringFromClass(Class cls);
FOUNDATION_EXPORT NSString* NSStringFromSelector(SEL selector);
FOUNDATION_EXPORT Class NSClassFromString(NSString* name);
FOUNDATION_EXPORT SEL NSSelectorFromString(NSString* name);
#endif
