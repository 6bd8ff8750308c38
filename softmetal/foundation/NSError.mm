// NSError and NSException.
#include <cxxabi.h>

#include <cstdio>
#include <exception>

#include "softmetal/foundation/internal.h"

NSErrorDomain const NSCocoaErrorDomain = @"NSCocoaErrorDomain";
NSErrorDomain const NSPOSIXErrorDomain = @"NSPOSIXErrorDomain";
NSErrorDomain const NSOSStatusErrorDomain = @"NSOSStatusErrorDomain";
NSErrorUserInfoKey const NSUnderlyingErrorKey = @"NSUnderlyingError";
NSErrorUserInfoKey const NSLocalizedDescriptionKey = @"NSLocalizedDescription";
NSErrorUserInfoKey const NSLocalizedFailureReasonErrorKey = @"NSLocalizedFailureReason";
NSErrorUserInfoKey const NSLocalizedRecoverySuggestionErrorKey = @"NSLocalizedRecoverySuggestion";
NSErrorUserInfoKey const NSFilePathErrorKey = @"NSFilePath";

NSExceptionName const NSGenericException = @"NSGenericException";
NSExceptionName const NSRangeException = @"NSRangeException";
NSExceptionName const NSInvalidArgumentException = @"NSInvalidArgumentException";
NSExceptionName const NSInternalInconsistencyException = @"NSInternalInconsistencyException";
NSExceptionName const NSMallocException = @"NSMallocException";

@implementation NSError

+ (instancetype)errorWithDomain:(NSErrorDomain)domain
                           code:(NSInteger)code
                       userInfo:(NSDictionary*)userInfo {
  return [[self alloc] initWithDomain:domain code:code userInfo:userInfo];
}
- (instancetype)initWithDomain:(NSErrorDomain)domain
                          code:(NSInteger)code
                      userInfo:(NSDictionary*)userInfo {
  self = [super init];
  _domain = [domain copy];
  _code = code;
  _userInfo = userInfo ? [userInfo copy] : @{};
  return self;
}
- (NSString*)localizedDescription {
  NSString* description = _userInfo[NSLocalizedDescriptionKey];
  if (description) return description;
  return [NSString
      stringWithFormat:@"The operation couldn’t be completed. (%@ error %ld.)", _domain, _code];
}
- (NSString*)localizedFailureReason {
  return _userInfo[NSLocalizedFailureReasonErrorKey];
}
- (NSString*)localizedRecoverySuggestion {
  return _userInfo[NSLocalizedRecoverySuggestionErrorKey];
}
- (id)copyWithZone:(NSZone*)zone {
  return self;
}
- (NSString*)description {
  return [NSString stringWithFormat:@"Error Domain=%@ Code=%ld \"%@\"", _domain, _code,
                                    self.localizedDescription];
}

@end

@implementation NSException

+ (NSException*)exceptionWithName:(NSExceptionName)name
                           reason:(NSString*)reason
                         userInfo:(NSDictionary*)userInfo {
  return [[self alloc] initWithName:name reason:reason userInfo:userInfo];
}
- (instancetype)initWithName:(NSExceptionName)name
                      reason:(NSString*)reason
                    userInfo:(NSDictionary*)userInfo {
  self = [super init];
  _name = [name copy];
  _reason = [reason copy];
  _userInfo = [userInfo copy];
  return self;
}
- (void)raise {
  @throw self;
}
+ (void)raise:(NSExceptionName)name format:(NSString*)format, ... {
  va_list arguments;
  va_start(arguments, format);
  NSString* reason = [[NSString alloc] initWithFormat:format arguments:arguments];
  va_end(arguments);
  @throw [self exceptionWithName:name reason:reason userInfo:nil];
}
- (id)copyWithZone:(NSZone*)zone {
  return self;
}
- (NSString*)description {
  return _reason ? _reason : _name;
}

@end

static NSUncaughtExceptionHandler* uncaught_handler = nullptr;
NSUncaughtExceptionHandler* NSGetUncaughtExceptionHandler(void) { return uncaught_handler; }
void NSSetUncaughtExceptionHandler(NSUncaughtExceptionHandler* handler) {
  uncaught_handler = handler;
}

namespace {

std::terminate_handler previous_handler;

[[noreturn]] void describe_uncaught() {
  if (abi::__cxa_current_exception_type()) {
    @try {
      throw;
    } @catch (NSException* exception) {
      fprintf(stderr, "*** Terminating app due to uncaught exception '%s', reason: '%s'\n",
              softmetal::to_string(exception.name).c_str(),
              softmetal::to_string(exception.reason).c_str());
      if (uncaught_handler) uncaught_handler(exception);
      abort();
    } @catch (id object) {
      fprintf(stderr, "*** Terminating app due to uncaught exception of class '%s'\n",
              object_getClassName(object));
      abort();
    } @catch (...) {
    }
  }
  previous_handler();
  abort();
}

[[gnu::constructor]] void install() { previous_handler = std::set_terminate(describe_uncaught); }

}  // namespace

namespace softmetal {

NSError* make_error(NSString* domain, NSInteger code, std::string_view description) {
  return [NSError errorWithDomain:domain
                             code:code
                         userInfo:@{NSLocalizedDescriptionKey : to_nsstring(description)}];
}

void set_error(NSError* __autoreleasing* error, NSString* domain, NSInteger code,
               std::string_view description) {
  if (error) *error = make_error(domain, code, description);
}

}  // namespace softmetal
