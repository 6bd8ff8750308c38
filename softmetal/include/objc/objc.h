// Basic types of the Objective-C runtime.
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define OBJC_API_VERSION 2
#define OBJC_BOOL_IS_BOOL 1

typedef struct objc_class* Class;
struct objc_object {
  Class isa;
};
typedef struct objc_object* id;
typedef struct objc_selector* SEL;
typedef bool BOOL;

#if !defined(OBJC_OLD_DISPATCH_PROTOTYPES) || OBJC_OLD_DISPATCH_PROTOTYPES
#define OBJC_OLD_DISPATCH_PROTOTYPES 0
#endif
typedef void (*IMP)(void);

#if defined(__OBJC__)
#define YES __objc_yes
#define NO __objc_no
#else
#define YES ((BOOL)1)
#define NO ((BOOL)0)
#endif

#ifndef Nil
#ifdef __cplusplus
#define Nil nullptr
#else
#define Nil ((void*)0)
#endif
#endif
#ifndef nil
#ifdef __cplusplus
#define nil nullptr
#else
#define nil ((void*)0)
#endif
#endif

#ifndef __strong
#if !__has_feature(objc_arc)
#define __strong
#endif
#endif
#ifndef __unsafe_unretained
#if !__has_feature(objc_arc)
#define __unsafe_unretained
#endif
#endif
#ifndef __autoreleasing
#if !__has_feature(objc_arc)
#define __autoreleasing
#endif
#endif

#ifdef __cplusplus
#define OBJC_EXTERN extern "C"
#else
#define OBJC_EXTERN extern
#endif
#define OBJC_EXPORT OBJC_EXTERN __attribute__((visibility("default")))
#define OBJC_INLINE static __inline
#define OBJC_ROOT_CLASS __attribute__((objc_root_class))
#define OBJC_ENUM(type, name) \
  enum name : type name;      \
  enum name : type

OBJC_EXPORT const char* sel_getName(SEL);
OBJC_EXPORT SEL sel_registerName(const char*);
OBJC_EXPORT SEL sel_getUid(const char*);
OBJC_EXPORT bool sel_isEqual(SEL, SEL);
OBJC_EXPORT const char* object_getClassName(id);

#include <objc/softmetal_image.h>
