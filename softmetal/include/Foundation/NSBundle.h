#pragma once

#import <Foundation/NSDictionary.h>
#import <Foundation/NSString.h>
#import <Foundation/NSURL.h>

NS_ASSUME_NONNULL_BEGIN

// A folder with resources. The main bundle is the folder of the running program; resources are
// looked for in it and in its subfolder Resources.
@interface NSBundle : NSObject
@property(class, readonly, strong) NSBundle* mainBundle;
@property(readonly, copy) NSString* bundlePath;
@property(readonly, copy) NSURL* bundleURL;
@property(nullable, readonly, copy) NSString* resourcePath;
@property(nullable, readonly, copy) NSURL* resourceURL;
@property(nullable, readonly, copy) NSString* executablePath;
@property(nullable, readonly, copy) NSString* bundleIdentifier;
@property(nullable, readonly, copy) NSDictionary<NSString*, id>* infoDictionary;
+ (NSBundle*)bundleForClass:(Class)cls;
+ (nullable instancetype)bundleWithPath:(NSString*)path;
+ (nullable instancetype)bundleWithURL:(NSURL*)url;
- (nullable instancetype)initWithPath:(NSString*)path;
- (nullable NSString*)pathForResource:(nullable NSString*)name ofType:(nullable NSString*)extension;
- (nullable NSString*)pathForResource:(nullable NSString*)name
                               ofType:(nullable NSString*)extension
                          inDirectory:(nullable NSString*)directory;
- (nullable NSURL*)URLForResource:(nullable NSString*)name
                    withExtension:(nullable NSString*)extension;
@end

NS_ASSUME_NONNULL_END
