// The process, time, threads and locks.
#include <mach/mach.h>
#include <os/lock.h>
#include <sys/mman.h>

#include <chrono>
#include <condition_variable>
#include <ctime>
#include <fstream>
#include <mutex>
#include <thread>

#include "softmetal/foundation/internal.h"

extern char** environ;

using softmetal::to_nsstring;

namespace {

constexpr NSTimeInterval kReferenceDate = 978307200;  // 2001-01-01 in seconds of 1970

double seconds_since_1970() {
  using namespace std::chrono;
  return duration<double>(system_clock::now().time_since_epoch()).count();
}

uint64_t monotonic_nanoseconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<uint64_t>(now.tv_sec) * NSEC_PER_SEC + static_cast<uint64_t>(now.tv_nsec);
}

}  // namespace

@implementation NSProcessInfo

+ (NSProcessInfo*)processInfo {
  static NSProcessInfo* info = [[NSProcessInfo alloc] init];
  return info;
}
- (NSDictionary*)environment {
  NSMutableDictionary* variables = [NSMutableDictionary dictionary];
  for (char** entry = environ; *entry; ++entry) {
    const std::string_view text = *entry;
    const size_t equals = text.find('=');
    if (equals != std::string_view::npos)
      variables[to_nsstring(text.substr(0, equals))] = to_nsstring(text.substr(equals + 1));
  }
  return variables;
}
- (NSArray<NSString*>*)arguments {
  NSMutableArray* arguments = [NSMutableArray array];
  std::ifstream file("/proc/self/cmdline");
  for (std::string argument; std::getline(file, argument, '\0');)
    [arguments addObject:to_nsstring(argument)];
  return arguments;
}
- (NSString*)processName {
  return to_nsstring(program_invocation_short_name);
}
- (NSString*)hostName {
  char name[256] = "";
  gethostname(name, sizeof name - 1);
  return to_nsstring(name);
}
- (NSString*)globallyUniqueString {
  static std::atomic<unsigned> serial{0};
  return [NSString stringWithFormat:@"%d-%llx-%u", getpid(),
                                    static_cast<unsigned long long>(monotonic_nanoseconds()),
                                    serial++];
}
- (NSOperatingSystemVersion)operatingSystemVersion {
  return {15, 0, 0};
}
- (NSString*)operatingSystemVersionString {
  return @"Version 15.0 (software Metal device)";
}
- (BOOL)isOperatingSystemAtLeastVersion:(NSOperatingSystemVersion)version {
  const NSOperatingSystemVersion own = self.operatingSystemVersion;
  if (own.majorVersion != version.majorVersion) return own.majorVersion > version.majorVersion;
  if (own.minorVersion != version.minorVersion) return own.minorVersion > version.minorVersion;
  return own.patchVersion >= version.patchVersion;
}
- (int)processIdentifier {
  return getpid();
}
- (NSUInteger)processorCount {
  return static_cast<NSUInteger>(sysconf(_SC_NPROCESSORS_CONF));
}
- (NSUInteger)activeProcessorCount {
  return static_cast<NSUInteger>(sysconf(_SC_NPROCESSORS_ONLN));
}
- (unsigned long long)physicalMemory {
  return static_cast<unsigned long long>(sysconf(_SC_PHYS_PAGES)) *
         static_cast<unsigned long long>(sysconf(_SC_PAGESIZE));
}
- (NSTimeInterval)systemUptime {
  return static_cast<double>(monotonic_nanoseconds()) * 1e-9;
}
- (BOOL)isLowPowerModeEnabled {
  return NO;
}

@end

@implementation NSDate {
  NSTimeInterval _since1970;
}

