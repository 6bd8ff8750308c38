// Core Animation's clock; layers and drawables are not part of the compute API.
#pragma once

#include <CoreFoundation/CoreFoundation.h>

CF_EXTERN CFTimeInterval CACurrentMediaTime(void);
