// NSURL, NSBundle and NSFileManager.
#include <sys/stat.h>

#include <cerrno>
#include <climits>
#include <cstring>
#include <filesystem>
#include <system_error>

#include "softmetal/foundation/internal.h"

using softmetal::set_error;
using softmetal::to_nsstring;
using softmetal::to_string;

NSFileAttributeKey const NSFileType = @"NSFileType";
NSFileAttributeKey const NSFileSize = @"NSFileSize";
NSFileAttributeType const NSFileTypeDirectory = @"NSFileTypeDirectory";
NSFileAttributeType const NSFileTypeRegular = @"NSFileTypeRegular";
NSFileAttributeType const NSFileTypeSymbolicLink = @"NSFileTypeSymbolicLink";

@implementation NSURL {
  NSString* _text;  // of a file: its path
}

static NSURL* file_url(NSString* path) { return [[NSURL alloc] initFileURLWithPath:path]; }

+ (NSURL*)fileURLWithPath:(NSString*)path {
  return file_url(path);
}
+ (NSURL*)fileURLWithPath:(NSString*)path isDirectory:(BOOL)isDirectory {
  return file_url(path);
}
+ (NSURL*)fileURLWithPath:(NSString*)path relativeToURL:(NSURL*)base {
  return base && !path.absolutePath ? [base URLByAppendingPathComponent:path] : file_url(path);
}
+ (instancetype)URLWithString:(NSString*)string {
  return [[self alloc] initWithString:string];
}
- (instancetype)initFileURLWithPath:(NSString*)path isDirectory:(BOOL)isDirectory {
  return [self initFileURLWithPath:path];
}
- (instancetype)initFileURLWithPath:(NSString*)path {
  self = [super init];
  _fileURL = YES;
  _text = path.absolutePath ? [path copy]
                            : [NSFileManager.defaultManager.currentDirectoryPath
                                  stringByAppendingPathComponent:path];
  return self;
}
- (instancetype)initWithString:(NSString*)string {
  if ([string hasPrefix:@"file://"])
    return [self initFileURLWithPath:[string substringFromIndex:7]];
  self = [super init];
  _text = [string copy];
  return self;
}
- (NSString*)path {
  if (_fileURL) return _text;
  const std::string text = to_string(_text);
  const size_t authority = text.find("://");
  const size_t slash = text.find('/', authority == std::string::npos ? 0 : authority + 3);
  return to_nsstring(slash == std::string::npos ? "" : text.substr(slash));
}
- (NSString*)scheme {
  if (_fileURL) return @"file";
  const NSRange colon = [_text rangeOfString:@":"];
  return colon.location == NSNotFound ? nil : [_text substringToIndex:colon.location];
}
- (NSString*)absoluteString {
  return _fileURL ? [@"file://" stringByAppendingString:_text] : _text;
}
- (NSString*)lastPathComponent {
  return self.path.lastPathComponent;
}
- (NSString*)pathExtension {
  return self.path.pathExtension;
}
- (const char*)fileSystemRepresentation {
  return self.path.UTF8String;
}
- (NSURL*)URLByDeletingLastPathComponent {
  return file_url(self.path.stringByDeletingLastPathComponent);
}
- (NSURL*)URLByDeletingPathExtension {
  return file_url(self.path.stringByDeletingPathExtension);
}
- (NSURL*)URLByAppendingPathComponent:(NSString*)component {
  return file_url([self.path stringByAppendingPathComponent:component]);
}
- (NSURL*)URLByAppendingPathComponent:(NSString*)component isDirectory:(BOOL)isDirectory {
  return [self URLByAppendingPathComponent:component];
}
- (NSURL*)URLByAppendingPathExtension:(NSString*)extension {
  return file_url([self.path stringByAppendingPathExtension:extension]);
}
- (BOOL)checkResourceIsReachableAndReturnError:(NSError**)error {
  if ([NSFileManager.defaultManager fileExistsAtPath:self.path]) return YES;
  set_error(error, NSCocoaErrorDomain, NSFileReadNoSuchFileError,
            "The file “" + to_string(self.path) + "” does not exist.");
  return NO;
}
- (BOOL)isEqual:(id)object {
  return [object isKindOfClass:[NSURL class]] &&
         [self.absoluteString isEqualToString:[object absoluteString]];
}
- (NSUInteger)hash {
  return self.absoluteString.hash;
}
- (id)copyWithZone:(NSZone*)zone {
  return self;
}
- (NSString*)description {
  return self.absoluteString;
}

