#pragma once

#import <Foundation/NSObject.h>

NS_ASSUME_NONNULL_BEGIN

@class NSDate, NSString;

@interface NSLock : NSObject <NSLocking>
@property(nullable, copy) NSString* name;
- (BOOL)tryLock;
- (BOOL)lockBeforeDate:(NSDate*)limit;
@end

@interface NSRecursiveLock : NSObject <NSLocking>
@property(nullable, copy) NSString* name;
- (BOOL)tryLock;
@end

@interface NSCondition : NSObject <NSLocking>
@property(nullable, copy) NSString* name;
- (void)wait;
- (BOOL)waitUntilDate:(NSDate*)limit;
- (void)signal;
- (void)broadcast;
@end

NS_ASSUME_NONNULL_END
