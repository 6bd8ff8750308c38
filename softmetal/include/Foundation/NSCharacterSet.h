#pragma once

#import <Foundation/NSString.h>

NS_ASSUME_NONNULL_BEGIN

// Sets of ASCII characters.
@interface NSCharacterSet : NSObject <NSCopying>
@property(readonly, class, copy) NSCharacterSet* whitespaceCharacterSet;
@property(readonly, class, copy) NSCharacterSet* whitespaceAndNewlineCharacterSet;
@property(readonly, class, copy) NSCharacterSet* newlineCharacterSet;
@property(readonly, class, copy) NSCharacterSet* decimalDigitCharacterSet;
@property(readonly, class, copy) NSCharacterSet* alphanumericCharacterSet;
@property(readonly, class, copy) NSCharacterSet* letterCharacterSet;
@property(readonly, copy) NSCharacterSet* invertedSet;
+ (NSCharacterSet*)characterSetWithCharactersInString:(NSString*)characters;
- (BOOL)characterIsMember:(unichar)character;
@end

NS_ASSUME_NONNULL_END