@end

@implementation NSBundle

static NSString* executable_path() {
  char path[PATH_MAX];
  const ssize_t length = readlink("/proc/self/exe", path, sizeof path);
  return length < 0 ? nil : to_nsstring({path, static_cast<size_t>(length)});
}

+ (NSBundle*)mainBundle {
  static NSBundle* bundle =
      [[NSBundle alloc] initWithPath:executable_path().stringByDeletingLastPathComponent];
  return bundle;
}
+ (NSBundle*)bundleForClass:(Class)cls {
  return self.mainBundle;
}
+ (instancetype)bundleWithPath:(NSString*)path {
  return [[self alloc] initWithPath:path];
}
+ (instancetype)bundleWithURL:(NSURL*)url {
  return [[self alloc] initWithPath:url.path];
}
- (instancetype)initWithPath:(NSString*)path {
  BOOL isDirectory;
  if (![NSFileManager.defaultManager fileExistsAtPath:path isDirectory:&isDirectory] ||
      !isDirectory)
    return nil;
  self = [super init];
  _bundlePath = [path copy];
  return self;
}
- (NSURL*)bundleURL {
  return [NSURL fileURLWithPath:_bundlePath];
}
- (NSString*)resourcePath {
  NSString* resources = [_bundlePath stringByAppendingPathComponent:@"Resources"];
  return [NSFileManager.defaultManager fileExistsAtPath:resources] ? resources : _bundlePath;
}
- (NSURL*)resourceURL {
  return [NSURL fileURLWithPath:self.resourcePath];
}
- (NSString*)executablePath {
  return executable_path();
}
- (NSString*)bundleIdentifier {
  return nil;
}
- (NSDictionary*)infoDictionary {
  return nil;
}
- (NSString*)pathForResource:(NSString*)name
                      ofType:(NSString*)extension
                 inDirectory:(NSString*)directory {
  if (!name) return nil;
  NSString* file = extension.length ? [name stringByAppendingPathExtension:extension] : name;
  if (directory) file = [directory stringByAppendingPathComponent:file];
  for (NSString* folder in @[ self.resourcePath, _bundlePath ]) {
    NSString* path = [folder stringByAppendingPathComponent:file];
    if ([NSFileManager.defaultManager fileExistsAtPath:path]) return path;
  }
  return nil;
}
- (NSString*)pathForResource:(NSString*)name ofType:(NSString*)extension {
  return [self pathForResource:name ofType:extension inDirectory:nil];
}
- (NSURL*)URLForResource:(NSString*)name withExtension:(NSString*)extension {
  NSString* path = [self pathForResource:name ofType:extension];
  return path ? [NSURL fileURLWithPath:path] : nil;
}

@end

NSString* NSTemporaryDirectory(void) {
  const char* folder = getenv("TMPDIR");
  return to_nsstring(std::string(folder ? folder : "/tmp") + "/");
}
NSString* NSHomeDirectory(void) {
  const char* home = getenv("HOME");
  return to_nsstring(home ? home : "/");
}

namespace {

BOOL succeeded(const std::error_code& code, NSString* path, NSError* __autoreleasing* error) {
  if (!code) return YES;
  set_error(error, NSCocoaErrorDomain,
            code == std::errc::no_such_file_or_directory ? NSFileNoSuchFileError
                                                         : NSFileWriteUnknownError,
            to_string(path) + ": " + code.message());
  return NO;
}

}  // namespace

@implementation NSFileManager

