// What of CoreFoundation compute programs use.
#pragma once

#include <TargetConditionals.h>
#include <ctype.h>
#include <errno.h>
#include <float.h>
#include <limits.h>
#include <math.h>
#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
#define CF_EXTERN extern "C" __attribute__((visibility("default")))
#else
#define CF_EXTERN extern __attribute__((visibility("default")))
#endif
#ifndef CF_ENUM
#define CF_ENUM(type, name) \
  enum name : type name;    \
  enum name : type
#define CF_OPTIONS(type, name) \
  enum name : type name;       \
  enum name : type
#endif

typedef const void* CFTypeRef;
typedef long CFIndex;
typedef unsigned long CFTypeID;
typedef unsigned long CFHashCode;
typedef unsigned char Boolean;
typedef uint32_t CFStringEncoding;
typedef double CFTimeInterval;
typedef CFTimeInterval CFAbsoluteTime;
#ifdef __OBJC__
@class NSString, NSURL, NSData, NSDictionary, NSArray, NSError;
#endif
typedef const struct __CFString* CFStringRef;
typedef const struct __CFURL* CFURLRef;
typedef const struct __CFData* CFDataRef;
typedef const struct __CFDictionary* CFDictionaryRef;
typedef const struct __CFArray* CFArrayRef;
typedef struct __CFError* CFErrorRef;
typedef const struct __CFAllocator* CFAllocatorRef;
typedef const struct __CFBoolean* CFBooleanRef;

#define kCFStringEncodingUTF8 0x08000100
#define kCFStringEncodingASCII 0x0600

CF_EXTERN CFTypeRef CFRetain(CFTypeRef object);
CF_EXTERN void CFRelease(CFTypeRef object);
CF_EXTERN CFIndex CFGetRetainCount(CFTypeRef object);
CF_EXTERN void CFShow(CFTypeRef object);
CF_EXTERN CFAbsoluteTime CFAbsoluteTimeGetCurrent(void);
CF_EXTERN const char* CFStringGetCStringPtr(CFStringRef string, CFStringEncoding encoding);
CF_EXTERN Boolean CFStringGetCString(CFStringRef string, char* buffer, CFIndex size,
                                     CFStringEncoding encoding);
CF_EXTERN CFIndex CFStringGetLength(CFStringRef string);

#ifdef __OBJC__
#if __has_feature(objc_arc)
#define CFBridgingRetain(object) ((__bridge_retained CFTypeRef)(object))
#define CFBridgingRelease(reference) ((__bridge_transfer id)(reference))
#else
#define CFBridgingRetain(object) CFRetain((CFTypeRef)(object))
#define CFBridgingRelease(reference) [(id)(reference) autorelease]
#endif
#endif
