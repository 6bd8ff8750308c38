#pragma once

#import <Foundation/NSString.h>

NS_ASSUME_NONNULL_BEGIN

@interface NSURL : NSObject <NSCopying>
@property(nullable, readonly, copy) NSString* path;
@property(nullable, readonly, copy) NSString* scheme;
@property(nullable, readonly, copy) NSString* absoluteString;
@property(nullable, readonly, copy) NSString* lastPathComponent;
@property(nullable, readonly, copy) NSString* pathExtension;
@property(nullable, readonly, copy) NSURL* URLByDeletingLastPathComponent;
@property(nullable, readonly, copy) NSURL* URLByDeletingPathExtension;
@property(readonly, getter=isFileURL) BOOL fileURL;
@property(readonly) const char* fileSystemRepresentation NS_RETURNS_INNER_POINTER;
+ (NSURL*)fileURLWithPath:(NSString*)path;
+ (NSURL*)fileURLWithPath:(NSString*)path isDirectory:(BOOL)isDirectory;
+ (NSURL*)fileURLWithPath:(NSString*)path relativeToURL:(nullable NSURL*)base;
+ (nullable instancetype)URLWithString:(NSString*)string;
- (instancetype)initFileURLWithPath:(NSString*)path;
- (instancetype)initFileURLWithPath:(NSString*)path isDirectory:(BOOL)isDirectory;
- (nullable instancetype)initWithString:(NSString*)string;
- (nullable NSURL*)URLByAppendingPathComponent:(NSString*)component;
- (nullable NSURL*)URLByAppendingPathComponent:(NSString*)component isDirectory:(BOOL)isDirectory;
- (nullable NSURL*)URLByAppendingPathExtension:(NSString*)extension;
- (BOOL)checkResourceIsReachableAndReturnError:(NSError* _Nullable*)error;
@end

NS_ASSUME_NONNULL_END
