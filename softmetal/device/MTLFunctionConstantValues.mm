#include "softmetal/device/device.h"

using softmetal::ConstantValue;

@implementation MTLFunctionConstantValues {
  std::vector<ConstantValue> _values;
}

- (id)copyWithZone:(NSZone*)zone {
  MTLFunctionConstantValues* copy = [[MTLFunctionConstantValues alloc] init];
  copy->_values = _values;
  return copy;
}
- (const std::vector<ConstantValue>&)softmetal_values {
  return _values;
}

- (void)softmetal_set:(ConstantValue)given from:(const void*)value {
  const size_t size = softmetal::size_of(given.type);
  if (size == 0) {
    softmetal::misuse("-[MTLFunctionConstantValues setConstantValue:type:atIndex:]",
                      "type(" + std::to_string(given.type) +
                          ") is not a type of function constants: scalars and vectors.");
  }
  const auto* bytes = static_cast<const unsigned char*>(value);
  given.value.bytes.assign(bytes, bytes + size);
  for (ConstantValue& each : _values) {
    if (each.value.by_name != given.value.by_name || each.value.name != given.value.name ||
        each.value.index != given.value.index) {
      continue;
    }
    each = std::move(given);
    return;
  }
  _values.push_back(std::move(given));
}
- (void)setConstantValue:(const void*)value type:(MTLDataType)type atIndex:(NSUInteger)index {
  ConstantValue given;
  given.type = type;
  given.value.index = static_cast<uint32_t>(index);
  [self softmetal_set:std::move(given) from:value];
}
- (void)setConstantValues:(const void*)values type:(MTLDataType)type withRange:(NSRange)range {
  const auto* bytes = static_cast<const unsigned char*>(values);
  for (NSUInteger i = 0; i < range.length; ++i) {
    [self setConstantValue:bytes + i * softmetal::size_of(type)
                      type:type
                   atIndex:range.location + i];
  }
}
- (void)setConstantValue:(const void*)value type:(MTLDataType)type withName:(NSString*)name {
  ConstantValue given;
  given.type = type;
  given.value.by_name = true;
  given.value.name = softmetal::to_string(name);
  [self softmetal_set:std::move(given) from:value];
}
- (void)reset {
  _values.clear();
}

@end

@implementation MTLFunctionConstant

@synthesize name = _name, type = _type, index = _index, required = _required;

- (instancetype)initWithConstant:(const softmetal::FunctionConstant&)constant {
  self = [super init];
  _name = softmetal::to_nsstring(constant.name);
  _type = softmetal::data_type(constant.type);
  _index = constant.index;
  return self;
}
- (NSString*)description {
  return [NSString stringWithFormat:@"<MTLFunctionConstant %@ type %lu index %lu>", _name,
                                    static_cast<unsigned long>(_type),
                                    static_cast<unsigned long>(_index)];
}

@end

@implementation MTLFunctionDescriptor

+ (MTLFunctionDescriptor*)functionDescriptor {
  return [[self alloc] init];
}
- (id)copyWithZone:(NSZone*)zone {
  MTLFunctionDescriptor* copy = [[MTLFunctionDescriptor alloc] init];
  copy.name = _name;
  copy.specializedName = _specializedName;
  copy.constantValues = _constantValues;
  copy.options = _options;
  return copy;
}

@end
