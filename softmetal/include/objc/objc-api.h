#pragma once

#include <objc/message.h>
#include <objc/objc.h>
#include <objc/runtime.h>
