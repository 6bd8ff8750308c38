#pragma once

#import <Foundation/NSObject.h>
#import <Foundation/NSRange.h>

NS_ASSUME_NONNULL_BEGIN

@class NSArray<ObjectType>, NSCharacterSet, NSData, NSError, NSURL;

typedef unsigned short unichar;
typedef NSUInteger NSStringEncoding;
enum {
  NSASCIIStringEncoding = 1,
  NSUTF8StringEncoding = 4,
  NSISOLatin1StringEncoding = 5,
};

typedef NS_OPTIONS(NSUInteger, NSStringCompareOptions) {
  NSCaseInsensitiveSearch = 1,
  NSLiteralSearch = 2,
  NSBackwardsSearch = 4,
  NSAnchoredSearch = 8,
  NSNumericSearch = 64,
};

// Text in UTF-8; lengths, indices and ranges count UTF-16 units.
@interface NSString : NSObject <NSCopying, NSMutableCopying>
@property(readonly) NSUInteger length;
- (unichar)characterAtIndex:(NSUInteger)index;
@property(nullable, readonly) const char* UTF8String NS_RETURNS_INNER_POINTER;

+ (instancetype)string;
+ (instancetype)stringWithString:(NSString*)string;
+ (nullable instancetype)stringWithUTF8String:(const char*)text;
+ (nullable instancetype)stringWithCString:(const char*)text encoding:(NSStringEncoding)encoding;
+ (instancetype)stringWithCharacters:(const unichar*)characters length:(NSUInteger)length;
+ (instancetype)stringWithFormat:(NSString*)format, ... NS_FORMAT_FUNCTION(1, 2);
+ (nullable instancetype)stringWithContentsOfFile:(NSString*)path
                                         encoding:(NSStringEncoding)encoding
                                            error:(NSError* _Nullable*)error;
+ (nullable instancetype)stringWithContentsOfURL:(NSURL*)url
                                        encoding:(NSStringEncoding)encoding
                                           error:(NSError* _Nullable*)error;
- (instancetype)init;
- (instancetype)initWithString:(NSString*)string;
- (nullable instancetype)initWithUTF8String:(const char*)text;
- (nullable instancetype)initWithCString:(const char*)text encoding:(NSStringEncoding)encoding;
- (nullable instancetype)initWithBytes:(const void*)bytes
                                length:(NSUInteger)length
                              encoding:(NSStringEncoding)encoding;
- (nullable instancetype)initWithBytesNoCopy:(void*)bytes
                                      length:(NSUInteger)length
                                    encoding:(NSStringEncoding)encoding
                                freeWhenDone:(BOOL)freeWhenDone;
- (instancetype)initWithCharacters:(const unichar*)characters length:(NSUInteger)length;
- (nullable instancetype)initWithData:(NSData*)data encoding:(NSStringEncoding)encoding;
- (instancetype)initWithFormat:(NSString*)format, ... NS_FORMAT_FUNCTION(1, 2);
- (instancetype)initWithFormat:(NSString*)format
                     arguments:(va_list)arguments NS_FORMAT_FUNCTION(1, 0);
- (nullable instancetype)initWithContentsOfFile:(NSString*)path
                                       encoding:(NSStringEncoding)encoding
                                          error:(NSError* _Nullable*)error;
- (nullable instancetype)initWithContentsOfURL:(NSURL*)url
                                      encoding:(NSStringEncoding)encoding
                                         error:(NSError* _Nullable*)error;

- (nullable const char*)cStringUsingEncoding:(NSStringEncoding)encoding NS_RETURNS_INNER_POINTER;
- (BOOL)getCString:(char*)buffer maxLength:(NSUInteger)capacity encoding:(NSStringEncoding)encoding;
- (NSUInteger)lengthOfBytesUsingEncoding:(NSStringEncoding)encoding;
- (NSUInteger)maximumLengthOfBytesUsingEncoding:(NSStringEncoding)encoding;
- (nullable NSData*)dataUsingEncoding:(NSStringEncoding)encoding;