+ (instancetype)date {
  return [self dateWithTimeIntervalSince1970:seconds_since_1970()];
}
+ (NSDate*)now {
  return [self date];
}
+ (instancetype)distantFuture {
  return [self dateWithTimeIntervalSince1970:64092211200.0];
}
+ (instancetype)dateWithTimeIntervalSinceNow:(NSTimeInterval)seconds {
  return [self dateWithTimeIntervalSince1970:seconds_since_1970() + seconds];
}
+ (instancetype)dateWithTimeIntervalSince1970:(NSTimeInterval)seconds {
  NSDate* date = [[self alloc] init];
  date->_since1970 = seconds;
  return date;
}
- (instancetype)init {
  self = [super init];
  _since1970 = seconds_since_1970();
  return self;
}
- (NSTimeInterval)timeIntervalSince1970 {
  return _since1970;
}
- (NSTimeInterval)timeIntervalSinceReferenceDate {
  return _since1970 - kReferenceDate;
}
- (NSTimeInterval)timeIntervalSinceNow {
  return _since1970 - seconds_since_1970();
}
- (NSTimeInterval)timeIntervalSinceDate:(NSDate*)other {
  return _since1970 - other->_since1970;
}
- (NSComparisonResult)compare:(NSDate*)other {
  return _since1970 < other->_since1970   ? NSOrderedAscending
         : _since1970 > other->_since1970 ? NSOrderedDescending
                                          : NSOrderedSame;
}
- (BOOL)isEqual:(id)object {
  return [object isKindOfClass:[NSDate class]] && [self compare:object] == NSOrderedSame;
}
- (NSUInteger)hash {
  return std::hash<double>()(_since1970);
}
- (id)copyWithZone:(NSZone*)zone {
  return self;
}
- (NSString*)description {
  const time_t seconds = static_cast<time_t>(_since1970);
  tm utc;
  gmtime_r(&seconds, &utc);
  char text[40];
  strftime(text, sizeof text, "%Y-%m-%d %H:%M:%S +0000", &utc);
  return to_nsstring(text);
}

@end

@implementation NSThread

+ (BOOL)isMainThread {
  return getpid() == gettid();
}
+ (void)sleepForTimeInterval:(NSTimeInterval)seconds {
  std::this_thread::sleep_for(std::chrono::duration<double>(seconds));
}
+ (void)detachNewThreadWithBlock:(void (^)(void))block {
  std::thread([block] {
    @autoreleasepool {
      block();
    }
  }).detach();
}

@end

namespace {

// From NSDate to what the standard library waits for.
std::chrono::system_clock::time_point time_point(NSDate* date) {
  using namespace std::chrono;
  // Dates in the far future would overflow the clock.
  const double seconds = std::min(date.timeIntervalSince1970, 9e9);
  return system_clock::time_point(duration_cast<system_clock::duration>(duration<double>(seconds)));
}

}  // namespace

@implementation NSLock {
  std::timed_mutex _mutex;
}
- (void)lock {
  _mutex.lock();
}
- (void)unlock {
  _mutex.unlock();
}
- (BOOL)tryLock {
  return _mutex.try_lock();
}
- (BOOL)lockBeforeDate:(NSDate*)limit {
  return _mutex.try_lock_until(time_point(limit));
}
@end

@implementation NSRecursiveLock {
  std::recursive_mutex _mutex;
}
- (void)lock {
  _mutex.lock();
}
- (void)unlock {
  _mutex.unlock();
}
- (BOOL)tryLock {
  return _mutex.try_lock();
}
@end

@implementation NSCondition {
  std::mutex _mutex;
  std::condition_variable _condition;
}
- (void)lock {
  _mutex.lock();
}
- (void)unlock {
  _mutex.unlock();
}
- (void)wait {
  std::unique_lock lock(_mutex, std::adopt_lock);
  _condition.wait(lock);
  lock.release();
}
- (BOOL)waitUntilDate:(NSDate*)limit {
  std::unique_lock lock(_mutex, std::adopt_lock);
  const bool signaled =
      _condition.wait_until(lock, time_point(limit)) == std::cv_status::no_timeout;
  lock.release();
  return signaled;
}
- (void)signal {
  _condition.notify_one();
}
- (void)broadcast {
  _condition.notify_all();
}
@end

