// Strings as paths.
#include <climits>
#include <cstdlib>

#include "softmetal/foundation/internal.h"

using softmetal::to_nsstring;
using softmetal::to_string;

namespace {

std::string without_trailing_slashes(std::string path) {
  while (path.size() > 1 && path.back() == '/') path.pop_back();
  return path;
}

std::string last_component(NSString* path) {
  const std::string text = without_trailing_slashes(to_string(path));
  if (text == "/") return text;
  return text.substr(text.rfind('/') + 1);  // npos + 1 is 0
}

size_t extension_dot(const std::string& component) {
  const size_t dot = component.rfind('.');
  return dot == 0 || dot + 1 == component.size() ? std::string::npos : dot;
}

}  // namespace

@implementation NSString (NSStringPathExtensions)

- (NSString*)lastPathComponent {
  return to_nsstring(last_component(self));
}
- (NSString*)pathExtension {
  const std::string component = last_component(self);
  const size_t dot = extension_dot(component);
  return to_nsstring(dot == std::string::npos ? "" : component.substr(dot + 1));
}
- (NSArray<NSString*>*)pathComponents {
  NSMutableArray* components = [NSMutableArray array];
  if (self.absolutePath) [components addObject:@"/"];
  for (NSString* component in [self componentsSeparatedByString:@"/"])
    if (component.length) [components addObject:component];
  return components;
}
+ (NSString*)pathWithComponents:(NSArray<NSString*>*)components {
  NSString* path = @"";
  for (NSString* component in components) path = [path stringByAppendingPathComponent:component];
  return path;
}
- (NSString*)stringByDeletingLastPathComponent {
  const std::string text = without_trailing_slashes(to_string(self));
  const size_t slash = text.rfind('/');
  if (slash == std::string::npos) return @"";
  return to_nsstring(slash == 0 ? "/" : text.substr(0, slash));
}
- (NSString*)stringByDeletingPathExtension {
  const std::string text = without_trailing_slashes(to_string(self));
  const std::string component = last_component(self);
  const size_t dot = extension_dot(component);
  if (dot == std::string::npos) return to_nsstring(text);
  return to_nsstring(text.substr(0, text.size() - (component.size() - dot)));
}
- (NSString*)stringByAppendingPathComponent:(NSString*)component {
  std::string text = without_trailing_slashes(to_string(self));
  const std::string added = without_trailing_slashes(to_string(component));
  if (!text.empty() && text.back() != '/' && !added.starts_with('/')) text += '/';
  return to_nsstring(text + added);
}
- (NSString*)stringByAppendingPathExtension:(NSString*)extension {
  return to_nsstring(without_trailing_slashes(to_string(self)) + "." + to_string(extension));
}
- (NSString*)stringByExpandingTildeInPath {
  const std::string text = to_string(self);
  const char* home = getenv("HOME");
  if (!home || !(text == "~" || text.starts_with("~/"))) return self;
  return to_nsstring(home + text.substr(1));
}
- (NSString*)stringByStandardizingPath {
  NSMutableArray<NSString*>* kept = [NSMutableArray array];
  NSString* expanded = self.stringByExpandingTildeInPath;
  for (NSString* component in [expanded componentsSeparatedByString:@"/"]) {
    if (!component.length || [component isEqualToString:@"."]) continue;
    if ([component isEqualToString:@".."] && expanded.absolutePath)
      [kept removeLastObject];
    else
      [kept addObject:component];
  }
  NSString* joined = [kept componentsJoinedByString:@"/"];
  return expanded.absolutePath ? [@"/" stringByAppendingString:joined] : joined;
}
- (NSString*)stringByResolvingSymlinksInPath {
  char resolved[PATH_MAX];
  return realpath(self.fileSystemRepresentation, resolved) ? to_nsstring(resolved)
                                                           : self.stringByStandardizingPath;
}
- (BOOL)isAbsolutePath {
  const std::string_view text = [self softmetal_utf8];
  return text.starts_with('/') || text.starts_with('~');
}
- (const char*)fileSystemRepresentation {
  return self.UTF8String;
}

@end