- (BOOL)isEqualToString:(NSString*)other;
- (NSComparisonResult)compare:(NSString*)other;
- (NSComparisonResult)compare:(NSString*)other options:(NSStringCompareOptions)options;
- (NSComparisonResult)caseInsensitiveCompare:(NSString*)other;
- (BOOL)hasPrefix:(NSString*)prefix;
- (BOOL)hasSuffix:(NSString*)suffix;
- (BOOL)containsString:(NSString*)part;
- (NSRange)rangeOfString:(NSString*)part;
- (NSRange)rangeOfString:(NSString*)part options:(NSStringCompareOptions)options;

- (NSString*)stringByAppendingString:(NSString*)string;
- (NSString*)stringByAppendingFormat:(NSString*)format, ... NS_FORMAT_FUNCTION(1, 2);
- (NSString*)substringFromIndex:(NSUInteger)from;
- (NSString*)substringToIndex:(NSUInteger)to;
- (NSString*)substringWithRange:(NSRange)range;
- (NSArray<NSString*>*)componentsSeparatedByString:(NSString*)separator;
- (NSArray<NSString*>*)componentsSeparatedByCharactersInSet:(NSCharacterSet*)separators;
- (NSString*)stringByTrimmingCharactersInSet:(NSCharacterSet*)set;
- (NSString*)stringByReplacingOccurrencesOfString:(NSString*)target
                                       withString:(NSString*)replacement;
@property(readonly, copy) NSString* lowercaseString;
@property(readonly, copy) NSString* uppercaseString;
@property(readonly) int intValue;
@property(readonly) NSInteger integerValue;
@property(readonly) long long longLongValue;
@property(readonly) float floatValue;
@property(readonly) double doubleValue;
@property(readonly) BOOL boolValue;

- (BOOL)writeToFile:(NSString*)path
         atomically:(BOOL)atomically
           encoding:(NSStringEncoding)encoding
              error:(NSError* _Nullable*)error;
@end

@interface NSString (NSStringPathExtensions)
@property(readonly, copy) NSString* lastPathComponent;
@property(readonly, copy) NSString* pathExtension;
@property(readonly, copy) NSArray<NSString*>* pathComponents;
+ (NSString*)pathWithComponents:(NSArray<NSString*>*)components;
@property(readonly, copy) NSString* stringByDeletingLastPathComponent;
@property(readonly, copy) NSString* stringByDeletingPathExtension;
@property(readonly, copy) NSString* stringByStandardizingPath;
@property(readonly, copy) NSString* stringByResolvingSymlinksInPath;
@property(readonly, copy) NSString* stringByExpandingTildeInPath;
@property(readonly, getter=isAbsolutePath) BOOL absolutePath;
@property(readonly) const char* fileSystemRepresentation NS_RETURNS_INNER_POINTER;
- (NSString*)stringByAppendingPathComponent:(NSString*)component;
- (nullable NSString*)stringByAppendingPathExtension:(NSString*)extension;
@end

@interface NSMutableString : NSString
+ (instancetype)stringWithCapacity:(NSUInteger)capacity;
- (instancetype)initWithCapacity:(NSUInteger)capacity;
- (void)appendString:(NSString*)string;
- (void)appendFormat:(NSString*)format, ... NS_FORMAT_FUNCTION(1, 2);
- (void)setString:(NSString*)string;
- (void)insertString:(NSString*)string atIndex:(NSUInteger)index;
- (void)deleteCharactersInRange:(NSRange)range;
- (void)replaceCharactersInRange:(NSRange)range withString:(NSString*)string;
- (NSUInteger)replaceOccurrencesOfString:(NSString*)target
                              withString:(NSString*)replacement
                                 options:(NSStringCompareOptions)options
                                   range:(NSRange)range;
@end

NS_ASSUME_NONNULL_END
