// Shared by the implementation of Foundation and of the device.
#pragma once

#import <Foundation/Foundation.h>

#include <string>
#include <string_view>

@interface NSString (SoftmetalInternal)
// Valid as long as the string is neither changed nor freed. Empty for nil.
- (std::string_view)softmetal_utf8;
@end

namespace softmetal {

NSString* to_nsstring(std::string_view text);
inline std::string to_string(NSString* text) { return std::string([text softmetal_utf8]); }

// printf with %@.
std::string format(NSString* format, va_list arguments);

size_t utf16_length(std::string_view text);
std::u16string to_utf16(std::string_view text);
std::string to_utf8(const char16_t* text, size_t length);

NSError* make_error(NSString* domain, NSInteger code, std::string_view description);
// Where `error` is not null.
void set_error(NSError* __autoreleasing* error, NSString* domain, NSInteger code,
               std::string_view description);

[[noreturn]] void raise_range(const char* method, size_t index, size_t count);

}  // namespace softmetal