// --- Classes and selectors as strings ---

NSString* NSStringFromClass(Class cls) { return cls ? to_nsstring(class_getName(cls)) : nil; }
NSString* NSStringFromSelector(SEL selector) { return to_nsstring(sel_getName(selector)); }
Class NSClassFromString(NSString* name) { return objc_lookUpClass(name.UTF8String); }
SEL NSSelectorFromString(NSString* name) { return sel_registerName(name.UTF8String); }

// --- C functions ---

extern "C" {

CFAbsoluteTime CFAbsoluteTimeGetCurrent(void) { return seconds_since_1970() - kReferenceDate; }
CFTimeInterval CACurrentMediaTime(void) {
  return static_cast<double>(monotonic_nanoseconds()) * 1e-9;
}
CFTypeRef CFRetain(CFTypeRef object) { return (__bridge_retained CFTypeRef)(__bridge id)object; }
void CFRelease(CFTypeRef object) { (void)(__bridge_transfer id)object; }
CFIndex CFGetRetainCount(CFTypeRef object) {
  return reinterpret_cast<CFIndex (*)(CFTypeRef, SEL)>([(__bridge id)object
      methodForSelector:sel_registerName("retainCount")])(object, sel_registerName("retainCount"));
}
void CFShow(CFTypeRef object) {
  fprintf(stderr, "%s\n", softmetal::to_string([(__bridge id)object description]).c_str());
}
const char* CFStringGetCStringPtr(CFStringRef string, CFStringEncoding) {
  return ((__bridge NSString*)(void*)string).UTF8String;
}
Boolean CFStringGetCString(CFStringRef string, char* buffer, CFIndex size, CFStringEncoding) {
  return [(__bridge NSString*)(void*)string getCString:buffer
                                             maxLength:static_cast<NSUInteger>(size)
                                              encoding:NSUTF8StringEncoding];
}
CFIndex CFStringGetLength(CFStringRef string) {
  return static_cast<CFIndex>(((__bridge NSString*)(void*)string).length);
}

uint64_t mach_absolute_time(void) { return monotonic_nanoseconds(); }
uint64_t mach_continuous_time(void) { return monotonic_nanoseconds(); }
int mach_timebase_info(mach_timebase_info_t info) {
  *info = {1, 1};
  return KERN_SUCCESS;
}
mach_port_t mach_task_self(void) { return 1; }
uintptr_t vm_page_size = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
uintptr_t vm_kernel_page_size = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));

kern_return_t vm_allocate(vm_map_t, vm_address_t* address, vm_size_t size, int) {
  void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return KERN_NO_SPACE;
  *address = reinterpret_cast<vm_address_t>(memory);
  return KERN_SUCCESS;
}
kern_return_t vm_deallocate(vm_map_t, vm_address_t address, vm_size_t size) {
  return munmap(reinterpret_cast<void*>(address), size) == 0 ? KERN_SUCCESS : KERN_NO_SPACE;
}

void os_unfair_lock_lock(os_unfair_lock_t lock) {
  while (!os_unfair_lock_trylock(lock))
    __atomic_load_n(&lock->_os_unfair_lock_opaque, __ATOMIC_RELAXED) ? sched_yield() : 0;
}
bool os_unfair_lock_trylock(os_unfair_lock_t lock) {
  uint32_t free_lock = 0;
  return __atomic_compare_exchange_n(&lock->_os_unfair_lock_opaque, &free_lock, 1u, false,
                                     __ATOMIC_ACQUIRE, __ATOMIC_RELAXED);
}
void os_unfair_lock_unlock(os_unfair_lock_t lock) {
  __atomic_store_n(&lock->_os_unfair_lock_opaque, 0u, __ATOMIC_RELEASE);
}

}  // extern "C"
