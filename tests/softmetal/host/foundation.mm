#include "check.h"

#include <atomic>

// The Objective-C runtime and Foundation, as far as host programs of Metal lean on them.

@interface Counted : NSObject
@property(nonatomic, copy) NSString* name;
@property(weak) id other;
@property(class, readonly) int alive;
@end
@implementation Counted
static std::atomic<int> alive = 0;
- (instancetype)init {
  self = [super init];
  ++alive;
  return self;
}
- (void)dealloc {
  --alive;
}
+ (int)alive {
  return alive;
}
- (NSString*)description {
  return [NSString stringWithFormat:@"<%@>", _name];
}
@end

typedef struct {
  double values[4];
} Large;

@interface Derived : Counted {
  int _number;
}
- (Large)large;
- (double)half:(float)x;
@end
@implementation Derived
- (instancetype)init {
  self = [super init];
  _number = 7;
  return self;
}
- (Large)large {
  return {{1, 2, 3, static_cast<double>(_number)}};
}
- (double)half:(float)x {
  return x / 2.0;
}
@end

@interface NSString (Doubled)
- (NSString*)doubled;
@end
@implementation NSString (Doubled)
- (NSString*)doubled {
  return [self stringByAppendingString:self];
}
@end

TEST(references) {
  @autoreleasepool {
    Counted* one = [[Counted alloc] init];
    Counted* same = one;
    CHECK(Counted.alive == 1);
    one = nil;
    CHECK(same && Counted.alive == 1);
  }
  CHECK(Counted.alive == 0);
}

TEST(weak_references) {
  __weak Counted* weak = nil;
  Counted* holder = [[Counted alloc] init];
  @autoreleasepool {
    Counted* one = [[Counted alloc] init];
    weak = one;
    holder.other = one;
    CHECK(weak == one && holder.other == one);
  }
  CHECK(!weak && !holder.other);
}

TEST(messages) {
  Derived* one = [[Derived alloc] init];
  CHECK(one.large.values[3] == 7 && [one half:3] == 1.5);
  Derived* nothing = nil;
  CHECK(nothing.large.values[0] == 0 && nothing.large.values[3] == 0 && [nothing half:3] == 0);
  CHECK([one isKindOfClass:[Counted class]] && ![one isMemberOfClass:[Counted class]]);
  CHECK([one respondsToSelector:@selector(large)] && ![one respondsToSelector:@selector(count)]);
  CHECK([NSStringFromClass([one class]) isEqualToString:@"Derived"]);
  CHECK([[@"ab" doubled] isEqualToString:@"abab"]);
  CHECK([one conformsToProtocol:@protocol(NSObject)]);
}

TEST(blocks) {
  __block int total = 0;
  Counted* captured = [[Counted alloc] init];
  void (^add)(int) = ^(int x) {
    total += captured ? x : 0;
  };
  captured = nil;
  NSArray* blocks = @[ add, [add copy] ];
  for (void (^each)(int) in blocks) each(4);
  add(1);
  CHECK(total == 9 && Counted.alive == 1);
  blocks = nil;
  add = nil;
}

TEST(exceptions) {
  int path = 0;
  @try {
    (void)@[ @1 ][3];
  } @catch (NSException* exception) {
    CHECK([exception.name isEqualToString:NSRangeException]);
    path += 1;
  } @finally {
    path += 10;
  } @
  try {
    [static_cast<id>(@"text") performSelector:@selector(large)];
  } @catch (NSException* exception) {
    CHECK_CONTAINS(exception.reason, "unrecognized selector");
    path += 100;
  } @
  try {
    @throw @"a string";
  } @catch (NSException*) {
    CHECK(false);
  } @catch (NSString* text) {
    path += 1000;
  }
  CHECK(path == 1111);
}

TEST(synchronized_is_recursive) {
  NSObject* lock = [[NSObject alloc] init];
  std::atomic<int>* count = new std::atomic<int>(0);
  dispatch_apply(8, dispatch_get_global_queue(QOS_CLASS_DEFAULT, 0), ^(size_t) {
    for (int i = 0; i < 100; ++i) {
      @synchronized(lock) {
        @synchronized(lock) {
          count->store(count->load() + 1);
        }
      }
    }
  });
  CHECK(*count == 800);
  delete count;
}

