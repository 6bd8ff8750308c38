#pragma once

#include <Foundation/NSObjCRuntime.h>
