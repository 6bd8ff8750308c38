#pragma once

#import <Foundation/NSDictionary.h>
#import <Foundation/NSString.h>

NS_ASSUME_NONNULL_BEGIN

typedef NSString* NSExceptionName;
FOUNDATION_EXPORT NSExceptionName const NSGenericException;
FOUNDATION_EXPORT NSExceptionName const NSRangeException;
FOUNDATION_EXPORT NSExceptionName const NSInvalidArgumentException;
FOUNDATION_EXPORT NSExceptionName const NSInternalInconsistencyException;
FOUNDATION_EXPORT NSExceptionName const NSMallocException;

__attribute__((objc_exception))
@interface NSException : NSObject<NSCopying>
@property(readonly, copy) NSExceptionName name;
@property(nullable, readonly, copy) NSString* reason;
@property(nullable, readonly, copy) NSDictionary* userInfo;
+ (NSException*)exceptionWithName:(NSExceptionName)name
                           reason:(nullable NSString*)reason
                         userInfo:(nullable NSDictionary*)userInfo;
- (instancetype)initWithName:(NSExceptionName)name
                      reason:(nullable NSString*)reason
                    userInfo:(nullable NSDictionary*)userInfo;
- (void)raise __attribute__((noreturn));
+ (void)raise:(NSExceptionName)name
       format:(NSString*)format, ... NS_FORMAT_FUNCTION(2, 3)__attribute__((noreturn));
@end

typedef void NSUncaughtExceptionHandler(NSException* exception);
FOUNDATION_EXPORT NSUncaughtExceptionHandler* _Nullable NSGetUncaughtExceptionHandler(void);
FOUNDATION_EXPORT void NSSetUncaughtExceptionHandler(NSUncaughtExceptionHandler* _Nullable);

#ifdef NS_BLOCK_ASSERTIONS
#define NSAssert(condition, message, ...) ((void)0)
#define NSCAssert(condition, message, ...) ((void)0)
#else
#define NSAssert(condition, message, ...)                                                   \
  do {                                                                                      \
    if (__builtin_expect(!(condition), 0))                                                  \
      [NSException raise:NSInternalInconsistencyException format:(message), ##__VA_ARGS__]; \
  } while (0)
#define NSCAssert(condition, message, ...) NSAssert(condition, message, ##__VA_ARGS__)
#endif
#define NSParameterAssert(condition) \
  NSAssert((condition), @"Invalid parameter not satisfying: %@", @ #condition)
#define NSCParameterAssert(condition) NSParameterAssert(condition)

NS_ASSUME_NONNULL_END