TEST(strings) {
  NSString* text = @"hé😀";
  CHECK(text.length == 4 && strlen(text.UTF8String) == 7);
  CHECK([[text substringFromIndex:1] isEqualToString:@"é😀"]);
  CHECK(([[NSString stringWithFormat:@"%@ %d %s %.2f %lu %c", text, -5, "x", 2.5, 7ul, 'c']
      isEqualToString:@"hé😀 -5 x 2.50 7 c"]));
  CHECK([@"a,b,,c" componentsSeparatedByString:@","].count == 4);
  CHECK([[@"abcabc" stringByReplacingOccurrencesOfString:@"bc"
                                              withString:@"X"] isEqualToString:@"aXaX"]);
  CHECK([@"/a/b.metal".lastPathComponent.stringByDeletingPathExtension isEqualToString:@"b"]);
  CHECK(([[NSString pathWithComponents:@[ @"/", @"a", @"b/", @"c" ]] isEqualToString:@"/a/b/c"]));
  CHECK([@"abc" hasPrefix:@"ab"] && [@"abc" hasSuffix:@"bc"] && [@"42x" intValue] == 42);
  CHECK([@"b" compare:@"a"] == NSOrderedDescending);
  CHECK([@"abc" rangeOfString:@"c"].location == 2);
  CHECK([@"abc" rangeOfString:@"z"].location == NSNotFound);
  NSMutableString* built = [NSMutableString stringWithString:@"a"];
  [built appendFormat:@"%d", 1];
  CHECK([built isEqualToString:@"a1"] && built.hash == @"a1".hash);
}

TEST(files) {
  NSError* error = nil;
  CHECK(![NSString stringWithContentsOfFile:@"/nowhere/at/all"
                                   encoding:NSUTF8StringEncoding
                                      error:&error]);
  CHECK([error.domain isEqualToString:NSCocoaErrorDomain]);
  CHECK(error.code == NSFileReadNoSuchFileError);
}

TEST(collections) {
  NSMutableArray* list = [@[ @3, @1, @2 ] mutableCopy];
  [list addObject:@0];
  [list sortUsingSelector:@selector(compare:)];
  CHECK([list isEqualToArray:(@[ @0, @1, @2, @3 ])]);
  NSDictionary* table = @{@"one" : @1, @"two" : @[ @2, @2 ]};
  CHECK([table[@"one"] intValue] == 1 && !table[@"three"] && table.count == 2);
  int seen = 0;
  for (NSString* key in table) seen += table[key] != nil;
  CHECK(seen == 2);
  CHECK(([NSSet setWithArray:@[ @1, @1, @2 ]].count == 2));
  bool was_caught = false;
  @try {
    for (id each in list) [list addObject:each];
  } @catch (NSException*) {
    was_caught = true;
  }
  CHECK(was_caught);
}

TEST(numbers) {
  CHECK([@2.5 doubleValue] == 2.5 && [@YES boolValue] && [@(-3) intValue] == -3);
  CHECK([@1 isEqual:@1.0] && [@1 hash] == [@1.0 hash]);
  CHECK([(@(18446744073709551615ull)).description isEqualToString:@"18446744073709551615"]);
}

TEST(dispatch_queues) {
  dispatch_queue_t serial = dispatch_queue_create("serial", DISPATCH_QUEUE_SERIAL);
  dispatch_group_t group = dispatch_group_create();
  __block int total = 0;
  for (int i = 0; i < 100; ++i) {
    dispatch_group_async(group, serial, ^{
      total += i;
    });
  }
  CHECK(dispatch_group_wait(group, DISPATCH_TIME_FOREVER) == 0 && total == 4950);
  dispatch_semaphore_t semaphore = dispatch_semaphore_create(0);
  CHECK(dispatch_semaphore_wait(semaphore, dispatch_time(DISPATCH_TIME_NOW, NSEC_PER_MSEC)) != 0);
  static dispatch_once_t once;
  __block int calls = 0;
  for (int i = 0; i < 2; ++i) {
    dispatch_once(&once, ^{
      ++calls;
    });
  }
  CHECK(calls == 1);
}

TEST(autorelease_pools_nest) {
  CHECK(Counted.alive == 0);
  @autoreleasepool {
    id kept;
    @autoreleasepool {
      kept = [NSArray arrayWithObject:[[Counted alloc] init]];
    }
    CHECK(Counted.alive == 1 && [kept count] == 1);
  }
  CHECK(Counted.alive == 0);
}

int main(int argc, const char** argv) { return run_tests(argc, argv); }