+ (NSFileManager*)defaultManager {
  static NSFileManager* manager = [[NSFileManager alloc] init];
  return manager;
}
- (NSString*)currentDirectoryPath {
  std::error_code code;
  return to_nsstring(std::filesystem::current_path(code).string());
}
- (NSURL*)temporaryDirectory {
  return [NSURL fileURLWithPath:NSTemporaryDirectory()];
}
- (BOOL)fileExistsAtPath:(NSString*)path {
  return [self fileExistsAtPath:path isDirectory:nullptr];
}
- (BOOL)fileExistsAtPath:(NSString*)path isDirectory:(BOOL*)isDirectory {
  struct stat status;
  if (!path || stat(path.fileSystemRepresentation, &status) != 0) return NO;
  if (isDirectory) *isDirectory = S_ISDIR(status.st_mode);
  return YES;
}
- (BOOL)isReadableFileAtPath:(NSString*)path {
  return path && access(path.fileSystemRepresentation, R_OK) == 0;
}
- (BOOL)isWritableFileAtPath:(NSString*)path {
  return path && access(path.fileSystemRepresentation, W_OK) == 0;
}
- (BOOL)isExecutableFileAtPath:(NSString*)path {
  return path && access(path.fileSystemRepresentation, X_OK) == 0;
}
- (NSData*)contentsAtPath:(NSString*)path {
  return [NSData dataWithContentsOfFile:path];
}
- (BOOL)createFileAtPath:(NSString*)path
                contents:(NSData*)data
              attributes:(NSDictionary*)attributes {
  return [(data ? data : [NSData data]) writeToFile:path atomically:NO];
}
- (BOOL)createDirectoryAtPath:(NSString*)path
    withIntermediateDirectories:(BOOL)intermediate
                     attributes:(NSDictionary*)attributes
                          error:(NSError**)error {
  std::error_code code;
  if (intermediate)
    std::filesystem::create_directories(to_string(path), code);
  else if (!std::filesystem::create_directory(to_string(path), code) && !code)
    code = std::make_error_code(std::errc::file_exists);
  return succeeded(code, path, error);
}
- (BOOL)createDirectoryAtURL:(NSURL*)url
    withIntermediateDirectories:(BOOL)intermediate
                     attributes:(NSDictionary*)attributes
                          error:(NSError**)error {
  return [self createDirectoryAtPath:url.path
         withIntermediateDirectories:intermediate
                          attributes:attributes
                               error:error];
}
- (BOOL)removeItemAtPath:(NSString*)path error:(NSError**)error {
  std::error_code code;
  if (!std::filesystem::remove_all(to_string(path), code) && !code)
    code = std::make_error_code(std::errc::no_such_file_or_directory);
  return succeeded(code, path, error);
}
- (BOOL)removeItemAtURL:(NSURL*)url error:(NSError**)error {
  return [self removeItemAtPath:url.path error:error];
}
- (NSArray<NSString*>*)contentsOfDirectoryAtPath:(NSString*)path error:(NSError**)error {
  std::error_code code;
  NSMutableArray* names = [NSMutableArray array];
  for (const auto& entry : std::filesystem::directory_iterator(to_string(path), code))
    [names addObject:to_nsstring(entry.path().filename().string())];
  return succeeded(code, path, error) ? names : nil;
}
- (NSDictionary*)attributesOfItemAtPath:(NSString*)path error:(NSError**)error {
  struct stat status;
  if (lstat(path.fileSystemRepresentation, &status) != 0) {
    succeeded(std::error_code(errno, std::generic_category()), path, error);
    return nil;
  }
  return @{
    NSFileType : S_ISLNK(status.st_mode) ? NSFileTypeSymbolicLink
    : S_ISDIR(status.st_mode)            ? NSFileTypeDirectory
                                         : NSFileTypeRegular,
    NSFileSize : @(static_cast<unsigned long long>(status.st_size)),
  };
}
- (NSString*)destinationOfSymbolicLinkAtPath:(NSString*)path error:(NSError**)error {
  std::error_code code;
  const auto target = std::filesystem::read_symlink(to_string(path), code);
  return succeeded(code, path, error) ? to_nsstring(target.string()) : nil;
}

@end
