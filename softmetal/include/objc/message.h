// Entry points that send a message. Cast to the type of the method that is called.
#pragma once

#include <objc/objc.h>
#include <objc/runtime.h>

struct objc_super {
  id receiver;
  Class super_class;
};

OBJC_EXPORT void objc_msgSend(void);
OBJC_EXPORT void objc_msgSendSuper(void);
OBJC_EXPORT void objc_msgSendSuper2(void);
#if defined(__x86_64__)
OBJC_EXPORT void objc_msgSend_stret(void);
OBJC_EXPORT void objc_msgSendSuper_stret(void);
OBJC_EXPORT void objc_msgSendSuper2_stret(void);
OBJC_EXPORT void objc_msgSend_fpret(void);
OBJC_EXPORT void objc_msgSend_fp2ret(void);
#endif
