#pragma once

#import <Foundation/Foundation.h>

#define MTL_EXTERN FOUNDATION_EXTERN
#define MTL_EXPORT __attribute__((visibility("default")))
#define MTL_INLINE NS_INLINE
