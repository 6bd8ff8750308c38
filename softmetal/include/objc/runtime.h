// Introspection and construction of classes.
#pragma once

#include <objc/objc.h>

typedef struct objc_method* Method;
typedef struct objc_ivar* Ivar;
typedef struct objc_category* Category;
typedef struct objc_property* objc_property_t;
#ifdef __OBJC__
@class Protocol;
#else
typedef struct objc_object Protocol;
#endif

typedef uintptr_t objc_AssociationPolicy;
enum {
  OBJC_ASSOCIATION_ASSIGN = 0,
  OBJC_ASSOCIATION_RETAIN_NONATOMIC = 1,
  OBJC_ASSOCIATION_COPY_NONATOMIC = 3,
  OBJC_ASSOCIATION_RETAIN = 01401,
  OBJC_ASSOCIATION_COPY = 01403
};

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

Class objc_getClass(const char* name);
Class objc_getMetaClass(const char* name);
Class objc_lookUpClass(const char* name);
Class objc_getRequiredClass(const char* name);
Protocol* objc_getProtocol(const char* name);

Class object_getClass(id object);
Class object_setClass(id object, Class cls);
bool object_isClass(id object);
id object_dispose(id object);
id class_createInstance(Class cls, size_t extra_bytes);
void* objc_destructInstance(id object);

const char* class_getName(Class cls);
Class class_getSuperclass(Class cls);
bool class_isMetaClass(Class cls);
size_t class_getInstanceSize(Class cls);
bool class_respondsToSelector(Class cls, SEL selector);
bool class_conformsToProtocol(Class cls, Protocol* protocol);
Method class_getInstanceMethod(Class cls, SEL selector);
Method class_getClassMethod(Class cls, SEL selector);
IMP class_getMethodImplementation(Class cls, SEL selector);
Method* class_copyMethodList(Class cls, unsigned int* count);
bool class_addMethod(Class cls, SEL selector, IMP implementation, const char* types);
IMP class_replaceMethod(Class cls, SEL selector, IMP implementation, const char* types);
bool class_addProtocol(Class cls, Protocol* protocol);
Ivar class_getInstanceVariable(Class cls, const char* name);

Class objc_allocateClassPair(Class superclass, const char* name, size_t extra_bytes);
void objc_registerClassPair(Class cls);

SEL method_getName(Method method);
const char* method_getTypeEncoding(Method method);
IMP method_getImplementation(Method method);
IMP method_setImplementation(Method method, IMP implementation);
void method_exchangeImplementations(Method first, Method second);

const char* ivar_getName(Ivar ivar);
const char* ivar_getTypeEncoding(Ivar ivar);
ptrdiff_t ivar_getOffset(Ivar ivar);
id object_getIvar(id object, Ivar ivar);

const char* protocol_getName(Protocol* protocol);
bool protocol_isEqual(Protocol* first, Protocol* second);

void objc_setAssociatedObject(id object, const void* key, id value, objc_AssociationPolicy policy);
id objc_getAssociatedObject(id object, const void* key);
void objc_removeAssociatedObjects(id object);

// Entry points that compiled code uses.
id objc_retain(id object);
void objc_release(id object);
id objc_autorelease(id object);
void* objc_autoreleasePoolPush(void);
void objc_autoreleasePoolPop(void* pool);
id objc_loadWeak(id* location);
id objc_storeWeak(id* location, id object);
int objc_sync_enter(id object);
int objc_sync_exit(id object);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
