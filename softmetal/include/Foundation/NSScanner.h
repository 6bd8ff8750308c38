#pragma once

#import <Foundation/NSString.h>

NS_ASSUME_NONNULL_BEGIN

@interface NSScanner : NSObject
@property(readonly, copy) NSString* string;
@property NSUInteger scanLocation;
@property(nullable, copy) NSCharacterSet* charactersToBeSkipped;
@property(readonly, getter=isAtEnd) BOOL atEnd;
+ (instancetype)scannerWithString:(NSString*)string;
- (instancetype)initWithString:(NSString*)string;
- (BOOL)scanString:(NSString*)string intoString:(NSString* _Nullable* _Nullable)result;
- (BOOL)scanUpToString:(NSString*)string intoString:(NSString* _Nullable* _Nullable)result;
- (BOOL)scanInt:(nullable int*)result;
- (BOOL)scanInteger:(nullable NSInteger*)result;
- (BOOL)scanDouble:(nullable double*)result;
@end

NS_ASSUME_NONNULL_END
